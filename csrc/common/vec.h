// Float32 vectors as wide as the instruction set a file is built for, and the few functions the kernels need on them.
// Written with the compilers' vector extensions, so one source serves every instruction set (EVA02_ISA names it).
//
// Kernels must not instantiate std:: templates: such an inline function, compiled once per instruction set, is merged
// by the linker, and a CPU without AVX-512 could be handed the AVX-512 copy. Everything here has its own namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/cpu.h"

#ifndef EVA02_ISA
#error "EVA02_ISA must name the namespace of the instruction set this file is built for"
#endif

#define EVA02_INLINE inline __attribute__((always_inline))

namespace eva02::EVA02_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

EVA02_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
EVA02_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
EVA02_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

EVA02_INLINE vf splat(float x) { return x - vf{}; }
EVA02_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
EVA02_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted: the build sets -ffp-contract=fast

// ---- conversions -------------------------------------------------------------------------------------------------
EVA02_INLINE float to_f32(float x) { return x; }
EVA02_INLINE float to_f32(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
EVA02_INLINE float to_f32(f16 x) {
  // Shift the half's bits into place and let one float multiplication rebias the exponent (exact for subnormals too).
  const uint32_t w = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = w & 0x80000000u, nonsign = w & 0x7fffffffu;
  uint32_t bits = nonsign >> 3;
  float f;
  if (nonsign >= 0x7c000000u) {
    bits = (nonsign >> 3) | 0x7f800000u;
    memcpy(&f, &bits, 4);
  } else {
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}
template <class T>
EVA02_INLINE T from_f32(float x);
template <>
EVA02_INLINE float from_f32<float>(float x) {
  return x;
}
template <>
EVA02_INLINE bf16 from_f32<bf16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
EVA02_INLINE f16 from_f32<f16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (u < 0x38800000u) {  // subnormal: adding 0.5 aligns the last bit of the half with that of the float
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;
    memcpy(&u, &f, 4);
    return f16{static_cast<uint16_t>(sign | (u - 0x3f000000u))};
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | (u >> 13))};
}

// ---- loads and stores (unaligned) --------------------------------------------------------------------------------
EVA02_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
EVA02_INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof(h));
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
}
EVA02_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_f32(p[i]);
  return v;
#endif
}
EVA02_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }
// Past the caches, which then need not read the line first; p is aligned to a vector. `stream_fence` before others
// read.
EVA02_INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
EVA02_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
EVA02_INLINE void store(bf16* p, vf v) {
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vi nan = v != v;  // all ones where NaN
  const vu bits = (rounded & ~reinterpret_cast<vu>(nan)) | (reinterpret_cast<vu>(nan) & 0x7fc0u);
  const vh h = __builtin_convertvector(bits, vh);
  memcpy(p, &h, sizeof(h));
}
EVA02_INLINE void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_f32<f16>(v[i]);
#endif
}

// Asks for the cache lines of n elements, to read or to store to.
enum class For { load, store };
template <For kUse, class T>
EVA02_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(p + i, kUse == For::store ? 1 : 0);
}

// The first n lanes, 0 <= n < kLanes; the others read as zero and are not touched in memory.
template <class T>
EVA02_INLINE vf load_partial(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
#endif
  T buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
EVA02_INLINE void store_partial(T* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
    return;
  }
#endif
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// ---- reductions --------------------------------------------------------------------------------------------------
EVA02_INLINE float hsum(vf v) {
  float lanes[kLanes], s = 0.f;
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  s = lanes[0];
  return s;
}
EVA02_INLINE float hmax(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// ---- functions ---------------------------------------------------------------------------------------------------
// exp(x): argument reduced by ln 2 in two parts, degree-6 polynomial; relative error below 2 ulp, 0 under -87.3,
// clamped over 88.7 (no infinity), NaN stays NaN.
EVA02_INLINE vf vexp(vf x) {
  const vf hi = splat(88.7228f), lo = splat(-87.33654f);
#if defined(__AVX512F__)
  const __m512 limited =
      _mm512_min_ps(reinterpret_cast<__m512>(hi), reinterpret_cast<__m512>(x));  // NaN: second operand
  const vf c = reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(lo), limited));
#else
  const vf under = reinterpret_cast<vf>(x < lo);
  vf c = x > hi ? hi : x;  // a NaN compares false and passes through
  c = c < lo ? lo : c;
#endif
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf t = c * 1.44269504088896341f + magic;
  const vf n = t - magic;
  vf r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
#if defined(__AVX512F__)
  const __mmask16 in_range = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(lo), _CMP_NLT_UQ);
  return reinterpret_cast<vf>(
      _mm512_maskz_scalef_ps(in_range, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // The low bits of t are the integer n: shifted, they add to the exponent of p. A NaN's bits are no number to add to.
  vf y = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(t) << 23));
  y = c * 0.f + y;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(y) & ~reinterpret_cast<vi>(under));
#endif
}
EVA02_INLINE vf vsigmoid(vf x) { return 1.f / (1.f + vexp(-x)); }

// The normal distribution: cdf(x) and its density, from one exponential. For x < 0,
//   cdf = exp(-x^2 / 2) / 2 * erfcx(-x / sqrt 2),  erfcx(t) = u p(u),  u = 1 / (1 + 0.37 t),
// p fitted for relative error 1.7e-8 on t <= 9.5; for x > 0, cdf = 1 - cdf(-x). Error of cdf: a few ulp, plus that of
// x^2 in the exponent far left; 0 under -13.2.
EVA02_INLINE void vnormal(vf x, vf& cdf, vf& density) {
  const vf e = vexp(x * x * -0.5f);
  const vf u = 1.f / (1.f + (x < 0.f ? -x : x) * 0.26162950903902256f);
  vf p = splat(0.06192336603999138f);
  p = p * u - 0.3032743036746979f;
  p = p * u + 0.48684436082839966f;
  p = p * u - 0.2853146493434906f;
  p = p * u + 0.3108038306236267f;
  p = p * u + 0.10651960223913193f;
  p = p * u + 0.20625421404838562f;
  p = p * u + 0.20742981135845184f;
  p = p * u + 0.20881374180316925f;
  const vf tail = 0.5f * e * (u * p);
  cdf = x < 0.f ? tail : 1.f - tail;
  density = e * 0.3989422804014327f;
}

}  // namespace eva02::EVA02_ISA
