// rope_attention: out = softmax(scale R(q) R(k)^T + mask) v, with the rotation (and an optional RMS norm of every head
// before it) applied as q and k are packed, and undone as dq and dk are stored
// Fused     norm, rotation, prefix tokens, token selection, scores, softmax, product with v, casts (eager: four passes
//           over q and k for the rotation before attention starts)
// Bytes     moves q, k, v, out once each (4 B S H D elements), backward 8; scores exist for one tile only
// Launch    forward: one (sequence, key head, query block) after the other, cut into equal shares of multiplications,
// one
//           a thread; backward: one (sequence, key head, share of its queries) is an item and owns its dk and dv
// Numerics  float32 inside; scores in base 2, the scale folded into q; online softmax over key blocks of kKeys; every
//           sum has an order that depends on the shapes alone, no atomics: results do not depend on the threads
// Limits    last dim contiguous; D a multiple of 4, at most 256
// Source    original; Dao et al., arXiv:2205.14135 (tiles, recomputation), Milakov and Gimelshein, arXiv:1805.02867
//           (online softmax)
#include "common/buffer.h"
#include "common/rope.h"
#include "rope_attention/rope_attention.h"

namespace eva02::EVA02_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;
#if defined(__AVX512F__)
constexpr int kRows = 14;  // rows of a micro-kernel: 14 x 2 accumulators of 32 registers
#else
constexpr int kRows = 6;  // 6 x 2 of 16
#endif
constexpr int64_t kPanel = 2 * kLanes;  // columns of a micro-kernel
constexpr int64_t kKeys = 320;          // keys of a tile
// Tokens between the row that is read and the one that is asked for: rows of a head lie a token apart, further than
// hardware prefetchers follow.
constexpr int64_t kAhead = 16;
#if defined(__AVX512F__)
constexpr int64_t kFwdQueries = kRows;
constexpr int64_t kBwdQueries = 5 * kRows;
#else
constexpr int64_t kFwdQueries = 4 * kRows;
constexpr int64_t kBwdQueries = 11 * kRows;
#endif
// Distance of rows in a score tile and in a block of head rows: compile-time, so that a micro-kernel addresses all its
// rows from one register; an odd number of cache lines, so that rows don't share cache sets.
constexpr int64_t kTilePitch = kKeys + 16;
constexpr int64_t kRowPitch = kMaxHeadDim + 16;
static_assert(kKeys % kPanel == 0);
// Backward: with fewer (sequence, key head) pairs than kItemTarget, queries are split too, at least kPartQueries a
// part.
constexpr int64_t kItemTarget = 16;
constexpr int64_t kPartQueries = 128;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kInf = __builtin_inff();

EVA02_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// ---- micro-kernels -----------------------------------------------------------------------------------------------
// C (M x NV vectors, row stride ldc) = or += A (M x K, element (i, k) at a[i * AI + k * AK]) * B (K rows of BS floats)
template <int M, int NV, int AI, int AK, int BS>
__attribute__((noinline)) void micro(int64_t K, const float* a, const float* b, float* c, int64_t ldc, bool add) {
  vf acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = vf{};
  for (int64_t k = 0; k < K; ++k) {
    vf bv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf x = splat(a[i * AI]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(x, bv[j], acc[i][j]);
    }
    a += AK;
    b += BS;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * ldc + j * kLanes;
      store(at, add ? load(at) + acc[i][j] : acc[i][j]);
    }
}

template <int NV, int AI, int AK, int BS>
EVA02_INLINE void micro_rows(int64_t M, int64_t K, const float* a, const float* b, float* c, int64_t ldc, bool add) {
  switch (M) {
    case 1: return micro<1, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 2: return micro<2, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 3: return micro<3, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 4: return micro<4, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 5: return micro<5, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 6: return micro<6, NV, AI, AK, BS>(K, a, b, c, ldc, add);
#if defined(__AVX512F__)
    case 7: return micro<7, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 8: return micro<8, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 9: return micro<9, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 10: return micro<10, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 11: return micro<11, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 12: return micro<12, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 13: return micro<13, NV, AI, AK, BS>(K, a, b, c, ldc, add);
    case 14: return micro<14, NV, AI, AK, BS>(K, a, b, c, ldc, add);
#endif
  }
}

// M x N: B comes as panels of kPanel columns, panel_stride floats apart. M is cut into near-equal parts (257 rows are
// 19 parts of 13 or 14), N is rounded up to whole vectors.
template <int AI, int AK, int BS>
void product(int64_t M, int64_t N, int64_t K, const float* a, const float* b, int64_t panel_stride, float* c,
             int64_t ldc, bool add) {
  const int64_t parts = ceil_div(M, kRows);
  for (int64_t n = 0; n < N; n += kPanel, b += panel_stride, c += kPanel) {
    const bool wide = N - n > kLanes;
    for (int64_t part = 0, i = 0; part < parts; ++part) {
      const int64_t end = M * (part + 1) / parts;
      if (wide)
        micro_rows<2, AI, AK, BS>(end - i, K, a + i * AI, b, c + i * ldc, ldc, add);
      else
        micro_rows<1, AI, AK, BS>(end - i, K, a + i * AI, b, c + i * ldc, ldc, add);
      i = end;
    }
  }
}

// Head rows times packed keys: scores (K = D).
void rows_by_panels(int64_t M, int64_t N, int64_t D, const float* rows, const float* panels, float* tile) {
  product<kRowPitch, 1, kPanel>(M, N, D, rows, panels, D * kPanel, tile, kTilePitch, false);
}
// Tile times packed rows: out, dq (K = keys of the tile).
void tile_by_panels(int64_t M, int64_t D, int64_t keys, const float* tile, const float* panels, int64_t panel_stride,
                    float* c, int64_t ldc, bool add) {
  product<kTilePitch, 1, kPanel>(M, D, keys, tile, panels, panel_stride, c, ldc, add);
}
// Transposed tile times head rows, added to c: dk, dv (K = queries of the tile).
void tile_by_rows(int64_t keys, int64_t D, int64_t queries, const float* tile, const float* rows, float* c,
                  int64_t ldc) {
  product<1, kTilePitch, kRowPitch>(keys, D, queries, tile, rows, kPanel, c, ldc, true);
}

// ---- vectors -----------------------------------------------------------------------------------------------------
// 2^x for x <= 127, NaN stays NaN. x = n + f, |f| <= 1/2; degree-6 polynomial; n added to the exponent. Clamping at
// -127 gives exactly 0 (the bits of 1 less 127 exponents) for all that lies below, such as a masked score.
EVA02_INLINE vf vexp2(vf x) {
  const vf c = vmax(splat(-127.f), x);
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf t = c + magic;
  const vf f = c - (t - magic);
  vf p = splat(1.534581203e-4f);
  p = p * f + 1.339993136e-3f;
  p = p * f + 9.618488958e-3f;
  p = p * f + 5.550328777e-2f;
  p = p * f + 2.402264689e-1f;
  p = p * f + 6.931472057e-1f;
  p = p * f + 1.f;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(t) << 23));  // n: the low bits of t
}

// Reductions in registers: lanes are folded in halves.
#if defined(__AVX512F__)
#define EVA02_FOLD(v, op)                                                                         \
  v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
#define EVA02_FOLD(v, op)                                           \
  v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)); \
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)); \
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#define EVA02_FOLD(v, op)                               \
  v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1)); \
  v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
#endif
EVA02_INLINE vf vadd(vf a, vf b) { return a + b; }
EVA02_INLINE float fold_sum(vf v) {
  EVA02_FOLD(v, vadd)
  return v[0];
}
EVA02_INLINE float fold_max(vf v) {
  EVA02_FOLD(v, vmax)
  return v[0];
}
#undef EVA02_FOLD

// In place: r[i][j] <-> r[j][i].
EVA02_INLINE void transpose(vf* r) {
#if defined(__AVX512F__)
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512 a = reinterpret_cast<__m512>(r[i]), b = reinterpret_cast<__m512>(r[i + 1]);
    t[i] = _mm512_unpacklo_ps(a, b);
    t[i + 1] = _mm512_unpackhi_ps(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // u[4 q + c] holds column 4 l + c of rows 4 q .. 4 q + 3 in its 128-bit block l: now a 4 x 4 transpose of blocks.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88),
                 e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    r[c] = reinterpret_cast<vf>(_mm512_shuffle_f32x4(a, d, 0x88));
    r[4 + c] = reinterpret_cast<vf>(_mm512_shuffle_f32x4(b, e, 0x88));
    r[8 + c] = reinterpret_cast<vf>(_mm512_shuffle_f32x4(a, d, 0xdd));
    r[12 + c] = reinterpret_cast<vf>(_mm512_shuffle_f32x4(b, e, 0xdd));
  }
#elif defined(__AVX2__)
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = reinterpret_cast<__m256>(r[i]), b = reinterpret_cast<__m256>(r[i + 1]);
    t[i] = _mm256_unpacklo_ps(a, b);
    t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = reinterpret_cast<vf>(_mm256_permute2f128_ps(u[c], u[4 + c], 0x20));
    r[4 + c] = reinterpret_cast<vf>(_mm256_permute2f128_ps(u[c], u[4 + c], 0x31));
  }
#else
  const vf a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const vf c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

template <class T>
EVA02_INLINE vf load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_partial(p, n);
}
template <class T>
EVA02_INLINE void store_some(T* p, vf v, int64_t n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_partial(p, v, n);
}

EVA02_INLINE void clear(float* p, int64_t floats) { memset(p, 0, static_cast<size_t>(floats) * sizeof(float)); }

// ---- head rows ---------------------------------------------------------------------------------------------------
template <class Src, class Dst>
EVA02_INLINE void scale_row(const Src* src, int64_t D, float mul, Dst* dst) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) store(dst + i, load(src + i) * mul);
  if (i < D) store_partial(dst + i, load_partial(src + i, D - i) * mul, D - i);
}

template <class A, class B>
EVA02_INLINE float dot_row(const A* a, const B* b, int64_t D) {
  vf sum{};
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  if (i < D) sum = fma(load_partial(a + i, D - i), load_partial(b + i, D - i), sum);
  return fold_sum(sum);
}

void load_param(const Param& param, int64_t D, float* dst) {
  switch (param.dtype) {
    case DType::f32: return scale_row(static_cast<const float*>(param.data), D, 1.f, dst);
    case DType::bf16: return scale_row(static_cast<const bf16*>(param.data), D, 1.f, dst);
    case DType::f16: return scale_row(static_cast<const f16*>(param.data), D, 1.f, dst);
  }
}

void store_param_grad(const ParamGrad& grad, int64_t D, const float* src) {
  switch (grad.dtype) {
    case DType::f32: return scale_row(src, D, 1.f, static_cast<float*>(grad.data));
    case DType::bf16: return scale_row(src, D, 1.f, static_cast<bf16*>(grad.data));
    case DType::f16: return scale_row(src, D, 1.f, static_cast<f16*>(grad.data));
  }
}

// What happens to a row of q or k before the scores.
struct HeadTransform {
  int64_t D;
  bool interleaved;
  const float* weight;  // of the norm, or nullptr
  float eps;
};

template <class T>
EVA02_INLINE float row_rstd(const HeadTransform& f, const T* x) {
  return 1.f / __builtin_sqrtf(dot_row(x, x, f.D) / static_cast<float>(f.D) + f.eps);
}

// x * rstd * weight
template <class T>
EVA02_INLINE void normalise_row(const HeadTransform& f, const T* x, float rstd, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= f.D; i += kLanes) store(dst + i, load(x + i) * rstd * load(f.weight + i));
  if (i < f.D) {
    const int64_t n = f.D - i;
    store_partial(dst + i, load_partial(x + i, n) * rstd * load_partial(f.weight + i, n), n);
  }
}

// dst = mul * R(norm(x)); cs nullptr: no rotation.
template <class T>
EVA02_INLINE void transform_row(const HeadTransform& f, const T* x, const float* cs, float mul, float* dst) {
  if (f.weight) {
    alignas(64) float normed[kMaxHeadDim];
    normalise_row(f, x, row_rstd(f, x), normed);
    if (cs)
      rope_rotate<false>(f.interleaved, normed, cs, f.D, mul, dst);
    else
      scale_row(normed, f.D, mul, dst);
  } else if (cs) {
    rope_rotate<false>(f.interleaved, x, cs, f.D, mul, dst);
  } else {
    scale_row(x, f.D, mul, dst);
  }
}

// dx from mul * g, the gradient of the transformed row; also adds this row's share of the gradients of the angles (D/2
// cosines, then D/2 sines) and of the norm's weight. dx, angles, dweight may be nullptr.
template <class T>
EVA02_INLINE void transform_row_grad(const HeadTransform& f, const T* x, const float* cs, const float* g, float mul,
                                     T* dx, float* angles, float* dweight) {
  if (!f.weight && !angles) {
    if (!dx) return;
    if (cs)
      rope_rotate<true>(f.interleaved, g, cs, f.D, mul, dx);
    else
      scale_row(g, f.D, mul, dx);
    return;
  }
  alignas(64) float normed[kMaxHeadDim], dy[kMaxHeadDim];
  const float rstd = f.weight ? row_rstd(f, x) : 1.f;
  if (f.weight)
    normalise_row(f, x, rstd, normed);
  else
    scale_row(x, f.D, 1.f, normed);
  if (angles) rope_add_table_grad(f.interleaved, normed, g, f.D, mul, angles, angles + f.D / 2);
  if (cs)
    rope_rotate<true>(f.interleaved, g, cs, f.D, mul, dy);
  else
    scale_row(g, f.D, mul, dy);
  if (!f.weight) {
    if (dx) scale_row(dy, f.D, 1.f, dx);
    return;
  }
  // y = x rstd w: with c = mean(dy y), dx = rstd (dy w - x rstd c), dw += dy x rstd
  const float c = dot_row(dy, normed, f.D) / static_cast<float>(f.D);
  const auto step = [&](int64_t i, int64_t n) {
    const vf xh = load_some(x + i, n) * rstd, d = load_some(dy + i, n);
    if (dx) store_some(dx + i, (d * load_some(f.weight + i, n) - xh * c) * rstd, n);
    if (dweight) store_some(dweight + i, load_some(dweight + i, n) + d * xh, n);
  };
  for (int64_t i = 0; i < f.D; i += kLanes) step(i, min64(kLanes, f.D - i));
}

// ---- packing -----------------------------------------------------------------------------------------------------
// Writes kLanes head rows (n of them valid, the others zero or stale but finite) as columns `key` .. of transposed
// panels: panel (key / kPanel) holds D rows of kPanel keys.
void pack_columns(const float* rows, int64_t D, int64_t key, float* panels) {
  float* at = panels + key / kPanel * D * kPanel + key % kPanel;
  for (int64_t d = 0; d < D; d += kLanes) {
    vf r[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = load(rows + i * kRowPitch + d);
    transpose(r);
    const int64_t n = min64(kLanes, D - d);
    if (n == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(at + (d + i) * kPanel, r[i]);
    } else {
      for (int i = 0; i < n; ++i) store(at + (d + i) * kPanel, r[i]);
    }
  }
}

// Writes one head row into panels of kPanel channels: panel p holds S rows.
template <class T>
EVA02_INLINE void pack_row(const T* row, int64_t D, int64_t S, int64_t key, float* panels) {
  for (int64_t d = 0; d < D; d += kLanes) {
    float* at = panels + (d / kPanel * S + key) * kPanel + d % kPanel;
    store(at, D - d >= kLanes ? load(row + d) : load_partial(row + d, D - d));
  }
}

// ---- the call as a whole -----------------------------------------------------------------------------------------
struct Sequence {
  int64_t b, first, length;  // first: offset of its first token in a varlen buffer
};

struct Call {
  const RopeAttentionParams& p;
  int64_t group;     // query heads of a key head
  int64_t longest;   // sequence
  int64_t channels;  // D rounded up to whole vectors
  int64_t channel_panels;
  HeadTransform q_rows, k_rows;
  alignas(64) float q_weight[kMaxHeadDim], k_weight[kMaxHeadDim];

  explicit Call(const RopeAttentionParams& params) : p(params) {
    group = p.Hkv > 0 ? p.H / p.Hkv : 0;
    channels = round_up(p.D, kLanes);
    channel_panels = ceil_div(p.D, kPanel);
    longest = 0;
    for (int64_t b = 0; b < p.B; ++b) longest = max64(longest, sequence(b).length);
    if (p.q_norm.data) load_param(p.q_norm, p.D, q_weight);
    if (p.k_norm.data) load_param(p.k_norm, p.D, k_weight);
    q_rows = {p.D, p.rope.interleaved, p.q_norm.data ? q_weight : nullptr, p.norm_eps};
    k_rows = {p.D, p.rope.interleaved, p.k_norm.data ? k_weight : nullptr, p.norm_eps};
  }

  Sequence sequence(int64_t b) const {
    if (!p.cu_seqlens) return {b, 0, p.S};
    return {b, p.cu_seqlens[b], p.cu_seqlens[b + 1] - p.cu_seqlens[b]};
  }
  template <class T>
  T* row(const HeadTensor& x, const Sequence& s, int64_t t, int64_t h) const {
    return static_cast<T*>(x.data) + s.b * x.batch + (s.first + t) * x.token + h * x.head;
  }
  float* lse(const Sequence& s, int64_t h) const {
    return p.lse + (p.cu_seqlens ? h * p.S + s.first : (s.b * p.H + h) * p.S);
  }
  int64_t total_tokens() const { return p.cu_seqlens ? p.S : p.B * p.S; }
  int64_t token(const Sequence& s, int64_t t) const { return (p.cu_seqlens ? s.first : s.b * p.S) + t; }
};

// Cuts the items of all sequences (count(b) items of cost(b) each) into `slots` shares of near-equal cost and calls
// fn(sequence, item) for those of one share, in order.
template <class Count, class Cost, class F>
EVA02_INLINE void for_share(const Call& call, int64_t slot, int64_t slots, const Count& count, const Cost& cost,
                            const F& fn) {
  int64_t total = 0;
  for (int64_t b = 0; b < call.p.B; ++b) {
    const Sequence s = call.sequence(b);
    total += count(s) * cost(s);
  }
  const int64_t low = total / slots * slot + total % slots * slot / slots;
  const int64_t high = total / slots * (slot + 1) + total % slots * (slot + 1) / slots;
  int64_t start = 0;
  for (int64_t b = 0; b < call.p.B && start < high; ++b) {
    const Sequence s = call.sequence(b);
    const int64_t n = count(s), c = cost(s);
    if (n == 0) continue;
    const int64_t first = low > start ? ceil_div(low - start, c) : 0;
    const int64_t last = min64(n, ceil_div(high - start, c));
    for (int64_t i = first; i < last; ++i) fn(s, i);
    start += n * c;
  }
}

// A thread's share of the workspace, handed out front to back. Every piece starts on a cache line.
struct Arena {
  float* at;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* p = at ? at + used : nullptr;
    used += round_up(floats, 16);
    return p;
  }
};

// The expanded angles of every token of a sequence, kept while sequences (and heads) share them.
struct Angles {
  float* cs = nullptr;  // (longest, 2 D), or nullptr: no rotation
  int64_t b = -1, h = -1;

  void take(const Call& call, Arena& arena) {
    if (call.p.rope.form != RopeForm::none) cs = arena.take(call.longest * 2 * call.p.D);
  }
  void prepare(const Call& call, const Sequence& s, int64_t head) {
    const RopeTable& rope = call.p.rope;
    if (rope.form == RopeForm::none) return;
    const bool all = rope_same_for_all_sequences(rope);
    if (b >= 0 && (all || b == s.b) && (h == head || rope_same_for_all_heads(rope))) return;
    b = s.b;
    h = head;
    const int64_t n = all ? call.longest : s.length;
    for (int64_t t = 0; t < n; ++t) rope_expand(rope, s.b, t, head, cs + t * 2 * rope.head_dim);
  }
  const float* of(const Call& call, int64_t t) const { return cs ? cs + t * 2 * call.p.D : nullptr; }
};

// 0 for a key to attend to, -inf for the others and past the end.
struct KeyBias {
  float* bias = nullptr;

  void take(const Call& call, Arena& arena) {
    if (call.p.key_mask) bias = arena.take(round_up(call.longest, kPanel));
  }
  void prepare(const Call& call, const Sequence& s) {
    if (!bias) return;
    const bool* mask = call.p.key_mask + s.b * call.p.S;
    for (int64_t t = 0; t < round_up(s.length, kPanel); ++t) bias[t] = t < s.length && mask[t] ? 0.f : -kInf;
  }
};

// Transforms the rows of q that start at t into a block.
template <class T>
void load_queries(const Call& call, const Angles& angles, const Sequence& s, int64_t t, int64_t n, int64_t h,
                  float* rows) {
  const float mul = call.p.scale * kLog2e;
  for (int64_t i = 0; i < n; ++i)
    transform_row(call.q_rows, call.row<const T>(call.p.q, s, t + i, h), angles.of(call, t + i), mul,
                  rows + i * kRowPitch);
}

// k transformed, transposed (for scores) and, if `by_row`, also as rows (for dq).
template <class T>
void pack_keys(const Call& call, const Angles& angles, const Sequence& s, int64_t h, float* rows, float* columns,
               float* by_row) {
  for (int64_t t = 0; t < s.length; t += kLanes) {
    const int64_t n = min64(kLanes, s.length - t);
    for (int64_t i = 0; i < n; ++i) {
      float* row = rows + i * kRowPitch;
      prefetch<For::load>(call.row<const T>(call.p.k, s, min64(t + i + kAhead, s.length - 1), h), call.p.D);
      transform_row(call.k_rows, call.row<const T>(call.p.k, s, t + i, h), angles.of(call, t + i), 1.f, row);
      if (by_row) pack_row(row, call.p.D, s.length, t + i, by_row);
    }
    pack_columns(rows, call.p.D, t, columns);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------
// The largest of one row's first `limit` scores, -inf in the rest of their last vector; `bias` is added.
EVA02_INLINE float max_of_row(float* s, const float* bias, int64_t limit) {
  const int64_t vectors = ceil_div(limit, kLanes) * kLanes;
  if (limit % kLanes != 0) {
    float* tail = s + vectors - kLanes;
    for (int64_t i = limit - (vectors - kLanes); i < kLanes; ++i) tail[i] = -kInf;
  }
  vf m0 = splat(-kInf), m1 = m0;
  int64_t j = 0;
  if (bias) {
    for (; j < vectors; j += kLanes) {
      const vf x = load(s + j) + load(bias + j);
      store(s + j, x);
      m0 = vmax(x, m0);
    }
  } else {
    for (; j + 2 * kLanes <= vectors; j += 2 * kLanes) {
      m0 = vmax(load(s + j), m0);
      m1 = vmax(load(s + j + kLanes), m1);
    }
    if (j < vectors) m0 = vmax(load(s + j), m0);
  }
  return fold_max(vmax(m0, m1));
}

// Scores -> 2^(score - max), zeros from `limit` up to `keys`; returns their sum. A row whose max is -inf has none.
EVA02_INLINE float exponentials_of_row(float* s, float max, int64_t limit, int64_t keys) {
  const int64_t vectors = max == -kInf ? 0 : ceil_div(limit, kLanes) * kLanes;
  const vf base = splat(max);
  vf sum0{}, sum1{};
  int64_t j = 0;
  for (; j + 2 * kLanes <= vectors; j += 2 * kLanes) {
    const vf a = vexp2(load(s + j) - base), b = vexp2(load(s + j + kLanes) - base);
    store(s + j, a);
    store(s + j + kLanes, b);
    sum0 += a;
    sum1 += b;
  }
  if (j < vectors) {
    const vf a = vexp2(load(s + j) - base);
    store(s + j, a);
    sum0 += a;
  }
  for (j = vectors; j < keys; j += kLanes) store(s + j, vf{});
  return fold_sum(sum0 + sum1);
}

struct FwdScratch {
  Angles angles;
  KeyBias bias;
  float *keys, *values, *rows, *tile, *acc;

  FwdScratch(const Call& call, Arena& arena) {
    const int64_t S = call.longest;
    keys = arena.take(round_up(S, kPanel) * call.p.D);
    values = arena.take(call.channel_panels * kPanel * S);
    rows = arena.take(max64(kLanes, kFwdQueries) * kRowPitch);
    tile = arena.take(kFwdQueries * kTilePitch);
    acc = arena.take(kFwdQueries * call.channel_panels * kPanel);
    angles.take(call, arena);
    bias.take(call, arena);
  }
};

// Queries [t, t + n) of head h against all keys.
template <class T>
void attend(const Call& call, const FwdScratch& w, const Sequence& s, int64_t t, int64_t n, int64_t h) {
  const RopeAttentionParams& p = call.p;
  const int64_t D = p.D, ldc = call.channel_panels * kPanel;
  load_queries<T>(call, w.angles, s, t, n, h, w.rows);
  for (int64_t i = t + n; i < min64(t + 2 * n, s.length); ++i) prefetch<For::load>(call.row<const T>(p.q, s, i, h), D);
  float max[kFwdQueries], sum[kFwdQueries];
  for (int64_t i = 0; i < n; ++i) {
    max[i] = -kInf;
    sum[i] = 0.f;
  }
  const int64_t visible = p.causal ? t + n : s.length;
  const int64_t blocks = ceil_div(visible, kKeys);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = min64(visible, round_up(ceil_div(visible * (block + 1), blocks), kPanel));
    const int64_t keys = end - first;
    rows_by_panels(n, keys, D, w.rows, w.keys + first * D, w.tile);
    // All maxima before the exponentials: each ends in a chain of shuffles, which rows after it hide.
    float factor[kFwdQueries];
    const auto limit = [&](int64_t i) { return p.causal ? max64(0, min64(keys, t + i + 1 - first)) : keys; };
    for (int64_t i = 0; i < n; ++i) {
      const float here = max_of_row(w.tile + i * kTilePitch, w.bias.bias ? w.bias.bias + first : nullptr, limit(i));
      factor[i] = here > max[i] && max[i] != -kInf ? __builtin_exp2f(max[i] - here) : 1.f;
      max[i] = here > max[i] ? here : max[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = sum[i] * factor[i] + exponentials_of_row(w.tile + i * kTilePitch, max[i], limit(i), keys);
      if (block > 0 && factor[i] != 1.f) {
        float* acc = w.acc + i * ldc;
        for (int64_t d = 0; d < call.channels; d += kLanes) store(acc + d, load(acc + d) * factor[i]);
      }
    }
    tile_by_panels(n, D, keys, w.tile, w.values + first * kPanel, s.length * kPanel, w.acc, ldc, block > 0);
    first = end;
  }
  float* lse = call.lse(s, h) + t;
  for (int64_t i = 0; i < n; ++i) {
    const bool none = max[i] == -kInf;
    scale_row(w.acc + i * ldc, D, none ? 0.f : 1.f / sum[i], call.row<T>(p.out, s, t + i, h));
    lse[i] = none ? -kInf : max[i] * kLn2 + __builtin_logf(sum[i]);
  }
}

template <class T>
void attention_fwd(const RopeAttentionParams& p, const Runtime& runtime) {
  const Call call(p);
  const auto blocks = [&](const Sequence& s) { return ceil_div(s.length, kFwdQueries); };
  const auto count = [&](const Sequence& s) { return p.H * blocks(s); };
  const auto cost = [&](const Sequence& s) { return s.length; };
  int64_t items = 0;
  for (int64_t b = 0; b < p.B; ++b) items += count(call.sequence(b));
  if (items == 0) return;
  const int64_t slots = min64(runtime.num_threads, items);
  Arena size{nullptr};
  FwdScratch(call, size);
  const Buffer workspace(size.used * slots);
  runtime.parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      Arena arena{workspace + slot * size.used};
      FwdScratch w(call, arena);
      clear(w.rows, max64(kLanes, kFwdQueries) * kRowPitch);
      int64_t packed_b = -1, packed_h = -1;
      for_share(call, slot, slots, count, cost, [&](const Sequence& s, int64_t item) {
        const int64_t nb = blocks(s), h = item / nb, block = item % nb, kv = h / call.group;
        if (s.b != packed_b || kv != packed_h) {
          w.angles.prepare(call, s, kv);
          if (s.b != packed_b) w.bias.prepare(call, s);
          pack_keys<T>(call, w.angles, s, kv, w.rows, w.keys, nullptr);
          for (int64_t t = 0; t < s.length; ++t) {
            prefetch<For::load>(call.row<const T>(p.v, s, min64(t + kAhead, s.length - 1), kv), p.D);
            pack_row(call.row<const T>(p.v, s, t, kv), p.D, s.length, t, w.values);
          }
          packed_b = s.b;
          packed_h = kv;
        }
        const int64_t t = s.length * block / nb;
        attend<T>(call, w, s, t, s.length * (block + 1) / nb - t, h);
      });
    }
  });
}

// ---- backward ----------------------------------------------------------------------------------------------------
// One row of the tiles: scores -> p = 2^(score - lse), dp -> p * (dp - delta), zeros from `limit` to `keys`.
EVA02_INLINE void softmax_grad_row(float* s, float* dp, const float* bias, int64_t limit, int64_t keys, float lse,
                                   float delta) {
  const int64_t vectors = ceil_div(limit, kLanes) * kLanes;
  int64_t j = 0;
  for (; j < vectors; j += kLanes) {
    vf x = load(s + j) - lse;
    if (bias) x += load(bias + j);
    const vf y = vexp2(x);
    store(s + j, y);
    store(dp + j, y * (load(dp + j) - delta));
  }
  for (j = limit; j < min64(vectors, keys); ++j) s[j] = dp[j] = 0.f;
  for (j = vectors; j < keys; j += kLanes) {
    store(s + j, vf{});
    store(dp + j, vf{});
  }
}

struct BwdWants {
  bool q, k, v;  // whether gradients that come from dq, dk, dv are wanted
};

struct BwdScratch {
  Angles angles;
  KeyBias bias;
  float *key_columns, *key_rows, *value_columns, *rows, *drows, *scores, *dscores, *dq, *dk, *dv;

  BwdScratch(const Call& call, Arena& arena) {
    const int64_t S = call.longest, columns = round_up(S, kPanel) * call.p.D, wide = call.channel_panels * kPanel;
    key_columns = arena.take(columns);
    key_rows = arena.take(wide * S);
    value_columns = arena.take(columns);
    rows = arena.take(max64(kLanes, kBwdQueries) * kRowPitch);
    drows = arena.take(max64(kLanes, kBwdQueries) * kRowPitch);
    scores = arena.take(kBwdQueries * kTilePitch);
    dscores = arena.take(kBwdQueries * kTilePitch);
    dq = arena.take(kBwdQueries * wide);
    dk = arena.take(S * wide);
    dv = arena.take(S * wide);
    angles.take(call, arena);
    bias.take(call, arena);
  }
};

// Sums that several items add to: each item writes its own part, the parts are added in order afterwards.
struct BwdPartials {
  int64_t parts;                               // items of one (sequence, key head)
  float *dk = nullptr, *dv = nullptr;          // (parts, Hkv, tokens, wide), only with parts > 1
  float* angles = nullptr;                     // (parts, Hkv, tokens, D)
  float *q_norm = nullptr, *k_norm = nullptr;  // (parts, Hkv, B, D)
};

template <class T>
void attend_grad(const Call& call, const BwdScratch& w, const BwdWants& want, const Sequence& s, int64_t t, int64_t n,
                 int64_t h, float* angles, float* dq_norm) {
  const RopeAttentionParams& p = call.p;
  const int64_t D = p.D, wide = call.channel_panels * kPanel;
  load_queries<T>(call, w.angles, s, t, n, h, w.rows);
  float lse[kBwdQueries], delta[kBwdQueries];
  for (int64_t i = 0; i < n; ++i) {
    const T* dout = call.row<const T>(p.dout, s, t + i, h);
    scale_row(dout, D, 1.f, w.drows + i * kRowPitch);
    delta[i] = dot_row(dout, call.row<const T>(p.out, s, t + i, h), D);
    const float l = call.lse(s, h)[t + i];
    lse[i] = l == -kInf ? kInf : l * kLog2e;  // a row without keys: every p is 0
  }
  const int64_t visible = p.causal ? t + n : s.length;
  const int64_t blocks = ceil_div(visible, kKeys);
  int64_t first = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = min64(visible, round_up(ceil_div(visible * (block + 1), blocks), kPanel));
    const int64_t keys = end - first;
    rows_by_panels(n, keys, D, w.rows, w.key_columns + first * D, w.scores);
    rows_by_panels(n, keys, D, w.drows, w.value_columns + first * D, w.dscores);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t limit = p.causal ? max64(0, min64(keys, t + i + 1 - first)) : keys;
      softmax_grad_row(w.scores + i * kTilePitch, w.dscores + i * kTilePitch,
                       w.bias.bias ? w.bias.bias + first : nullptr, limit, keys, lse[i], delta[i]);
    }
    if (want.v) tile_by_rows(keys, D, n, w.scores, w.drows, w.dv + first * wide, wide);
    if (want.k) tile_by_rows(keys, D, n, w.dscores, w.rows, w.dk + first * wide, wide);
    if (want.q)
      tile_by_panels(n, D, keys, w.dscores, w.key_rows + first * kPanel, s.length * kPanel, w.dq, wide, block > 0);
    first = end;
  }
  if (!want.q) return;
  for (int64_t i = 0; i < n; ++i)
    transform_row_grad<T>(call.q_rows, call.row<const T>(p.q, s, t + i, h), w.angles.of(call, t + i), w.dq + i * wide,
                          p.scale, p.dq.data ? call.row<T>(p.dq, s, t + i, h) : nullptr,
                          angles ? angles + (t + i) * D : nullptr, dq_norm);
}

// Stores dk and dv of one (sequence, key head). dk was summed against q * scale * log2(e).
template <class T>
void store_key_grads(const Call& call, const Angles& angles, const Sequence& s, int64_t kv, const float* dk,
                     const float* dv, bool want_k, float* angle_grads, float* dk_norm) {
  const RopeAttentionParams& p = call.p;
  const int64_t D = p.D, wide = call.channel_panels * kPanel;
  for (int64_t t = 0; t < s.length; ++t) {
    if (want_k)
      transform_row_grad<T>(call.k_rows, call.row<const T>(p.k, s, t, kv), angles.of(call, t), dk + t * wide, kLn2,
                            p.dk.data ? call.row<T>(p.dk, s, t, kv) : nullptr,
                            angle_grads ? angle_grads + t * D : nullptr, dk_norm);
    if (p.dv.data) scale_row(dv + t * wide, D, 1.f, call.row<T>(p.dv, s, t, kv));
  }
}

// Adds the parts of the angles' gradients, in order; a thread owns a range of patches.
void reduce_angles(const Call& call, const BwdPartials& partials, const Runtime& runtime) {
  const RopeAttentionParams& p = call.p;
  const RopeTable& rope = p.rope;
  const int64_t half = p.D / 2, tokens = call.total_tokens();
  const int64_t tables = rope.form == RopeForm::dense_head ? p.Hkv : rope.form == RopeForm::dense_batch ? p.B : 1;
  const int64_t work = max64(1, p.B * p.Hkv * p.D);
  runtime.parallel_for(0, rope.rows, max64(1, 32768 / work), [&](int64_t begin, int64_t end) {
    for (int64_t table = 0; table < tables; ++table) {
      const int64_t at = table * rope.table_stride + begin * half;
      clear(p.dcos + at, (end - begin) * half);
      clear(p.dsin + at, (end - begin) * half);
    }
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s = call.sequence(b);
      // Without keep_idx a patch is one token: no need to look at the others.
      const int64_t from = rope.keep_idx ? rope.num_prefix : min64(s.length, rope.num_prefix + begin);
      const int64_t to = rope.keep_idx ? s.length : min64(s.length, rope.num_prefix + end);
      for (int64_t t = from; t < to; ++t) {
        const int64_t patch = rope_patch(rope, b, t);
        if (patch < begin || patch >= end) continue;
        for (int64_t kv = 0; kv < p.Hkv; ++kv) {
          const int64_t table = rope.form == RopeForm::dense_head ? kv : rope.form == RopeForm::dense_batch ? b : 0;
          float *dcos = p.dcos + table * rope.table_stride + patch * half,
                *dsin = p.dsin + table * rope.table_stride + patch * half;
          for (int64_t part = 0; part < partials.parts; ++part) {
            const float* g = partials.angles + ((part * p.Hkv + kv) * tokens + call.token(s, t)) * p.D;
            for (int64_t j = 0; j < half; ++j) {
              dcos[j] += g[j];
              dsin[j] += g[half + j];
            }
          }
        }
      }
    }
  });
}

void reduce_norm(const ParamGrad& grad, const float* parts, int64_t count, int64_t D) {
  if (!grad.data) return;
  alignas(64) float sum[kMaxHeadDim] = {};
  for (int64_t part = 0; part < count; ++part)
    for (int64_t d = 0; d < D; ++d) sum[d] += parts[part * D + d];
  store_param_grad(grad, D, sum);
}

template <class T>
void attention_bwd(const RopeAttentionParams& p, const Runtime& runtime) {
  const Call call(p);
  const BwdWants want{p.dq.data || p.dcos || p.dq_norm.data, p.dk.data || p.dcos || p.dk_norm.data,
                      p.dv.data != nullptr};
  const int64_t wide = call.channel_panels * kPanel, tokens = call.total_tokens();
  // An item is a (sequence, key head), or where there are few of these a share of its queries: as many as the shapes
  // say, never the threads, since the number of parts decides the order of the sums.
  const int64_t heads = p.B * p.Hkv;
  const int64_t queries = call.group * call.longest;
  BwdPartials partials;
  partials.parts = heads == 0 ? 1 : max64(1, min64(ceil_div(kItemTarget, heads), queries / kPartQueries));
  const int64_t parts = partials.parts;

  const int64_t accumulator_floats = parts > 1 ? parts * p.Hkv * tokens * wide : 0;
  const int64_t angle_floats = p.dcos ? parts * p.Hkv * tokens * p.D : 0;
  const int64_t norm_floats = parts * heads * p.D;
  const Buffer shared(2 * accumulator_floats + angle_floats + (p.dq_norm.data ? norm_floats : 0) +
                      (p.dk_norm.data ? norm_floats : 0));
  float* next = shared;
  const auto take = [&](bool wanted, int64_t floats) {
    float* at = next;
    if (wanted) next += floats;
    return wanted ? at : nullptr;
  };
  partials.dk = take(parts > 1, accumulator_floats);
  partials.dv = take(parts > 1, accumulator_floats);
  partials.angles = take(p.dcos != nullptr, angle_floats);
  partials.q_norm = take(p.dq_norm.data != nullptr, norm_floats);
  partials.k_norm = take(p.dk_norm.data != nullptr, norm_floats);

  const auto blocks = [&](const Sequence& s) { return ceil_div(s.length, kBwdQueries); };
  const auto count = [&](const Sequence& s) { return s.length == 0 ? 0 : p.Hkv * parts; };
  const auto cost = [&](const Sequence& s) { return s.length * s.length; };
  const auto norm_part = [&](float* base, int64_t part, int64_t kv, const Sequence& s) {
    return base ? base + ((part * p.Hkv + kv) * p.B + s.b) * p.D : nullptr;
  };
  const auto token_part = [&](float* base, int64_t part, int64_t kv, const Sequence& s, int64_t width) {
    return base ? base + ((part * p.Hkv + kv) * tokens + call.token(s, 0)) * width : nullptr;
  };
  if (partials.q_norm) clear(partials.q_norm, norm_floats);
  if (partials.k_norm) clear(partials.k_norm, norm_floats);

  int64_t items = 0;
  for (int64_t b = 0; b < p.B; ++b) items += count(call.sequence(b));
  const int64_t slots = min64(runtime.num_threads, items);
  Arena size{nullptr};
  BwdScratch(call, size);
  const Buffer workspace(size.used * slots);
  runtime.parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      Arena arena{workspace + slot * size.used};
      BwdScratch w(call, arena);
      clear(w.rows, max64(kLanes, kBwdQueries) * kRowPitch);
      clear(w.drows, max64(kLanes, kBwdQueries) * kRowPitch);
      int64_t bias_b = -1;
      for_share(call, slot, slots, count, cost, [&](const Sequence& s, int64_t item) {
        const int64_t kv = item / parts, part = item % parts;
        w.angles.prepare(call, s, kv);
        if (bias_b != s.b) w.bias.prepare(call, s);
        bias_b = s.b;
        pack_keys<T>(call, w.angles, s, kv, w.rows, w.key_columns, want.q ? w.key_rows : nullptr);
        for (int64_t t = 0; t < s.length; t += kLanes) {
          for (int64_t i = 0; i < min64(kLanes, s.length - t); ++i)
            scale_row(call.row<const T>(p.v, s, t + i, kv), p.D, 1.f, w.drows + i * kRowPitch);
          pack_columns(w.drows, p.D, t, w.value_columns);
        }
        float* dk = parts > 1 ? token_part(partials.dk, part, kv, s, wide) : w.dk;
        float* dv = parts > 1 ? token_part(partials.dv, part, kv, s, wide) : w.dv;
        BwdScratch here = w;
        here.dk = dk;
        here.dv = dv;
        clear(dk, s.length * wide);
        clear(dv, s.length * wide);
        float* angles = token_part(partials.angles, part, kv, s, p.D);
        if (angles) clear(angles, s.length * p.D);
        const int64_t all = call.group * blocks(s);
        for (int64_t block = all * part / parts; block < all * (part + 1) / parts; ++block) {
          const int64_t h = kv * call.group + block / blocks(s), i = block % blocks(s);
          const int64_t t = s.length * i / blocks(s);
          attend_grad<T>(call, here, want, s, t, s.length * (i + 1) / blocks(s) - t, h, angles,
                         norm_part(partials.q_norm, part, kv, s));
        }
        if (parts == 1)
          store_key_grads<T>(call, w.angles, s, kv, dk, dv, want.k, angles, norm_part(partials.k_norm, 0, kv, s));
      });
    }
  });

  if (parts > 1 && (want.k || want.v)) {
    runtime.parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        Arena arena{workspace + slot * size.used};
        BwdScratch w(call, arena);
        for_share(
            call, slot, slots, [&](const Sequence& s) { return s.length == 0 ? 0 : p.Hkv; }, cost,
            [&](const Sequence& s, int64_t kv) {
              float *dk = token_part(partials.dk, 0, kv, s, wide), *dv = token_part(partials.dv, 0, kv, s, wide);
              for (int64_t part = 1; part < parts; ++part) {
                const float *k = token_part(partials.dk, part, kv, s, wide),
                            *v = token_part(partials.dv, part, kv, s, wide);
                for (int64_t i = 0; i < s.length * wide; i += kLanes) {
                  store(dk + i, load(dk + i) + load(k + i));
                  store(dv + i, load(dv + i) + load(v + i));
                }
              }
              w.angles.prepare(call, s, kv);
              store_key_grads<T>(call, w.angles, s, kv, dk, dv, want.k, token_part(partials.angles, 0, kv, s, p.D),
                                 norm_part(partials.k_norm, 0, kv, s));
            });
      }
    });
  }
  if (p.dcos) reduce_angles(call, partials, runtime);
  reduce_norm(p.dq_norm, partials.q_norm, parts * heads, p.D);
  reduce_norm(p.dk_norm, partials.k_norm, parts * heads, p.D);
}

}  // namespace

void run_rope_attention_fwd(const RopeAttentionParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return attention_fwd<float>(p, runtime);
    case DType::bf16: return attention_fwd<bf16>(p, runtime);
    case DType::f16: return attention_fwd<f16>(p, runtime);
  }
}

void run_rope_attention_bwd(const RopeAttentionParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return attention_bwd<float>(p, runtime);
    case DType::bf16: return attention_bwd<bf16>(p, runtime);
    case DType::f16: return attention_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
