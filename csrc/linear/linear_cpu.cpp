// linear: y = [residual +] row_scale * layer_scale * (x W^T + b)
// Fused     bias, layer scale, drop path, residual and conversion in the product's epilogue; scales on load in backward
// Bytes     forward reads x, W, residual and writes y once; backward reads dout, x and W twice and writes each gradient
//           once; workspace: float32 panels of the left operand, for at most chunk_rows rows at a time
// Launch    two parallel regions per product (gemm/gemm.h) and chunk of rows
// Numerics  float32 sums, one rounding at the store; weight gradients in float32 across chunks of rows
// Limits    last dims contiguous, any row stride of activations
// Source    original
#include "gemm/layers.h"
#include "linear/linear.h"

namespace eva02::EVA02_ISA {
namespace {

template <class T>
void linear_fwd(const LinearFwdParams& p, const Runtime& runtime) {
  const Matrix<T> x{static_cast<const T*>(p.x), p.x_stride}, weight{static_cast<const T*>(p.weight), p.K};
  const T* const residual = static_cast<const T*>(p.residual);
  T* const out = static_cast<T*>(p.out);
  const Floats bias(p.bias, p.N, 0.f), scale(p.layer_scale, p.N, 1.f);
  const RowScale row_scale{p.row_scale, p.rows_per_sample};
  const int64_t chunk = chunk_rows(p.M, p.K);
  for (int64_t r0 = 0; r0 < p.M; r0 += chunk) {
    gemm(runtime, {.m = min64(chunk, p.M - r0), .n = p.N, .k = p.K}, RowPanels<Matrix<T>>{x, r0, p.K},
         WeightRowPanels<Matrix<T>>{weight}, [&](const Tile& t) {
           write_output(t, r0, bias, scale, row_scale, residual, p.residual_stride, out, p.out_stride);
         });
  }
}

template <class T>
void linear_bwd(const LinearBwdParams& p, const Runtime& runtime) {
  using Rows = Matrix<T>;
  const Rows x{static_cast<const T*>(p.x), p.x_stride}, weight{static_cast<const T*>(p.weight), p.K};
  const Floats scale(p.layer_scale, p.N, 1.f), bias(p.bias, p.N, 0.f), ones(Param{}, p.N, 1.f);
  const RowScale row_scale{p.row_scale, p.rows_per_sample};
  const T* const dout = static_cast<const T*>(p.dout);
  const Scaled<T> dy{dout, p.dout_stride, row_scale, ones}, dy_scaled{dout, p.dout_stride, row_scale, scale};
  T* const dx = static_cast<T*>(p.dx);
  const bool dots = p.dlayer_scale.data != nullptr, sums = p.dbias.data != nullptr || dots;
  const bool product = p.dweight != nullptr || dots;

  const int64_t chunk = chunk_rows(p.M, max64(p.N, p.K)), chunks = max64(1, ceil_div(p.M, chunk));
  const OutputGradients<T> gradients(p.N, p.K, product ? chunks : 1, dots);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t r0 = i * chunk, rows = min64(chunk, p.M - r0);
    if (dx != nullptr) {
      gemm(runtime, {.m = rows, .n = p.K, .k = p.N}, RowPanels<Scaled<T>>{dy_scaled, r0, p.N},
           ColumnPanels<Rows>{weight, 0, p.K}, [&](const Tile& t) { write_rows(t, r0, dx, p.dx_stride); });
    }
    if (product)
      gradients.accumulate(runtime, i, rows, dy, r0, x, r0, sums, weight.data, scale, static_cast<T*>(p.dweight));
    else if (sums)
      add_column_sums(runtime, r0, rows, p.N, dy, gradients.column_sums());
  }
  gradients.finish(scale, bias, p.dbias, p.dlayer_scale);
}

}  // namespace

void run_linear_fwd(const LinearFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return linear_fwd<float>(p, runtime);
    case DType::bf16: return linear_fwd<bf16>(p, runtime);
    case DType::f16: return linear_fwd<f16>(p, runtime);
  }
}

void run_linear_bwd(const LinearBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return linear_bwd<float>(p, runtime);
    case DType::bf16: return linear_bwd<bf16>(p, runtime);
    case DType::f16: return linear_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
