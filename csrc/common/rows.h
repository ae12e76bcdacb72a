// What kernels that walk one row of C columns at a time share: column loops with a tail, parameters as float32,
// and sums over rows that do not depend on the number of threads.
#pragma once

#include "common/buffer.h"
#include "common/param.h"

#define EVA02_ALWAYS_INLINE __attribute__((always_inline))

namespace eva02::EVA02_ISA {

// A range given to a thread holds at least this many elements.
constexpr int64_t kRowGrainElements = 16384;
EVA02_INLINE int64_t row_grain(int64_t C) { return max64(1, kRowGrainElements / max64(1, C)); }

// ---- column loops ------------------------------------------------------------------------------------------------
// A vector of columns is either whole or the row's last `n` columns.
struct Whole {};
struct Tail {
  int64_t n;
};

template <class T>
EVA02_INLINE vf ld(const T* p, Whole) {
  return load(p);
}
template <class T>
EVA02_INLINE vf ld(const T* p, Tail t) {
  return load_partial(p, t.n);
}
template <class T>
EVA02_INLINE void st(T* p, vf v, Whole) {
  store(p, v);
}
template <class T>
EVA02_INLINE void st(T* p, vf v, Tail t) {
  store_partial(p, v, t.n);
}

// An output larger than a core's own caches, rows of float32, each aligned to a vector: storing it past them spares
// memory the reading of what is overwritten, a third of what a pass over rows moves.
constexpr int64_t kStreamedBytes = 2 << 20;
template <class T>
EVA02_INLINE bool is_streamed(const T* out, int64_t stride, int64_t rows, int64_t C) {
  constexpr int64_t kBytes = kLanes * 4;
  return sizeof(T) == 4 && out != nullptr && rows * C * 4 >= kStreamedBytes && stride * 4 % kBytes == 0 &&
         reinterpret_cast<uintptr_t>(out) % kBytes == 0;
}
EVA02_INLINE void st_streamed(float* p, vf v, Whole) { stream(p, v); }
template <class T, class Part>
EVA02_INLINE void st_streamed(T* p, vf v, Part part) {
  st(p, v, part);
}

EVA02_INLINE vf zero_tail(vf v, Whole) { return v; }
EVA02_INLINE vf zero_tail(vf v, Tail t) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(v) & (lane < static_cast<int32_t>(t.n)));
}

// f(first column, Whole or Tail, accumulator 0..3): the last argument names one of four independent accumulators, so
// that a sum is not bound by the latency of one addition.
template <class F>
EVA02_INLINE void columns(int64_t C, const F& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= C; i += 4 * kLanes) {
    f(i, Whole{}, 0);
    f(i + kLanes, Whole{}, 1);
    f(i + 2 * kLanes, Whole{}, 2);
    f(i + 3 * kLanes, Whole{}, 3);
  }
  for (; i + kLanes <= C; i += kLanes) f(i, Whole{}, 0);
  if (i < C) f(i, Tail{C - i}, 1);
}

struct Sum {
  vf part[4] = {};
  EVA02_INLINE void add(vf v, int a) { part[a] += v; }
  EVA02_INLINE float total() const { return hsum((part[0] + part[1]) + (part[2] + part[3])); }
};

// ---- rows of float32 ---------------------------------------------------------------------------------------------
// Columns of a Buffer's rows: whole vectors may be read and written past the last column.
EVA02_INLINE int64_t padded(int64_t C) { return ceil_div(C, 16) * 16; }

EVA02_INLINE void fill(float* p, int64_t n, float x) {
  for (int64_t i = 0; i < n; ++i) p[i] = x;
}

template <class T>
EVA02_INLINE void widen(float* out, const T* in, int64_t n) {
  columns(n, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE { st(out + i, ld(in + i, part), part); });
}

// A parameter as float32, padded; `absent` where there is none.
inline void load_param(float* out, const Param& param, int64_t C, float absent) {
  fill(out, padded(C), absent);
  if (param.data == nullptr) return;
  switch (param.dtype) {
    case DType::f32: return widen(out, static_cast<const float*>(param.data), C);
    case DType::bf16: return widen(out, static_cast<const bf16*>(param.data), C);
    case DType::f16: return widen(out, static_cast<const f16*>(param.data), C);
  }
}

// Row n of a (rows, C) parameter.
EVA02_INLINE Param row_of(const Param& param, int64_t n, int64_t C) {
  if (param.data == nullptr) return param;
  const int64_t bytes = n * C * (param.dtype == DType::f32 ? 4 : 2);
  return {.data = static_cast<const char*>(param.data) + bytes, .dtype = param.dtype};
}

template <class T>
EVA02_INLINE void narrow(T* out, const float* in, int64_t n) {
  columns(n, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE { st(out + i, ld(in + i, part), part); });
}

inline void store_param(const ParamGrad& grad, int64_t offset, const float* in, int64_t n) {
  switch (grad.dtype) {
    case DType::f32: return narrow(static_cast<float*>(grad.data) + offset, in, n);
    case DType::bf16: return narrow(static_cast<bf16*>(grad.data) + offset, in, n);
    case DType::f16: return narrow(static_cast<f16*>(grad.data) + offset, in, n);
  }
}

// ---- sums over rows ----------------------------------------------------------------------------------------------
// Rows are cut into at most 64 chunks by their number alone. Each chunk sums its rows into its own partial vector, and
// reduce() adds the partials in order: the same bits with any number of threads.
struct RowChunks {
  int64_t rows, rows_per_chunk, count;
  explicit RowChunks(int64_t rows, int64_t least_rows = 32)
      : rows(rows), rows_per_chunk(max64(least_rows, ceil_div(rows, 64))), count(ceil_div(rows, rows_per_chunk)) {}
  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const { return min64(rows, (chunk + 1) * rows_per_chunk); }
  int64_t grain(int64_t C) const { return ceil_div(row_grain(C), rows_per_chunk); }
};

// out[c] = sum over chunks of partials[chunk * stride + c]
inline void reduce(const ParamGrad& out, const float* partials, int64_t chunks, int64_t stride, int64_t C,
                   const Runtime& runtime) {
  if (out.data == nullptr) return;
  constexpr int64_t kBlock = 64;
  runtime.parallel_for(
      0, ceil_div(C, kBlock), max64(1, 32768 / (kBlock * max64(chunks, 1))), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kBlock, n = min64(kBlock, C - first);
          float sum[kBlock] = {};
          for (int64_t k = 0; k < chunks; ++k) {
            const float* p = partials + k * stride + first;
            columns(n, [&](int64_t i, auto part, int)
                           EVA02_ALWAYS_INLINE { st(sum + i, ld(sum + i, part) + ld(p + i, part), part); });
          }
          store_param(out, first, sum, n);
        }
      });
}

}  // namespace eva02::EVA02_ISA
