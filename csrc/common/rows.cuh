// What CUDA kernels that hold whole rows in registers share: a CTA takes a row at a time, a thread kItems of its
// columns in packs of W, pack j of thread t being pack j * blockDim + t of the row, so that a warp's accesses are
// contiguous.
#pragma once

#include "common/launch.cuh"
#include "common/param.h"
#include "common/token_index.h"

namespace eva02::cuda {

constexpr int kItems = 8;
constexpr int kMaxRowThreads = 1024;  // of 64 registers: what outlives a row is kept in shared memory
constexpr int kMaxColumns = kItems * kMaxRowThreads;
inline constexpr char kRowTooWide[] = "a row has more than 8192 columns";

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

// The same, in a form that the compiler cannot tell from a new number: what is computed from it is computed again,
// instead of being kept in registers.
__device__ inline void forget(int& x) { asm volatile("" : "+r"(x)); }
__device__ inline void forget(int64_t& x) { asm volatile("" : "+l"(x)); }
__device__ inline void forget(float& x) { asm volatile("" : "+f"(x)); }

// ---- a thread's share of a row --------------------------------------------------------------------------------------
template <int W>
__device__ int first_column(int pack) {
  int thread = static_cast<int>(threadIdx.x);
  if constexpr (W == 1) forget(thread);  // eight columns would take too many registers
  return (pack * static_cast<int>(blockDim.x) + thread) * W;
}

template <int W>
__device__ int column_of(int item) {
  return first_column<W>(item / W) + item % W;
}

// Is item i of this thread a column of the row?
template <int W>
__device__ bool in_row(int i, int C) {
  return column_of<W>(i) < C;
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
      const int c = column_of<W>(i);
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

// ---- what outlives a row --------------------------------------------------------------------------------------------
// Floats for each of a thread's columns in dynamic shared memory, of which a thread meets its own alone: registers are
// left to the row.
__device__ inline float* own_columns(int which) {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<float*>(memory) +
         (which * kItems / 4 * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * 4;
}

template <class F>
__device__ void update_own(int which, const F& f) {
  float* mine = own_columns(which);
#pragma unroll
  for (int i = 0; i < kItems; i += 4) {
    float v[4];
    load_pack<4>(mine + i * static_cast<int>(blockDim.x), v);
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = f(i + k, v[k]);
    store_pack<4>(mine + i * static_cast<int>(blockDim.x), v);
  }
}

__device__ inline void load_own(int which, float (&v)[kItems]) {
  const float* mine = own_columns(which);
#pragma unroll
  for (int i = 0; i < kItems; i += 4) load_pack<4>(mine + i * static_cast<int>(blockDim.x), v + i);
}

__device__ inline void store_own(int which, const float (&v)[kItems]) {
  float* mine = own_columns(which);
#pragma unroll
  for (int i = 0; i < kItems; i += 4) store_pack<4>(mine + i * static_cast<int>(blockDim.x), v + i);
}

__device__ inline void clear_own(int count) {
  for (int which = 0; which < count; ++which) update_own(which, [](int, float) { return 0.f; });
}

template <int W>
__device__ void keep_param(int which, const Param& param, int C, float absent) {
  float v[kItems];
  load_param<W>(param, C, v, absent);
  store_own(which, v);
}

__device__ inline void scale_by_own(int which, float (&v)[kItems]) {
  float w[kItems];
  load_own(which, w);
#pragma unroll
  for (int i = 0; i < kItems; ++i) v[i] *= w[i];
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

// xhat of a row. Beyond the last column it is no zero, but the gradient there is.
__device__ inline void normalize(float (&v)[kItems], float mean, float rstd) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) v[i] = (v[i] - mean) * rstd;
}

// Sums that the CTAs of a norm's backward keep: of the weight's and the bias's gradient together, then of the layer
// scale's.
__host__ __device__ inline int num_sums(const ParamGrad& dweight, const ParamGrad& dbias, const ParamGrad& dscale) {
  return (dweight.data != nullptr || dbias.data != nullptr ? 2 : 0) + (dscale.data != nullptr ? 1 : 0);
}

// Adds a row's share to the gradients of a norm's weight and bias, which are the first two of what a column keeps.
__device__ inline void add_param_gradients(const float (&d)[kItems], const float (&xhat)[kItems]) {
  update_own(0, [&](int i, float dw) { return dw + d[i] * xhat[i]; });
  update_own(1, [&](int i, float db) { return db + d[i]; });
}

// The gradient of a normalised row's input: (w dy - mean(w dy) - xhat mean(w dy xhat)) rstd, from w dy.
struct NormInputGradient {
  float mean, slope, rstd;

  // d is w dy, zero beyond the last column.
  __device__ NormInputGradient(const float (&d)[kItems], const float (&xhat)[kItems], float rstd, int C, bool rms)
      : rstd(rstd) {
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sums[0] += d[i];
      sums[1] += d[i] * xhat[i];
    }
    block_sum(sums);
    mean = rms ? 0.f : sums[0] / static_cast<float>(C);
    slope = sums[1] / static_cast<float>(C);
  }
  __device__ float operator()(float d, float xhat) const { return (d - mean - xhat * slope) * rstd; }
};

// The first N of what each column keeps, as a CTA's partial sums: N times C floats at any alignment.
template <int W>
__device__ void store_partial_sums(float* partials, int N, int C) {
  for (int n = 0; n < N; ++n) {
    float* out = partials + (static_cast<int64_t>(blockIdx.x) * N + n) * C;
    float v[kItems];
    load_own(n, v);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int c = column_of<W>(i);
      if (c < C) out[c] = v[i];
    }
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
inline int row_threads(int64_t C) { return static_cast<int>(ceil_div<int64_t>(ceil_div<int64_t>(C, kItems), 32) * 32); }

// CTAs that fill the device with threads, at most one for each row: they take rows in turn.
inline int row_ctas(int64_t rows, int threads) {
  const int64_t resident = static_cast<int64_t>(num_sms()) * (2048 / threads);
  return static_cast<int>(rows < resident ? rows : resident);
}

// CTAs where each sums its rows into partial sums of its own, whose bytes are to be few beside the rows': of 64 rows,
// but of 32 where there would be fewer than four CTAs for a multiprocessor.
inline int summing_ctas(int64_t rows, int threads) {
  const int64_t long_sums = ceil_div<int64_t>(rows, 64), short_sums = ceil_div<int64_t>(rows, 32);
  const int64_t enough = 4 * static_cast<int64_t>(num_sms());
  const int64_t ctas = short_sums < enough ? short_sums : long_sums < enough ? enough : long_sums;
  const int64_t resident = row_ctas(rows, threads);
  return static_cast<int>(ctas < resident ? ctas : resident);
}

// Starts a kernel that keeps `own` floats for each of its columns: three for as many columns as a row can have.
template <class Params, class... More>
const char* launch_rows(void (*kernel)(Params, More...), const Params& p, int ctas, int threads, int own,
                        const Device& device, More... more) {
  constexpr int kMost = 3 * kMaxColumns * static_cast<int>(sizeof(float)), kUnasked = 40 << 10;
  static_assert(kMost ==
                96 << 10);  // of 99 KB that every device has; a launch has 48 KB unasked, static arrays included
  const int bytes = own * threads * kItems * static_cast<int>(sizeof(float));
  if (bytes > kUnasked) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  kernel<<<ctas, threads, bytes, stream_of(device)>>>(p, more...);
  return launch_error();
}

// out[c] = sum over parts of partials[part * stride + c], in the order of the parts (rows.cu). Nothing where out is
// absent.
void sum_columns(const ParamGrad& out, const float* partials, int parts, int64_t stride, int64_t C,
                 const Device& device);

// A norm's backward, over rows of C columns: launch(ctas, threads, sums, partials) of a kernel whose CTAs keep that
// many sums, then the parameters' gradients from these. dscale: absent, or a third one.
template <class Launch>
const char* norm_backward(int64_t rows, int64_t C, const ParamGrad& dweight, const ParamGrad& dbias,
                          const ParamGrad& dscale, const Device& device, const Launch& launch) {
  const int sums = num_sums(dweight, dbias, dscale);
  if (C == 0 || (rows == 0 && sums == 0)) return nullptr;
  if (C > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(C), ctas = sums > 0 ? summing_ctas(rows, threads) : row_ctas(rows, threads);
  const int64_t stride = sums * C;
  float* partials = nullptr;
  if (sums > 0 && (partials = workspace(device, ctas * stride)) == nullptr) return kNoMemory;
  if (rows > 0)
    if (const char* error = launch(ctas, threads, sums, partials)) return error;
  if (sums > 1) {
    sum_columns(dweight, partials, ctas, stride, C, device);
    sum_columns(dbias, partials + C, ctas, stride, C, device);
  }
  if (sums > 0) sum_columns(dscale, partials + (sums - 1) * C, ctas, stride, C, device);
  return launch_error();
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

}  // namespace eva02::cuda
