// weight_gradient: dW = dy^T a and db = column sums of dy, for up to three weights whose inputs are one
// Fused     the sums of the biases (a pass over dy each), and the products of q, k and v or of gate and up in one
// Bytes     dy and a once for each tile row or column that they meet; each gradient once
// Launch    product.cuh; the CTAs of the first columns multiply dy with ones besides
// Numerics  float32 sums in a fixed order, one rounding; the sums of float32 are exact products, whatever torch allows
// Limits    dy (K, rows) and a (K, N), last dims contiguous
// Source    original
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

constexpr int kParts = 3;

template <class T>
struct WeightGradient {
  using Params = WeightGradientParams;
  static constexpr bool kDual = false, kSums = false, kRowSums = true, kWholeWarps = false;
  const Params& p;
  int column, n;

  __device__ WeightGradient(const Params& p, int column, int n) : p(p), column(column), n(n) {}
  __device__ void operator()(int row, float (&y)[kColumns], float (&)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const WeightPart& part = p.parts[i];
      const int64_t at = row - part.first;
      if (part.weight == nullptr || at < 0 || at >= part.rows) continue;
      if (p.out_float32)
        store_columns(static_cast<float*>(part.weight) + at * part.stride + column, n, y);
      else
        store_columns(static_cast<T*>(part.weight) + at * part.stride + column, n, y);
    }
  }
  static __device__ void store_row_sum(const Params& p, int row, float sum) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const WeightPart& part = p.parts[i];
      const int64_t at = row - part.first;
      if (part.bias.data != nullptr && at >= 0 && at < part.rows) store_param(part.bias, at, sum);
    }
  }
};

}  // namespace

const char* run_weight_gradient(const WeightGradientParams& p, const Device& device) {
  return by_dtype(p.product.dtype,
                  [&]<class T>() { return run_product<T, false, false, WeightGradient>(p, nullptr, device); });
}

}  // namespace eva02::cuda
