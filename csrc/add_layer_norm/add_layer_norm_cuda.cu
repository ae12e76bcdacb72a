// add_layer_norm: sum = residual + row_scale * layer_scale * x; normed = LayerNorm(sum) * w + b, or RMSNorm
// Fused     drop path, layer scale, residual add, norm (eager: 4 kernels, 11n elements moved); backward in one pass,
//           with the norm's parameter gradients and the layer scale's as partial sums of CTAs, which a second kernel
//           adds
// Bytes     forward moves 4n elements; backward 4n, plus n for dx where it differs from dresidual and n to read x for
//           the layer scale: the minimum of both; a partial sum is a float for 32 or 64 rows of a column
// Launch    a CTA takes rows in turn, 8 columns a thread; forward as many CTAs as fill the device, backward fewer,
//           for long sums; shared memory: weight and bias, backward the sums, at most 12 bytes a column
// Numerics  float32 inside; sum is rounded to the dtype before its statistics, so that normed is a function of the sum
//           that is kept; variance from centred values
// Limits    last dim contiguous; any row stride and C up to 8192; 16-byte accesses where pointers and strides allow
// Source    original; Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467; Touvron et al.,
//           arXiv:2103.17239
#include "add_layer_norm/add_layer_norm.h"
#include "common/rows.cuh"

namespace eva02::cuda {
namespace {

constexpr int kParams = 2;  // weight and bias, which the forward keeps beside the rows

template <class P>
__device__ float row_scale_of(const P& p, int64_t row) {
  return p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
}

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads) fwd_kernel(const __grid_constant__ AddLayerNormFwdParams p) {
  const int C = static_cast<int>(p.C);
  float scale[kItems];
  load_param<W>(p.layer_scale, C, scale, 1.f);
  keep_param<W>(0, p.weight, C, 1.f);
  keep_param<W>(1, p.bias, C, 0.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float row_scale = row_scale_of(p, row);
    float s[kItems];
    load_row<W>(static_cast<const T*>(p.x) + row * p.x_stride, C, s);
#pragma unroll
    for (int i = 0; i < kItems; ++i) s[i] *= row_scale * scale[i];
    if (p.residual != nullptr) {
      float residual[kItems];
      load_row<W>(static_cast<const T*>(p.residual) + row * p.residual_stride, C, residual);
#pragma unroll
      for (int i = 0; i < kItems; ++i) s[i] += residual[i];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) s[i] = rounded<T>(s[i]);
    if (p.sum != nullptr) store_row<W>(static_cast<T*>(p.sum) + row * p.sum_stride, C, s);
    const Statistics stats = row_statistics<W>(s, C, p.eps, p.rms);
    float w[kItems], b[kItems];
    load_own(0, w);
    load_own(1, b);
#pragma unroll
    for (int i = 0; i < kItems; ++i) s[i] = (s[i] - stats.mean) * stats.rstd * w[i] + b[i];
    store_row<W>(static_cast<T*>(p.normed) + row * p.normed_stride, C, s);
    if (threadIdx.x == 0) {
      if (p.mean != nullptr) p.mean[row] = stats.mean;
      p.rstd[row] = stats.rstd;
    }
  }
}

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads)
    bwd_kernel(const __grid_constant__ AddLayerNormBwdParams p, float* partials) {
  const int C = static_cast<int>(p.C), sums = num_sums(p.dweight, p.dbias, p.dlayer_scale);
  float w[kItems], scale[kItems];
  load_param<W>(p.weight, C, w, 1.f);
  load_param<W>(p.layer_scale, C, scale, 1.f);
  clear_own(sums);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    forget(row);  // else each tensor has a pointer in registers
    const float mean = p.rms ? 0.f : p.mean[row], rstd = p.rstd[row];
    float d[kItems], x[kItems];
    load_row<W>(static_cast<const T*>(p.dnormed) + row * p.dnormed_stride, C, d);
    load_row<W>(static_cast<const T*>(p.sum) + row * p.sum_stride, C, x);
    normalize(x, mean, rstd);
    if (sums > 1) add_param_gradients(d, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i) d[i] *= w[i];
    const NormInputGradient gradient(d, x, rstd, C, p.rms);
#pragma unroll
    for (int i = 0; i < kItems; ++i) d[i] = gradient(d[i], x[i]);
    const float row_scale = row_scale_of(p, row);
    if (p.dsum != nullptr) {
      load_row<W>(static_cast<const T*>(p.dsum) + row * p.dsum_stride, C, x);
#pragma unroll
      for (int i = 0; i < kItems; ++i) d[i] += x[i];
    }
    if (p.dresidual != nullptr) store_row<W>(static_cast<T*>(p.dresidual) + row * p.dresidual_stride, C, d);
    if (p.dlayer_scale.data != nullptr) {
      load_row<W>(static_cast<const T*>(p.x) + row * p.x_stride, C, x);
      update_own(sums - 1, [&](int i, float sum) { return sum + row_scale * d[i] * x[i]; });
    }
    if (p.dx != nullptr) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) d[i] *= row_scale * scale[i];
      store_row<W>(static_cast<T*>(p.dx) + row * p.dx_stride, C, d);
    }
  }
  store_partial_sums<W>(partials, sums, C);
}

}  // namespace

const char* run_add_layer_norm_fwd(const AddLayerNormFwdParams& p, const Device& device) {
  if (p.rows == 0 || p.C == 0) return nullptr;
  if (p.C > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.C), ctas = row_ctas(p.rows, threads);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.x, p.x_stride).rows(p.residual, p.residual_stride);
    width.rows(p.normed, p.normed_stride).rows(p.sum, p.sum_stride);
    return by_width<T>(width,
                       [&]<int W>() { return launch_rows(fwd_kernel<T, W>, p, ctas, threads, kParams, device); });
  });
}

const char* run_add_layer_norm_bwd(const AddLayerNormBwdParams& p, const Device& device) {
  const auto launch = [&](int ctas, int threads, int sums, float* partials) {
    return by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dnormed, p.dnormed_stride).rows(p.dsum, p.dsum_stride).rows(p.sum, p.sum_stride);
      width.rows(p.x, p.x_stride).rows(p.dx, p.dx_stride).rows(p.dresidual, p.dresidual_stride);
      return by_width<T>(
          width, [&]<int W>() { return launch_rows(bwd_kernel<T, W>, p, ctas, threads, sums, device, partials); });
    });
  };
  return norm_backward(p.rows, p.C, p.dweight, p.dbias, p.dlayer_scale, device, launch);
}

}  // namespace eva02::cuda
