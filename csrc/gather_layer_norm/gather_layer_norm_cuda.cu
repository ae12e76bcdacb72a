// gather_layer_norm: out[m] = LayerNorm(x[index[m]]) * w + b; a padding row (index[m] < 0) is zero, statistics included
// Fused     gather, LayerNorm (eager: two kernels over n selected elements, or LayerNorm over all N tokens first)
// Bytes     forward moves 2n elements; backward reads 2n and writes dx once: the minimum of both; partial sums of the
//           parameters' gradients at most 1/8 of dx in floats
// Launch    a CTA takes rows in turn, 8 columns a thread: selected rows forward, rows of x backward
// Numerics  float32 inside, one rounding; a row selected k times sums its k output gradients before the one norm
// backward Limits    last dim contiguous; any batch and token stride of x; C up to 4096; an index out of range is
// padding Source    original; Ba et al., arXiv:1607.06450
#include "common/rows.cuh"
#include "gather_layer_norm/gather_layer_norm.h"

namespace eva02::cuda {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads) fwd_kernel(const __grid_constant__ GatherLayerNormFwdParams p) {
  const int C = static_cast<int>(p.C);
  float w[kItems], b[kItems];
  load_param<W>(p.weight, C, w, 1.f);
  load_param<W>(p.bias, C, b, 0.f);
#pragma unroll 1
  for (int64_t m = blockIdx.x; m < p.index.count; m += gridDim.x) {
    const int64_t row = p.index[m];  // the same for the whole CTA
    float x[kItems] = {};
    Statistics stats{0.f, 0.f};
    if (row >= 0) {
      load_row<W>(static_cast<const T*>(p.x) + row / p.seqlen * p.x_batch_stride + row % p.seqlen * p.x_token_stride, C,
                  x);
      stats = row_statistics<W>(x, C, p.eps, false);
#pragma unroll
      for (int i = 0; i < kItems; ++i) x[i] = (x[i] - stats.mean) * stats.rstd * w[i] + b[i];
    }
    store_row<W>(static_cast<T*>(p.out) + m * p.C, C, x);
    if (threadIdx.x == 0) {
      p.mean[m] = stats.mean;
      p.rstd[m] = stats.rstd;
    }
  }
}

template <class T, int W, bool kParamGrads>
__global__ void __launch_bounds__(kMaxRowThreads)
    bwd_kernel(const __grid_constant__ GatherLayerNormBwdParams p, float* partials) {
  const int C = static_cast<int>(p.C);
  float w[kItems], dw[kItems] = {}, db[kItems] = {};
  load_param<W>(p.weight, C, w, 1.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.batch * p.seqlen; row += gridDim.x) {
    const int64_t b = row / p.seqlen, s = row % p.seqlen;
    const int first = p.inverse.offsets[row];
    float d[kItems] = {};
    if (first < p.inverse.offsets[row + 1]) {
      const int m = p.inverse.entries[first];
      const float mean = p.mean[m], rstd = p.rstd[m];
      float x[kItems];
      load_row<W>(static_cast<const T*>(p.x) + b * p.x_batch_stride + s * p.x_token_stride, C, x);
      sum_of_run<W>(p.inverse, row, static_cast<const T*>(p.dout), p.C, C, d);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x[i] = in_row<W>(i, C) ? (x[i] - mean) * rstd : 0.f;
        if constexpr (kParamGrads) {
          dw[i] += d[i] * x[i];
          db[i] += d[i];
        }
        d[i] *= w[i];
      }
      norm_input_gradient(d, x, rstd, C, false);
    }
    if (p.dx != nullptr) store_row<W>(static_cast<T*>(p.dx) + b * p.dx_batch_stride + s * p.dx_token_stride, C, d);
  }
  if constexpr (kParamGrads) {
    float* mine = partials + blockIdx.x * 2 * p.C;
    store_partial_sums<W>(mine, C, dw);
    store_partial_sums<W>(mine + C, C, db);
  }
}

}  // namespace

const char* run_gather_layer_norm_fwd(const GatherLayerNormFwdParams& p, const Device& device) {
  if (p.index.count == 0 || p.C == 0) return nullptr;
  if (p.C > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.C), ctas = row_ctas(p.index.count, threads);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.x, p.x_batch_stride, p.x_token_stride).rows(p.out, p.C);
    return by_width<T>(width, [&]<int W>() {
      fwd_kernel<T, W><<<ctas, threads, 0, stream_of(device)>>>(p);
      return launch_error();
    });
  });
}

const char* run_gather_layer_norm_bwd(const GatherLayerNormBwdParams& p, const Device& device) {
  const bool param_grads = p.dweight.data != nullptr || p.dbias.data != nullptr;
  const int64_t rows = p.batch * p.seqlen;
  if (p.C == 0 || (rows == 0 && !param_grads)) return nullptr;
  if (p.C > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.C), ctas = param_grads ? summing_ctas(rows, threads) : row_ctas(rows, threads);
  float* partials = nullptr;
  if (param_grads && (partials = workspace(device, 2 * ctas * p.C)) == nullptr) return kNoMemory;
  if (rows > 0) {
    const char* error = by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dout, p.C).rows(p.x, p.x_batch_stride, p.x_token_stride);
      width.rows(p.dx, p.dx_batch_stride, p.dx_token_stride);
      return by_width<T>(width, [&]<int W>() {
        return by_bool(param_grads, [&]<bool kParamGrads>() {
          bwd_kernel<T, W, kParamGrads><<<ctas, threads, 0, stream_of(device)>>>(p, partials);
          return launch_error();
        });
      });
    });
    if (error != nullptr) return error;
  }
  if (param_grads) {
    sum_columns(p.dweight, partials, ctas, 2 * p.C, p.C, device);
    sum_columns(p.dbias, partials + p.C, ctas, 2 * p.C, p.C, device);
  }
  return launch_error();
}

}  // namespace eva02::cuda
