// activate: gate and up projections over one tile of A, with SwiGLU of them; or one projection with its exact GELU
// Fused     both products, biases, sigmoid and multiplications (eager: 2 products and 4 kernels); where a LayerNorm of
//           the hidden layer follows, its weight and the statistics of pieces of rows (fold_norm.cu)
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
  static constexpr bool kDual = true, kSums = false, kRowSums = false, kWholeWarps = true;
  const Params& p;
  int column, n;
  float gate_bias[kColumns], up_bias[kColumns], norm_weight[kColumns];

  __device__ SwiGlu(const Params& p, int column, int n) : p(p), column(column), n(n) {
    load_columns(p.gate_bias, column, n, 0.f, gate_bias);
    load_columns(p.up_bias, column, n, 0.f, up_bias);
    load_columns(p.norm_weight, column, n, 1.f, norm_weight);
  }
  __device__ void operator()(int row, float (&gate)[kColumns], float (&up)[kColumns]) const {
    const bool there = row < p.product.rows && n > 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      gate[i] += gate_bias[i];
      up[i] += up_bias[i];
    }
    if (there) {
      store_hidden<T>(p.gate, row, p.gate_stride, column, gate);
      store_hidden<T>(p.up, row, p.gate_stride, column, up);
    }
    if (p.hidden == nullptr) return;
    if (p.pieces != nullptr) {  // the statistics are those of what is kept
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        gate[i] = rounded<T>(gate[i]);
        up[i] = rounded<T>(up[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) up[i] *= silu<T>(gate[i]).value;
    if (p.pieces != nullptr) {
      store_piece(row, up);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) up[i] *= norm_weight[i];
    }
    if (there) store_hidden<T>(p.hidden, row, p.hidden_stride, column, up);
  }
  // Mean and squares about it of the 32 columns of a row that four lanes hold.
  __device__ void store_piece(int row, const float (&h)[kColumns]) const {
    static_assert(kNormPiece == 4 * kColumns);
    const int lane = threadIdx.x % 4, first = column - lane * kColumns, piece = first / kNormPiece;
    const int columns = min(kNormPiece, static_cast<int>(p.product.N) - first);
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum += i < n ? h[i] : 0.f;
    const float mean = quad_sum(sum) / static_cast<float>(columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) squares += i < n ? (h[i] - mean) * (h[i] - mean) : 0.f;
    squares = quad_sum(squares);
    if (lane == 0 && columns > 0 && row < p.product.rows)
      reinterpret_cast<float2*>(p.pieces)[piece * p.product.rows + row] = make_float2(mean, squares);
  }
  static __device__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};

template <class T>
struct Gelu {
  using Params = ActivateParams;
  static constexpr bool kDual = false, kSums = false, kRowSums = false, kWholeWarps = false;
  const Params& p;
  int column;
  float bias[kColumns];

  __device__ Gelu(const Params& p, int column, int n) : p(p), column(column) {
    load_columns(p.gate_bias, column, n, 0.f, bias);
  }
  __device__ void operator()(int row, float (&gate)[kColumns], float (&)[kColumns]) const {
    store_hidden<T>(p.gate, row, p.gate_stride, column, gate);
    if (p.hidden == nullptr) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) gate[i] = gelu(gate[i] + bias[i]).value;
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
