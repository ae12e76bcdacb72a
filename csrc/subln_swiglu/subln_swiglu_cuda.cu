// subln_swiglu: y = LayerNorm(h) * w + b over the last dim, h = silu(g) * u, never rounded
// Fused     sigmoid, two multiplications, LayerNorm (eager: 3 kernels); backward in one pass, with the weight and bias
//           gradients as partial sums of CTAs, which a second kernel adds
// Bytes     forward moves 3n elements, backward 5n: the minimum of both; mean and rstd are 8 bytes a row, partial sums
// at
//           most 1/8 of n floats
// Launch    a CTA takes rows in turn, 8 columns a thread; forward as many CTAs as fill the device, backward 16 rows
// each Numerics  float32 inside, one rounding at the store; variance from centred values Limits    last dim contiguous;
// any row stride and F up to 4096; 16-byte accesses where pointers and strides allow Source    original; formulas:
// Shazeer, arXiv:2002.05202; EVA-02, arXiv:2303.11331
#include "common/activations.cuh"
#include "common/rows.cuh"
#include "subln_swiglu/subln_swiglu.h"

namespace eva02::cuda {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(kMaxRowThreads) fwd_kernel(const __grid_constant__ SublnSwigluFwdParams p) {
  const int F = static_cast<int>(p.F);
  float w[kItems], b[kItems];
  load_param<W>(p.weight, F, w, 1.f);
  load_param<W>(p.bias, F, b, 0.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float h[kItems], u[kItems];
    load_row<W>(static_cast<const T*>(p.gate) + row * p.gate_stride, F, h);
    load_row<W>(static_cast<const T*>(p.up) + row * p.up_stride, F, u);
#pragma unroll
    for (int i = 0; i < kItems; ++i) h[i] = silu<T>(h[i]).value * u[i];
    const Statistics s = row_statistics<W>(h, F, p.eps, false);
#pragma unroll
    for (int i = 0; i < kItems; ++i) h[i] = (h[i] - s.mean) * s.rstd * w[i] + b[i];
    store_row<W>(static_cast<T*>(p.out) + row * p.out_stride, F, h);
    if (threadIdx.x == 0) {
      p.mean[row] = s.mean;
      p.rstd[row] = s.rstd;
    }
  }
}

template <class T, int W, bool kParamGrads>
__global__ void __launch_bounds__(kMaxRowThreads)
    bwd_kernel(const __grid_constant__ SublnSwigluBwdParams p, float* partials) {
  const int F = static_cast<int>(p.F);
  float w[kItems], dw[kItems] = {}, db[kItems] = {};
  load_param<W>(p.weight, F, w, 1.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float g[kItems], u[kItems], d[kItems], x[kItems];
    load_row<W>(static_cast<const T*>(p.gate) + row * p.gate_stride, F, g);
    load_row<W>(static_cast<const T*>(p.up) + row * p.up_stride, F, u);
    load_row<W>(static_cast<const T*>(p.dout) + row * p.dout_stride, F, d);
    const float mean = p.mean[row], rstd = p.rstd[row];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      x[i] = in_row<W>(i, F) ? (silu<T>(g[i]).value * u[i] - mean) * rstd : 0.f;
      if constexpr (kParamGrads) {
        dw[i] += d[i] * x[i];
        db[i] += d[i];
      }
      d[i] *= w[i];
    }
    norm_input_gradient(d, x, rstd, F, false);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Activation a = silu<T>(g[i]);
      g[i] = d[i] * u[i] * a.slope;
      u[i] = d[i] * a.value;
    }
    if (p.dgate != nullptr) store_row<W>(static_cast<T*>(p.dgate) + row * p.dgate_stride, F, g);
    if (p.dup != nullptr) store_row<W>(static_cast<T*>(p.dup) + row * p.dup_stride, F, u);
  }
  if constexpr (kParamGrads) {
    float* mine = partials + static_cast<int64_t>(blockIdx.x) * 2 * F;
    store_partial_sums<W>(mine, F, dw);
    store_partial_sums<W>(mine + F, F, db);
  }
}

}  // namespace

const char* run_subln_swiglu_fwd(const SublnSwigluFwdParams& p, const Device& device) {
  if (p.rows == 0 || p.F == 0) return nullptr;
  if (p.F > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.F), ctas = row_ctas(p.rows, threads);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.gate, p.gate_stride).rows(p.up, p.up_stride).rows(p.out, p.out_stride);
    return by_width<T>(width, [&]<int W>() {
      fwd_kernel<T, W><<<ctas, threads, 0, stream_of(device)>>>(p);
      return launch_error();
    });
  });
}

const char* run_subln_swiglu_bwd(const SublnSwigluBwdParams& p, const Device& device) {
  const bool param_grads = p.dweight.data != nullptr || p.dbias.data != nullptr;
  if (p.F == 0 || (p.rows == 0 && !param_grads)) return nullptr;
  if (p.F > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.F), ctas = param_grads ? summing_ctas(p.rows, threads) : row_ctas(p.rows, threads);
  float* partials = nullptr;
  if (param_grads && (partials = workspace(device, 2 * ctas * p.F)) == nullptr) return kNoMemory;
  if (p.rows > 0) {
    const char* error = by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dout, p.dout_stride).rows(p.gate, p.gate_stride).rows(p.up, p.up_stride);
      width.rows(p.dgate, p.dgate_stride).rows(p.dup, p.dup_stride);
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
    sum_columns(p.dweight, partials, ctas, 2 * p.F, p.F, device);
    sum_columns(p.dbias, partials + p.F, ctas, 2 * p.F, p.F, device);
  }
  return launch_error();
}

}  // namespace eva02::cuda
