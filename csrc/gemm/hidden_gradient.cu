// hidden_gradient: the gradients of gate and up (or of what a GELU takes) behind the product that gives that of the
// hidden layer
// Fused     the activation's gradient, the activation again for the weight's gradient, and the sums of columns for the
//           biases' (eager: 8 kernels after the product)
// Bytes     reads gate and up once, writes their gradients and, where wanted, the hidden layer once; partial sums are
//           two floats for 64 rows (16 with the smaller tile) of a column
// Launch    product.cuh
// Numerics  float32 sums and activation, one rounding of each output; column sums of unrounded gradients, in a fixed
//           order
// Limits    A (rows, K), B (K, N); hidden tensors have rows padded to 8 columns
// Source    original
#include "common/activations.cuh"
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

template <class T, bool kGelu>
struct HiddenGradient {
  using Params = HiddenGradientParams;
  static constexpr bool kDual = false, kSums = true, kRowSums = false, kWholeWarps = false;
  const Params& p;
  int column, n;

  __device__ HiddenGradient(const Params& p, int column, int n) : p(p), column(column), n(n) {}
  // y becomes the gradient of gate, y2 that of up.
  __device__ void operator()(int row, float (&y)[kColumns], float (&y2)[kColumns]) const {
    const int64_t at = row * p.gate_stride + column;
    float gate[kColumns], hidden[kColumns];
    load_columns(static_cast<const T*>(p.gate) + at, n, gate);
    if constexpr (kGelu) {
      float bias[kColumns], centre[kColumns];  // for each row from the cache: registers are dearer
      load_columns(p.gate_bias, column, n, 0.f, bias);
      load_columns(p.centre, column, n, 0.f, centre);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const Activation a = gelu(gate[i] + bias[i]);
        hidden[i] = a.value - centre[i];
        y[i] *= a.slope;
        y2[i] = 0.f;
      }
    } else {
      float up[kColumns];
      load_columns(static_cast<const T*>(p.up) + at, n, up);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const Activation a = silu<T>(gate[i]);
        hidden[i] = a.value * up[i];
        y2[i] = y[i] * a.value;
        y[i] *= up[i] * a.slope;
      }
      store_hidden<T>(p.dup, row, p.dgate_stride, column, y2);
    }
    store_hidden<T>(p.dgate, row, p.dgate_stride, column, y);
    store_hidden<T>(p.hidden, row, p.hidden_stride, column, hidden);
  }
};

template <class T>
using SwiGluGradient = HiddenGradient<T, false>;
template <class T>
using GeluGradient = HiddenGradient<T, true>;

}  // namespace

const char* run_hidden_gradient(const HiddenGradientParams& p, const Device& device) {
  const bool wants_sums = p.gate_sums.data != nullptr || p.up_sums.data != nullptr;
  if (wants_sums && p.product.values != nullptr) return "column sums need the product";
  const int64_t N = p.product.N, parts = p.product.rows == 0 ? 0 : sum_parts(p.product, false);
  float* sums = nullptr;
  if (wants_sums && (sums = workspace(device, parts * 2 * N)) == nullptr) return kNoMemory;
  const char* error = by_dtype(p.product.dtype, [&]<class T>() {
    if (p.up == nullptr) return run_product<T, true, false, GeluGradient>(p, sums, device);
    return run_product<T, true, false, SwiGluGradient>(p, sums, device);
  });
  if (error != nullptr) return error;
  sum_columns(p.gate_sums, sums, static_cast<int>(parts), 2 * N, N, device);
  sum_columns(p.up_sums, sums + N, static_cast<int>(parts), 2 * N, N, device);
  return launch_error();
}

}  // namespace eva02::cuda
