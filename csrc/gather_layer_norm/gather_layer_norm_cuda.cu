// gather_layer_norm: out[m] = LayerNorm(x[index[m]]) * w + b; a padding row (index[m] < 0) is zero, statistics included
// Fused     gather, LayerNorm (eager: two kernels over n selected elements, or LayerNorm over all N tokens first)
// Bytes     forward moves 2n elements; backward reads 2n and writes dx once: the minimum of both; partial sums of the
//           parameters' gradients a float for 32 or 64 rows of x and a column
// Launch    a CTA takes rows in turn, 8 columns a thread: selected rows forward, rows of x backward, with the weight
//           and the sums in shared memory, 12 bytes a column
// Numerics  float32 inside, one rounding; a row selected k times sums its k output gradients before the one norm
//           backward
// Limits    last dim contiguous; any batch and token stride of x; C up to 8192; an index out of range is padding
// Source    original; Ba et al., arXiv:1607.06450
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

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads)
    bwd_kernel(const __grid_constant__ GatherLayerNormBwdParams p, float* partials) {
  const int C = static_cast<int>(p.C), sums = num_sums(p.dweight, p.dbias, {});
  clear_own(sums);
  keep_param<W>(sums, p.weight, C, 1.f);
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
      normalize(x, mean, rstd);
      if (sums > 0) add_param_gradients(d, x);
      scale_by_own(sums, d);
      const NormInputGradient gradient(d, x, rstd, C, false);
#pragma unroll
      for (int i = 0; i < kItems; ++i) d[i] = gradient(d[i], x[i]);
    }
    if (p.dx != nullptr) store_row<W>(static_cast<T*>(p.dx) + b * p.dx_batch_stride + s * p.dx_token_stride, C, d);
  }
  store_partial_sums<W>(partials, sums, C);
}

}  // namespace

const char* run_gather_layer_norm_fwd(const GatherLayerNormFwdParams& p, const Device& device) {
  if (p.index.count == 0 || p.C == 0) return nullptr;
  if (p.C > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.C), ctas = row_ctas(p.index.count, threads);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.x, p.x_batch_stride, p.x_token_stride).rows(p.out, p.C);
    return by_width<T>(width, [&]<int W>() { return launch_rows(fwd_kernel<T, W>, p, ctas, threads, 0, device); });
  });
}

const char* run_gather_layer_norm_bwd(const GatherLayerNormBwdParams& p, const Device& device) {
  const auto launch = [&](int ctas, int threads, int sums, float* partials) {
    return by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dout, p.C).rows(p.x, p.x_batch_stride, p.x_token_stride);
      width.rows(p.dx, p.dx_batch_stride, p.dx_token_stride);
      return by_width<T>(
          width, [&]<int W>() { return launch_rows(bwd_kernel<T, W>, p, ctas, threads, sums + 1, device, partials); });
    });
  };
  return norm_backward(p.batch * p.seqlen, p.C, p.dweight, p.dbias, {}, device, launch);
}

}  // namespace eva02::cuda
