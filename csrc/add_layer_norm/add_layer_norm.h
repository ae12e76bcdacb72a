#pragma once

#include "common/param.h"

namespace eva02 {

// Rows x C elements; every activation has its own row stride (elements), the last dim is contiguous.
// sum = residual + row_scale[row / rows_per_sample] * layer_scale * x; normed = norm(sum) * weight + bias.
struct AddLayerNormFwdParams {
  DType dtype;
  const void *x, *residual;  // residual may be nullptr
  Param weight, bias, layer_scale;
  const float* row_scale;  // nullptr: 1
  float eps;
  bool rms;
  int64_t rows_per_sample;
  void *normed, *sum;  // sum may be nullptr: it is x, or nobody wants it
  float *mean, *rstd;  // mean may be nullptr with rms
  int64_t rows, C;
  int64_t x_stride, residual_stride, normed_stride, sum_stride;
};

struct AddLayerNormBwdParams {
  DType dtype;
  const void *dnormed, *dsum, *sum, *x;  // dsum may be nullptr; x only where layer_scale needs a gradient
  Param weight, layer_scale;
  const float *row_scale, *mean, *rstd;  // row_scale and, with rms, mean may be nullptr
  bool rms;
  int64_t rows_per_sample;
  void *dx, *dresidual;  // either may be nullptr, as may every gradient below
  ParamGrad dweight, dbias, dlayer_scale;
  int64_t rows, C;
  int64_t dnormed_stride, dsum_stride, sum_stride, x_stride, dx_stride, dresidual_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_add_layer_norm_fwd, AddLayerNormFwdParams)
EVA02_LAUNCHER(run_add_layer_norm_bwd, AddLayerNormBwdParams)
