// Matrix products of the CUDA operators, with what surrounds them in their epilogue: raw pointers only. The CPU's are
// gemm.h's.
#pragma once

#include "common/param.h"
#include "common/rope_table.h"

namespace eva02 {

// An operand's outer index (a row of A, a column of B) and k: element (i, k) is at i * stride + k where k is
// contiguous, else at k * stride + i.
struct Operand {
  const void* data = nullptr;
  int64_t stride = 0;
  bool k_contiguous = true;
};

// A rows x K times B K x N, or what another library has made of it: then the epilogue alone is left.
struct Product {
  DType dtype;                   // of operands and of every activation
  bool tf32;                     // float32 operands may be rounded to tf32
  Operand a, b, b2;              // b2: a second product with A, where there is one
  const void *values, *values2;  // (rows, N): the products, where they are known
  int64_t values_stride;
  int64_t rows, N, K;
};

// out = residual + row_scale[row / rows_per_sample] * layer_scale * (y + bias)
struct ProjectParams {
  Product product;
  Param bias, layer_scale;
  const float* row_scale;  // nullptr: 1
  int64_t rows_per_sample;
  const void* residual;
  void* out;
  bool out_float32;  // beside 16-bit operands
  int64_t residual_stride, out_stride;
};

// gate = y + gate_bias, up = y2 + up_bias, hidden = silu(gate) * up; without a second product gate = y and hidden =
// gelu(gate + gate_bias). Outputs have rows padded to 8 columns, the padding becomes zero.
struct ActivateParams {
  Product product;
  Param gate_bias, up_bias;
  void *gate, *up, *hidden;  // any may be nullptr
  int64_t gate_stride, hidden_stride;
  // For a LayerNorm of silu(gate) * up that the next product takes in (FoldNormParams): hidden is multiplied by its
  // weight, and pieces are (ceil(N / kNormPiece), rows, 2): the mean of a row's columns, and the squares about it.
  Param norm_weight;
  float* pieces;
};

constexpr int kNormPiece = 32;

// What a product with W takes a LayerNorm of its rows h in by, from h * norm_weight: with weight_sums = W norm_weight
// and shift = W norm_bias + bias, W LayerNorm(h) + bias = rstd * (W (h * norm_weight) - mean * weight_sums) + shift.
struct FoldNormParams {
  DType dtype;  // of weight (N, F)
  const float* pieces;
  Param norm_weight, norm_bias, bias;
  const void* weight;
  float eps;
  float *mean, *rstd, *weight_sums, *shift;
  int64_t rows, F, N;
  int64_t weight_stride;
};

// As ProjectParams, whose bias is the shift.
struct ProjectNormedParams {
  ProjectParams project;
  const float *mean, *rstd, *weight_sums;
};

// out = A B + bias for three weights (and biases) that are apart, whose columns follow one another in out; `b` is the
// first's, `N` of all.
struct ProjectPartsParams {
  Product product;
  const void* weights[3];
  Param bias[3];
  int64_t widths[3];
  void* out;
  int64_t out_stride;
};

// Gradients of the weights (and biases) of projections of one input, from product = dy^T a: rows first ... of the
// product are those of a part's weight, sums of dy those of its bias.
struct WeightPart {
  void* weight;    // nullptr: not wanted
  ParamGrad bias;  // as here
  int64_t first, rows, stride;
};
struct WeightGradientParams {
  Product product;
  WeightPart parts[3];
  bool sums_rows;    // whether any bias is wanted
  bool out_float32;  // beside 16-bit operands
};

// For y, the gradient of hidden as ActivateParams has it: dgate, dup (without up: of a GELU) and hidden again; rows are
// padded likewise. Of a GELU: gate's bias, and what is subtracted from hidden's columns (N,), if anything.
struct HiddenGradientParams {
  Product product;
  const void *gate, *up;
  Param gate_bias, centre;
  void *dgate, *dup, *hidden;    // hidden may be nullptr
  ParamGrad gate_sums, up_sums;  // of the columns of dgate and dup
  int64_t gate_stride, dgate_stride, hidden_stride;
};

// out = y + bias with its first `rotated` columns, heads of q and then of k, rotated (interleaved pairs). Heads of k
// alone are like heads of q.
struct ProjectRopeParams {
  Product product;
  Param bias;
  RopeTable rope;
  void* out;
  int64_t out_stride;
  int64_t seq_len, heads;  // tokens of a sample; heads of q
  int64_t rotated;
};

// row_scaled = row_scale * x, scaled = layer_scale * row_scale * x, sums = column sums of row_scale * x.
struct ScaleAndSumParams {
  DType dtype;
  const void* x;
  Param layer_scale;
  const float* row_scale;
  int64_t rows_per_sample;
  void *scaled, *row_scaled;  // either may be nullptr
  ParamGrad sums;
  int64_t rows, N;
  int64_t x_stride, scaled_stride, row_scaled_stride;
};

// For y = layer_scale * (a W^T + b), from product + sums centre = G, the gradient of W without the layer scale (centre
// is what columns of a lack in the product), and sums, that of b: dweight = layer_scale * G, dbias = layer_scale *
// sums, dlayer_scale = row sums of W G, plus b * sums.
struct FinishGradientsParams {
  DType dtype;
  const float *product, *sums, *centre;  // any may be nullptr
  const void* weight;
  Param bias, layer_scale;
  void* dweight;
  ParamGrad dbias, dlayer_scale;
  int64_t N, K;
  int64_t weight_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_project, ProjectParams)
EVA02_LAUNCHER(run_activate, ActivateParams)
EVA02_LAUNCHER(run_fold_norm, FoldNormParams)
EVA02_LAUNCHER(run_project_normed, ProjectNormedParams)
EVA02_LAUNCHER(run_project_parts, ProjectPartsParams)
EVA02_LAUNCHER(run_weight_gradient, WeightGradientParams)
EVA02_LAUNCHER(run_hidden_gradient, HiddenGradientParams)
EVA02_LAUNCHER(run_project_rope, ProjectRopeParams)
EVA02_LAUNCHER(run_scale_and_sum, ScaleAndSumParams)
EVA02_LAUNCHER(run_finish_gradients, FinishGradientsParams)
