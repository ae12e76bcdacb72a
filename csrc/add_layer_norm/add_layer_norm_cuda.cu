// add_layer_norm: sum = residual + row_scale * layer_scale * x; normed = LayerNorm(sum) * w + b, or RMSNorm
// Fused     drop path, layer scale, residual add, norm (eager: 4 kernels, 11n elements moved); backward in one pass,
// with
//           the norm's parameter gradients and the layer scale's as partial sums of CTAs, which a second kernel adds
// Bytes     forward moves 4n elements; backward 4n, plus n for dx where it differs from dresidual and n to read x for
//           the layer scale: the minimum of both; partial sums at most 1/8 of n floats
// Launch    a CTA takes rows in turn, 8 columns a thread; forward as many CTAs as fill the device, backward 16 rows
// each Numerics  float32 inside; sum is rounded to the dtype before its statistics, so that normed is a function of the
// sum
//           that is kept; variance from centred values
// Limits    last dim contiguous; any row stride and C up to 4096; 16-byte accesses where pointers and strides allow
// Source    original; Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467; Touvron et al.,
// arXiv:2103.17239
#include "add_layer_norm/add_layer_norm.h"
#include "common/rows.cuh"

namespace eva02::cuda {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads) fwd_kernel(const __grid_constant__ AddLayerNormFwdParams p) {
  const int C = static_cast<int>(p.C);
  float w[kItems], b[kItems], scale[kItems];
  load_param<W>(p.weight, C, w, 1.f);
  load_param<W>(p.bias, C, b, 0.f);
  load_param<W>(p.layer_scale, C, scale, 1.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
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
#pragma unroll
    for (int i = 0; i < kItems; ++i) s[i] = (s[i] - stats.mean) * stats.rstd * w[i] + b[i];
    store_row<W>(static_cast<T*>(p.normed) + row * p.normed_stride, C, s);
    if (threadIdx.x == 0) {
      if (p.mean != nullptr) p.mean[row] = stats.mean;
      p.rstd[row] = stats.rstd;
    }
  }
}

template <class T, int W, bool kParamGrads, bool kScaleGrad>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    bwd_kernel(const __grid_constant__ AddLayerNormBwdParams p, float* partials) {
  const int C = static_cast<int>(p.C);
  float w[kItems], scale[kItems], dw[kItems] = {}, db[kItems] = {}, dscale[kItems] = {};
  load_param<W>(p.weight, C, w, 1.f);
  load_param<W>(p.layer_scale, C, scale, 1.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
    const float mean = p.rms ? 0.f : p.mean[row], rstd = p.rstd[row];
    float d[kItems], x[kItems];
    load_row<W>(static_cast<const T*>(p.dnormed) + row * p.dnormed_stride, C, d);
    load_row<W>(static_cast<const T*>(p.sum) + row * p.sum_stride, C, x);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      x[i] = in_row<W>(i, C) ? (x[i] - mean) * rstd : 0.f;
      if constexpr (kParamGrads) {
        dw[i] += d[i] * x[i];
        db[i] += d[i];
      }
      d[i] *= w[i];
    }
    norm_input_gradient(d, x, rstd, C, p.rms);
    if (p.dsum != nullptr) {
      load_row<W>(static_cast<const T*>(p.dsum) + row * p.dsum_stride, C, x);
#pragma unroll
      for (int i = 0; i < kItems; ++i) d[i] += x[i];
    }
    if (p.dresidual != nullptr) store_row<W>(static_cast<T*>(p.dresidual) + row * p.dresidual_stride, C, d);
    if constexpr (kScaleGrad) {
      load_row<W>(static_cast<const T*>(p.x) + row * p.x_stride, C, x);
#pragma unroll
      for (int i = 0; i < kItems; ++i) dscale[i] += row_scale * d[i] * x[i];
    }
    if (p.dx != nullptr) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) d[i] *= row_scale * scale[i];
      store_row<W>(static_cast<T*>(p.dx) + row * p.dx_stride, C, d);
    }
  }
  constexpr int kPartials = (kParamGrads ? 2 : 0) + (kScaleGrad ? 1 : 0);
  float* mine = partials + blockIdx.x * kPartials * p.C;
  if constexpr (kParamGrads) {
    store_partial_sums<W>(mine, C, dw);
    store_partial_sums<W>(mine + C, C, db);
  }
  if constexpr (kScaleGrad) store_partial_sums<W>(mine + (kParamGrads ? 2 * C : 0), C, dscale);
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
    return by_width<T>(width, [&]<int W>() {
      fwd_kernel<T, W><<<ctas, threads, 0, stream_of(device)>>>(p);
      return launch_error();
    });
  });
}

const char* run_add_layer_norm_bwd(const AddLayerNormBwdParams& p, const Device& device) {
  const bool param_grads = p.dweight.data != nullptr || p.dbias.data != nullptr;
  const bool scale_grad = p.dlayer_scale.data != nullptr, sums = param_grads || scale_grad;
  if (p.C == 0 || (p.rows == 0 && !sums)) return nullptr;
  if (p.C > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.C), ctas = sums ? summing_ctas(p.rows, threads) : row_ctas(p.rows, threads);
  const int64_t stride = ((param_grads ? 2 : 0) + (scale_grad ? 1 : 0)) * p.C;
  float* partials = nullptr;
  if (sums && (partials = workspace(device, ctas * stride)) == nullptr) return kNoMemory;
  if (p.rows > 0) {
    const char* error = by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dnormed, p.dnormed_stride).rows(p.dsum, p.dsum_stride).rows(p.sum, p.sum_stride);
      width.rows(p.x, p.x_stride).rows(p.dx, p.dx_stride).rows(p.dresidual, p.dresidual_stride);
      return by_width<T>(width, [&]<int W>() {
        return by_bool(param_grads, [&]<bool kParamGrads>() {
          return by_bool(scale_grad, [&]<bool kScaleGrad>() {
            bwd_kernel<T, W, kParamGrads, kScaleGrad><<<ctas, threads, 0, stream_of(device)>>>(p, partials);
            return launch_error();
          });
        });
      });
    });
    if (error != nullptr) return error;
  }
  if (param_grads) {
    sum_columns(p.dweight, partials, ctas, stride, p.C, device);
    sum_columns(p.dbias, partials + p.C, ctas, stride, p.C, device);
  }
  if (scale_grad) sum_columns(p.dlayer_scale, partials + stride - p.C, ctas, stride, p.C, device);
  return launch_error();
}

}  // namespace eva02::cuda
