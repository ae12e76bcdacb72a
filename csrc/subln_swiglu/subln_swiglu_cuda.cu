// subln_swiglu: y = LayerNorm(h) * w + b over the last dim, h = silu(g) * u, never rounded
// Fused     sigmoid, two multiplications, LayerNorm (eager: 3 kernels); backward in one pass, with the weight and bias
//           gradients as partial sums of CTAs, which a second kernel adds; inside an MLP also y again and the gradients
//           of the biases of gate and up
// Bytes     forward moves 3n elements, backward 5n, with y 6n: the minimum; mean and rstd are 8 bytes a row, a partial
//           sum is a float for 32 or 64 rows of a column
// Launch    a CTA takes rows in turn, 8 columns a thread; forward as many CTAs as fill the device, backward fewer,
//           for long sums, with the weight and the sums in shared memory, 12 bytes a column, 24 in an MLP
// Numerics  float32 inside, one rounding at the store; variance from centred values; sums of unrounded gradients
// Limits    last dim contiguous; any row stride and F up to 8192, 4096 in an MLP; 16-byte accesses where pointers and
//           strides allow
// Source    original; formulas: Shazeer, arXiv:2002.05202; EVA-02, arXiv:2303.11331
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

// In an MLP a column keeps four sums, the weight and the bias: twice what others keep, for half as many columns.
constexpr int kMaxMlpColumns = kMaxColumns / 2;

// kInMlp: padded columns, the hidden layer again and the sums of dgate and dup, behind those of the norm's parameters.
template <class T, int W, bool kInMlp>
__global__ void __launch_bounds__(kInMlp ? kMaxMlpColumns / kItems : kMaxRowThreads)
    bwd_kernel(const __grid_constant__ SublnHiddenGradientParams params, float* partials) {
  const SublnSwigluBwdParams& p = params.bwd;
  const int F = static_cast<int>(p.F), cols = kInMlp ? static_cast<int>(params.cols) : F;
  const int sums = kInMlp ? 4 : num_sums(p.dweight, p.dbias, {});
  clear_own(sums);
  keep_param<W>(sums, p.weight, F, 1.f);
  if constexpr (kInMlp) keep_param<W>(sums + 1, params.bias, F, 0.f);
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float g[kItems], u[kItems], d[kItems], x[kItems];
    load_row<W>(static_cast<const T*>(p.gate) + row * p.gate_stride, F, g);
    load_row<W>(static_cast<const T*>(p.up) + row * p.up_stride, F, u);
    load_row<W>(static_cast<const T*>(p.dout) + row * p.dout_stride, F, d);
    const float mean = p.mean[row], rstd = p.rstd[row];
#pragma unroll
    for (int i = 0; i < kItems; ++i) x[i] = (silu<T>(g[i]).value * u[i] - mean) * rstd;
    if (sums > 0) add_param_gradients(d, x);
    scale_by_own(sums, d);
    const NormInputGradient gradient(d, x, rstd, F, false);
    if constexpr (kInMlp) {
      if (params.hidden != nullptr) {
        float b[kItems];
        load_own(sums + 1, b);
        scale_by_own(sums, x);
#pragma unroll
        for (int i = 0; i < kItems; ++i) x[i] += b[i];
        store_row<W>(static_cast<T*>(params.hidden) + row * params.hidden_stride, cols, x);
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      forget(g[i]);
      const Activation a = silu<T>(g[i]);
      const float dh = gradient(d[i], (a.value * u[i] - mean) * rstd);
      g[i] = dh * u[i] * a.slope;  // zero beyond the last column, as gate and up are
      u[i] = dh * a.value;
    }
    if constexpr (kInMlp) {
      update_own(2, [&](int i, float sum) { return sum + g[i]; });
      update_own(3, [&](int i, float sum) { return sum + u[i]; });
    }
    if (p.dgate != nullptr) store_row<W>(static_cast<T*>(p.dgate) + row * p.dgate_stride, cols, g);
    if (p.dup != nullptr) store_row<W>(static_cast<T*>(p.dup) + row * p.dup_stride, cols, u);
  }
  store_partial_sums<W>(partials, sums, F);
}

}  // namespace

const char* run_subln_swiglu_fwd(const SublnSwigluFwdParams& p, const Device& device) {
  if (p.rows == 0 || p.F == 0) return nullptr;
  if (p.F > kMaxColumns) return kRowTooWide;
  const int threads = row_threads(p.F), ctas = row_ctas(p.rows, threads);
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.gate, p.gate_stride).rows(p.up, p.up_stride).rows(p.out, p.out_stride);
    return by_width<T>(width, [&]<int W>() { return launch_rows(fwd_kernel<T, W>, p, ctas, threads, 0, device); });
  });
}

const char* run_subln_swiglu_bwd(const SublnSwigluBwdParams& p, const Device& device) {
  const auto launch = [&](int ctas, int threads, int sums, float* partials) {
    return by_dtype(p.dtype, [&]<class T>() {
      PackWidth width(sizeof(T));
      width.rows(p.dout, p.dout_stride).rows(p.gate, p.gate_stride).rows(p.up, p.up_stride);
      width.rows(p.dgate, p.dgate_stride).rows(p.dup, p.dup_stride);
      const SublnHiddenGradientParams params{.bwd = p};
      return by_width<T>(width, [&]<int W>() {
        return launch_rows(bwd_kernel<T, W, false>, params, ctas, threads, sums + 1, device, partials);
      });
    });
  };
  return norm_backward(p.rows, p.F, p.dweight, p.dbias, {}, device, launch);
}

const char* run_subln_hidden_gradient(const SublnHiddenGradientParams& p, const Device& device) {
  const int64_t rows = p.bwd.rows, F = p.bwd.F;
  if (F == 0) return nullptr;
  if (p.cols > kMaxMlpColumns) return "a hidden layer under a norm has more than 4096 columns";
  const int threads = row_threads(p.cols), ctas = summing_ctas(rows, threads);
  float* partials = workspace(device, 4 * ctas * F);
  if (partials == nullptr) return kNoMemory;
  const char* error = by_dtype(p.bwd.dtype, [&]<class T>() -> const char* {
    PackWidth width(sizeof(T));
    width.rows(p.bwd.dout, p.bwd.dout_stride).rows(p.bwd.gate, p.bwd.gate_stride).rows(p.bwd.up, p.bwd.up_stride);
    width.rows(p.bwd.dgate, p.bwd.dgate_stride).rows(p.bwd.dup, p.bwd.dup_stride).rows(p.hidden, p.hidden_stride);
    if (width.bytes() != 16) return "rows of hidden tensors are not aligned to 16 bytes";
    if (rows == 0) return nullptr;
    constexpr int W = static_cast<int>(16 / sizeof(T));
    return launch_rows(bwd_kernel<T, W, true>, p, ctas, threads, 6, device, partials);
  });
  if (error != nullptr) return error;
  const ParamGrad grads[] = {p.bwd.dweight, p.bwd.dbias, p.gate_sums, p.up_sums};
  for (int i = 0; i < 4; ++i) sum_columns(grads[i], partials + i * F, ctas, 4 * F, F, device);
  return launch_error();
}

}  // namespace eva02::cuda
