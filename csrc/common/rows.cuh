// What CUDA kernels that hold whole rows in registers share: a CTA takes a row at a time, a thread kItems of its
// columns in packs of W, pack j of thread t being pack j * blockDim + t of the row, so that a warp's accesses are
// contiguous.
#pragma once

#include "common/launch.cuh"
#include "common/param.h"
#include "common/token_index.h"

namespace eva02::cuda {

constexpr int kItems = 8;
constexpr int kMaxRowThreads = 512;  // of 128 registers; backward kernels do not fit into the 64 that 1024 would have
constexpr int kMaxColumns = kItems * kMaxRowThreads;
inline constexpr char kRowTooWide[] = "a row has more than 4096 columns";

// ---- elements -------------------------------------------------------------------------------------------------------
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, f16>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

// W elements as one access, or several of 16 bytes.
template <class T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
  T item[W];
};

template <int W, class T>
__device__ void load_pack(const T* p, float* v) {
  const Pack<T, W> pack = *reinterpret_cast<const Pack<T, W>*>(p);
#pragma unroll
  for (int i = 0; i < W; ++i) v[i] = to_float(pack.item[i]);
}

template <int W, class T>
__device__ void store_pack(T* p, const float* v) {
  Pack<T, W> pack;
#pragma unroll
  for (int i = 0; i < W; ++i) pack.item[i] = from_float<T>(v[i]);
  *reinterpret_cast<Pack<T, W>*>(p) = pack;
}

// v rounded to T.
template <class T>
__device__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// ---- a thread's share of a row --------------------------------------------------------------------------------------
template <int W>
__device__ int first_column(int pack) {
  return (pack * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * W;
}

// Is item i of this thread a column of the row?
template <int W>
__device__ bool in_row(int i, int C) {
  return first_column<W>(i / W) + i % W < C;
}

// Columns beyond the last are zero. A row's last pack may be a part: its elements are read one by one.
template <int W, class T>
__device__ void load_row(const T* row, int C, float (&v)[kItems]) {
#pragma unroll
  for (int j = 0; j < kItems / W; ++j) {
    const int c = first_column<W>(j);
    if (c + W <= C) {
      load_pack<W>(row + c, v + j * W);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) v[j * W + i] = c + i < C ? to_float(row[c + i]) : 0.f;
    }
  }
}

template <int W, class T>
__device__ void store_row(T* row, int C, const float (&v)[kItems]) {
#pragma unroll
  for (int j = 0; j < kItems / W; ++j) {
    const int c = first_column<W>(j);
    if (c + W <= C) {
      store_pack<W>(row + c, v + j * W);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i)
        if (c + i < C) row[c + i] = from_float<T>(v[j * W + i]);
    }
  }
}

__device__ inline void fill_row(float (&v)[kItems], float value) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) v[i] = value;
}

// A parameter's columns, `absent` where there is none. Its packs are 16-byte accesses where its own address allows
// that.
template <int W, class T>
__device__ void load_row_of_any_alignment(const T* row, int C, float (&v)[kItems]) {
  if (reinterpret_cast<uintptr_t>(row) % alignof(Pack<T, W>) == 0)
    load_row<W>(row, C, v);
  else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int c = first_column<W>(i / W) + i % W;
      v[i] = c < C ? to_float(row[c]) : 0.f;
    }
  }
}

template <int W>
__device__ void load_param(const Param& param, int C, float (&v)[kItems], float absent) {
  if (param.data == nullptr) return fill_row(v, absent);
  switch (param.dtype) {
    case DType::f32: return load_row_of_any_alignment<W>(static_cast<const float*>(param.data), C, v);
    case DType::bf16: return load_row_of_any_alignment<W>(static_cast<const bf16*>(param.data), C, v);
    case DType::f16: return load_row_of_any_alignment<W>(static_cast<const f16*>(param.data), C, v);
  }
}

// A parameter from an element on.
__device__ inline Param part_of(const Param& param, int64_t first) {
  if (param.data == nullptr) return param;
  return {static_cast<const char*>(param.data) + first * (param.dtype == DType::f32 ? 4 : 2), param.dtype};
}

__device__ inline void store_param(const ParamGrad& grad, int64_t column, float value) {
  switch (grad.dtype) {
    case DType::f32: static_cast<float*>(grad.data)[column] = value; return;
    case DType::bf16: static_cast<bf16*>(grad.data)[column] = from_float<bf16>(value); return;
    case DType::f16: static_cast<f16*>(grad.data)[column] = from_float<f16>(value); return;
  }
}

// Sum of the rows of y that name `row`, in the order of the index; zero where none does.
template <int W, class T>
__device__ void sum_of_run(const InverseTokenIndex& inverse, int64_t row, const T* y, int64_t stride, int C,
                           float (&sum)[kItems]) {
  fill_row(sum, 0.f);
  for (int k = inverse.offsets[row]; k < inverse.offsets[row + 1]; ++k) {
    float v[kItems];
    load_row<W>(y + inverse.entries[k] * stride, C, v);
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum[i] += v[i];
  }
}

// ---- sums over a row ------------------------------------------------------------------------------------------------
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// Sums over the CTA of N values of each thread, in every thread; the same bits in each. All threads take part; the next
// call may follow at once.
template <int N>
__device__ void block_sum(float (&x)[N]) {
  __shared__ float partial[N][32];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
  if (warps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) partial[n][warp] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = warp_sum(lane < warps ? partial[n][lane] : 0.f);
  __syncthreads();  // the next sum may write again
}

__device__ inline float block_sum(float x) {
  float sums[1] = {x};
  block_sum(sums);
  return sums[0];
}

// Sum of this thread's items.
__device__ inline float sum_of(const float (&v)[kItems]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum += v[i];
  return sum;
}

// ---- normalisation --------------------------------------------------------------------------------------------------
struct Statistics {
  float mean, rstd;
};

// Of a row of C columns, the variance from centred values; for RMS the mean is zero.
template <int W>
__device__ Statistics row_statistics(const float (&v)[kItems], int C, float eps, bool rms) {
  const float mean = rms ? 0.f : block_sum(sum_of(v)) / static_cast<float>(C);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float d = in_row<W>(i, C) ? v[i] - mean : 0.f;
    squares += d * d;
  }
  return {mean, 1.f / sqrtf(block_sum(squares) / static_cast<float>(C) + eps)};
}

// d becomes the gradient of a normalised row's input: (w dy - mean(w dy) - xhat mean(w dy xhat)) rstd, from w dy.
__device__ inline void norm_input_gradient(float (&d)[kItems], const float (&xhat)[kItems], float rstd, int C,
                                           bool rms) {
  float sums[2] = {};  // of d, and of d * xhat; both are zero beyond the last column
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sums[0] += d[i];
    sums[1] += d[i] * xhat[i];
  }
  block_sum(sums);
  const float c1 = rms ? 0.f : sums[0] / static_cast<float>(C), c2 = sums[1] / static_cast<float>(C);
#pragma unroll
  for (int i = 0; i < kItems; ++i) d[i] = (d[i] - c1 - xhat[i] * c2) * rstd;
}

// A CTA's partial sums of one parameter, C floats at any alignment.
template <int W>
__device__ void store_partial_sums(float* out, int C, const float (&v)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int c = first_column<W>(i / W) + i % W;
    if (c < C) out[c] = v[i];
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
inline int row_threads(int64_t C) { return static_cast<int>(ceil_div<int64_t>(ceil_div<int64_t>(C, kItems), 32) * 32); }

// CTAs that fill the device with threads, at most one for each row: they take rows in turn.
inline int row_ctas(int64_t rows, int threads) {
  const int64_t resident = static_cast<int64_t>(num_sms()) * (2048 / threads);
  return static_cast<int>(rows < resident ? rows : resident);
}

// CTAs where each sums its rows into partial sums of its own: few enough that these are 1/16 of the 16-bit rows they
// come from.
inline int summing_ctas(int64_t rows, int threads) {
  const int64_t few = ceil_div<int64_t>(rows, 32);
  const int ctas = row_ctas(rows, threads);
  return static_cast<int>(few < ctas ? few : ctas);
}

// Kernels without a sum over the row: CTAs of kPieceThreads = columns x rows, a row wider than 2048 columns in pieces.
constexpr int kPieceThreads = 256;

struct RowPiece {
  int64_t row;
  int first, width;  // its first column, and the columns from there to the row's end; none beyond the last row
  __device__ RowPiece(int64_t rows, int64_t C)
      : row(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y),
        first(static_cast<int>(blockIdx.y * blockDim.x) * kItems),
        width(row < rows ? static_cast<int>(C) - first : 0) {}
};

struct PieceGrid {
  dim3 ctas, threads;
  PieceGrid(int64_t rows, int64_t C) {
    const int wanted = row_threads(C);
    threads.x = static_cast<unsigned>(wanted < kPieceThreads ? wanted : kPieceThreads);
    threads.y = kPieceThreads / threads.x;
    ctas.x = static_cast<unsigned>(ceil_div<int64_t>(rows, threads.y));
    ctas.y = static_cast<unsigned>(ceil_div<int64_t>(C, static_cast<int64_t>(threads.x) * kItems));
  }
};

// out[c] = sum over parts of partials[part * stride + c], in the order of the parts (rows.cu). Nothing where out is
// absent.
void sum_columns(const ParamGrad& out, const float* partials, int parts, int64_t stride, int64_t C,
                 const Device& device);

}  // namespace eva02::cuda
