#pragma once

#include "common/param.h"

namespace eva02 {

// x (M, K) with any row stride; weight (N, K) contiguous; out, residual, dout (M, N) and dx (M, K) with any row stride.
// row_scale (float32) has one factor for every rows_per_sample rows. A null pointer is an absent operand or an output
// that is not wanted.
struct LinearFwdParams {
  DType dtype;
  const void *x, *weight, *residual;
  Param bias, layer_scale;
  const float* row_scale;
  void* out;
  int64_t M, N, K, rows_per_sample;
  int64_t x_stride, residual_stride, out_stride;
};

struct LinearBwdParams {
  DType dtype;
  const void *dout, *x, *weight;
  Param bias, layer_scale;
  const float* row_scale;
  void *dx, *dweight;
  ParamGrad dbias, dlayer_scale;
  int64_t M, N, K, rows_per_sample;
  int64_t dout_stride, x_stride, dx_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_linear_fwd, LinearFwdParams)
EVA02_LAUNCHER(run_linear_bwd, LinearBwdParams)
