// project: out = residual + row_scale * layer_scale * (A B + bias), for rows of A or their LayerNorm
// Fused     bias, layer scale, drop path, residual (eager: 4 kernels after the product), a LayerNorm of A's rows
// Bytes     A and B once for each tile row or column that they meet, from L2 where tiles are neighbours; residual and
//           out once
// Launch    product.cuh: tiles of 128 x 128, or 64 x 64 where these are too few for the device
// Numerics  float32 sums in a fixed order, float32 epilogue, one rounding; float32 operands in three parts of tf32, or
//           one where allowed; a row's mean is subtracted from its product
// Limits    A (rows, K) with B (N, K) or (K, N), a LayerNorm with the former; rows aligned to 16 bytes are copied
//           asynchronously, others element by element
// Source    original; multistage tiles as in NVIDIA's CUTLASS documentation
#include "gemm/product.cuh"

namespace eva02::cuda {
namespace {

// kNormed: of the LayerNorm of A's rows.
template <class T, bool kNormed>
struct ProjectRows {
  using Params = std::conditional_t<kNormed, ProjectNormedParams, ProjectParams>;
  static constexpr bool kDual = false, kSums = false, kRowSums = false, kWholeWarps = false;
  const Params& all;
  int column, n;
  float bias[kColumns], scale[kColumns], weight_sums[kNormed ? kColumns : 1];

  static __device__ const ProjectParams& project_of(const Params& params) {
    if constexpr (kNormed)
      return params.project;
    else
      return params;
  }
  __device__ ProjectRows(const Params& params, int column, int n) : all(params), column(column), n(n) {
    const ProjectParams& p = project_of(params);
    load_columns(p.bias, column, n, 0.f, bias);
    load_columns(p.layer_scale, column, n, 1.f, scale);
    if constexpr (kNormed) load_columns(params.weight_sums + column, n, weight_sums);
  }
  __device__ void operator()(int row, float (&y)[kColumns], float (&)[kColumns]) const {
    const ProjectParams& p = project_of(all);
    if constexpr (kNormed) {
      const float mean = all.mean[row], rstd = all.rstd[row];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) y[i] = (y[i] - mean * weight_sums[i]) * rstd;
    }
    const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y[i] = (y[i] + bias[i]) * (scale[i] * row_scale);
    if (p.residual != nullptr) {
      float residual[kColumns];
      load_columns(static_cast<const T*>(p.residual) + row * p.residual_stride + column, n, residual);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) y[i] += residual[i];
    }
    const int64_t at = row * p.out_stride + column;
    if (p.out_float32)
      store_columns(static_cast<float*>(p.out) + at, n, y);
    else
      store_columns(static_cast<T*>(p.out) + at, n, y);
  }
};

template <class T>
using Project = ProjectRows<T, false>;
template <class T>
using ProjectNormed = ProjectRows<T, true>;

}  // namespace

const char* run_project(const ProjectParams& p, const Device& device) {
  return by_dtype(p.product.dtype, [&]<class T>() {
    if (p.product.b.k_contiguous) return run_product<T, true, true, Project>(p, nullptr, device);
    return run_product<T, true, false, Project>(p, nullptr, device);
  });
}

const char* run_project_normed(const ProjectNormedParams& p, const Device& device) {
  return by_dtype(p.project.product.dtype,
                  [&]<class T>() { return run_product<T, true, true, ProjectNormed>(p, nullptr, device); });
}

}  // namespace eva02::cuda
