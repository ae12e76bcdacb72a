// subln_swiglu: y = LayerNorm(h) * w + b over the last dim, h = silu(g) * u, never rounded
// Fused     sigmoid, two multiplications, LayerNorm (eager: 3 kernels); backward in one pass, with the weight and bias
//           gradients as partial sums of CTAs, which a second kernel adds; inside an MLP also y again and the gradients
//           of the biases of gate and up
// Bytes     forward moves 3n elements, backward 5n, with y 6n: the minimum; mean and rstd are 8 bytes a row, a partial
//           sum is a float for 32 rows of a column
// Launch    a CTA takes rows in turn, 8 columns a thread; as many CTAs as fill the device, with sums 32 rows each
// Numerics  float32 inside, one rounding at the store; variance from centred values; sums of unrounded gradients
// Limits    last dim contiguous, any row stride, F up to 4096; 16-byte accesses where pointers and strides allow
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

// kSums: parameters whose gradients are summed: none, the norm's weight and bias, or those and the biases of gate and
// up.
template <class T, int W, int kSums>
__global__ void __launch_bounds__(kMaxRowThreads)
    bwd_kernel(const __grid_constant__ SublnHiddenGradientParams params, float* partials) {
  const SublnSwigluBwdParams& p = params.bwd;
  constexpr bool kInMlp = kSums == 4;
  const int F = static_cast<int>(p.F), cols = kInMlp ? static_cast<int>(params.cols) : F;
  float w[kItems], b[kItems], sums[kSums > 0 ? kSums : 1][kItems] = {};
  load_param<W>(p.weight, F, w, 1.f);
  if constexpr (kInMlp) load_param<W>(params.bias, F, b, 0.f);
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
      if constexpr (kSums > 0) {
        sums[0][i] += d[i] * x[i];
        sums[1][i] += d[i];
      }
      d[i] *= w[i];
    }
    norm_input_gradient(d, x, rstd, F, false);
    if constexpr (kInMlp) {
      if (params.hidden != nullptr) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) x[i] = x[i] * w[i] + b[i];
        store_row<W>(static_cast<T*>(params.hidden) + row * params.hidden_stride, cols, x);
      }
    }
    // Beyond the last column gate and up are zero, and with them their gradients.
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Activation a = silu<T>(g[i]);
      g[i] = d[i] * u[i] * a.slope;
      u[i] = d[i] * a.value;
      if constexpr (kInMlp) {
        sums[2][i] += g[i];
        sums[3][i] += u[i];
      }
    }
    if (p.dgate != nullptr) store_row<W>(static_cast<T*>(p.dgate) + row * p.dgate_stride, cols, g);
    if (p.dup != nullptr) store_row<W>(static_cast<T*>(p.dup) + row * p.dup_stride, cols, u);
  }
  if constexpr (kSums > 0) {
    float* mine = partials + static_cast<int64_t>(blockIdx.x) * kSums * F;
#pragma unroll
    for (int i = 0; i < kSums; ++i) store_partial_sums<W>(mine + i * F, F, sums[i]);
  }
}

template <class T, int W, int kSums>
const char* launch_bwd(const SublnHiddenGradientParams& p, const Device& device) {
  const int64_t F = p.bwd.F, rows = p.bwd.rows;
  const int threads = row_threads(kSums == 4 ? p.cols : F);
  const int ctas = kSums > 0 ? summing_ctas(rows, threads) : row_ctas(rows, threads);
  float* partials = nullptr;
  if (kSums > 0 && (partials = workspace(device, kSums * ctas * F)) == nullptr) return kNoMemory;
  if (rows > 0) {
    bwd_kernel<T, W, kSums><<<ctas, threads, 0, stream_of(device)>>>(p, partials);
    if (const char* error = launch_error()) return error;
  }
  const ParamGrad grads[] = {p.bwd.dweight, p.bwd.dbias, p.gate_sums, p.up_sums};
  for (int i = 0; i < kSums; ++i) sum_columns(grads[i], partials + i * F, ctas, kSums * F, F, device);
  return launch_error();
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
  return by_dtype(p.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.dout, p.dout_stride).rows(p.gate, p.gate_stride).rows(p.up, p.up_stride);
    width.rows(p.dgate, p.dgate_stride).rows(p.dup, p.dup_stride);
    return by_width<T>(width, [&]<int W>() {
      if (param_grads) return launch_bwd<T, W, 2>({.bwd = p}, device);
      return launch_bwd<T, W, 0>({.bwd = p}, device);
    });
  });
}

const char* run_subln_hidden_gradient(const SublnHiddenGradientParams& p, const Device& device) {
  if (p.bwd.F == 0) return nullptr;
  if (p.cols > kMaxColumns) return kRowTooWide;
  return by_dtype(p.bwd.dtype, [&]<class T>() {
    PackWidth width(sizeof(T));
    width.rows(p.bwd.dout, p.bwd.dout_stride).rows(p.bwd.gate, p.bwd.gate_stride).rows(p.bwd.up, p.bwd.up_stride);
    width.rows(p.bwd.dgate, p.bwd.dgate_stride).rows(p.bwd.dup, p.bwd.dup_stride).rows(p.hidden, p.hidden_stride);
    if (width.bytes() != 16) return "rows of hidden tensors are not aligned to 16 bytes";
    return launch_bwd<T, static_cast<int>(16 / sizeof(T)), 4>(p, device);
  });
}

}  // namespace eva02::cuda
