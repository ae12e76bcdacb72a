// project_parts: x W^T + b for three weights that are apart, those of q, k and v, in one launch
// Fused     the three products and their biases
// Bytes     x once for all weights, or from L2 where tiles are neighbours; out once
// Launch    product.cuh: a tile is of one weight
// Numerics  as project
// Limits    A (rows, K), weights (N, K) of one stride
// Source    original
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

template <class T>
struct ProjectParts {
  using Params = ProjectPartsParams;
  static constexpr bool kDual = false, kSums = false, kRowSums = false, kWholeWarps = false;
  const Params& p;
  int column, n;
  int64_t first = 0;  // of this part's columns, in out
  float bias[kColumns];

  __device__ ProjectParts(const Params& p, int column, int n, int part = 0) : p(p), column(column), n(n) {
    if (part == 0) load_columns(p.bias[0], column, n, 0.f, bias);
    if (part == 1) load_columns(p.bias[1], column, n, 0.f, bias);
    if (part == 2) load_columns(p.bias[2], column, n, 0.f, bias);
    if (part > 0) first += p.widths[0];
    if (part > 1) first += p.widths[1];
  }
  __device__ void operator()(int row, float (&y)[kColumns], float (&)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] += bias[i];
    store_columns(static_cast<T*>(p.out) + row * p.out_stride + first + column, n, y);
  }
};

}  // namespace

const char* run_project_parts(const ProjectPartsParams& p, const Device& device) {
  return by_dtype(p.product.dtype,
                  [&]<class T>() { return run_product<T, true, true, ProjectParts>(p, nullptr, device); });
}

}  // namespace eva02::cuda
