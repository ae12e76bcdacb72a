// activate: gate and up projections over one tile of A, with SwiGLU of them; or one projection with its exact GELU
// Fused     both products, biases, sigmoid and multiplications (eager: 2 products and 4 kernels)
// Bytes     A once for both products; writes gate and up where they are kept, and the hidden layer once
// Launch    product.cuh: a tile is 64 columns of each product (32 of the smaller tile)
// Numerics  float32 sums and activation, one rounding of each output
// Limits    A (rows, K), weights (N, K) of one stride; hidden tensors have rows padded to 8 columns
// Source    original; Shazeer, arXiv:2002.05202; Hendrycks and Gimpel, arXiv:1606.08415
#include "common/activations.cuh"
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

template <class T>
struct SwiGlu {
  using Params = ActivateParams;
  static constexpr bool kDual = true, kSums = false;
  const Params& p;
  int column;
  float gate_bias[kColumns], up_bias[kColumns];

  __device__ SwiGlu(const Params& p, int column, int n) : p(p), column(column) {
    load_columns(p.gate_bias, column, n, 0.f, gate_bias);
    load_columns(p.up_bias, column, n, 0.f, up_bias);
  }
  __device__ void operator()(int row, float (&gate)[kColumns], float (&up)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      gate[i] += gate_bias[i];
      up[i] += up_bias[i];
    }
    store_hidden<T>(p.gate, row, p.gate_stride, column, gate);
    store_hidden<T>(p.up, row, p.gate_stride, column, up);
    if (p.hidden == nullptr) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) up[i] *= silu<T>(gate[i]).value;
    store_hidden<T>(p.hidden, row, p.hidden_stride, column, up);
  }
};

template <class T>
struct Gelu {
  using Params = ActivateParams;
  static constexpr bool kDual = false, kSums = false;
  const Params& p;
  int column;
  float bias[kColumns];

  __device__ Gelu(const Params& p, int column, int n) : p(p), column(column) {
    load_columns(p.gate_bias, column, n, 0.f, bias);
  }
  __device__ void operator()(int row, float (&gate)[kColumns], float (&)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) gate[i] += bias[i];
    store_hidden<T>(p.gate, row, p.gate_stride, column, gate);
    if (p.hidden == nullptr) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) gate[i] = gelu(gate[i]).value;
    store_hidden<T>(p.hidden, row, p.hidden_stride, column, gate);
  }
};

}  // namespace

const char* run_activate(const ActivateParams& p, const Device& device) {
  const bool two = p.product.b2.data != nullptr || p.product.values2 != nullptr;
  return by_dtype(p.product.dtype, [&]<class T>() {
    if (two) return run_product<T, true, true, SwiGlu>(p, nullptr, device);
    return run_product<T, true, true, Gelu>(p, nullptr, device);
  });
}

}  // namespace eva02::cuda
