#pragma once

#include "common/param.h"

namespace eva02 {

// x (M, C), out, dout, dx with any row stride; w1 (F, C) and w2 (C, F) contiguous; hidden (M, Fp), before b1
// and the activation. row_scale (float32) has one factor for every rows_per_sample rows. A null pointer is an absent
// operand or an output that is not wanted; pre_norm says whether x goes through a LayerNorm first.
struct GeluMlpShape {
  DType dtype;
  const void *x, *w1, *w2;
  Param b1, b2;
  bool pre_norm, add_x;
  Param pre_weight, pre_bias;
  Param layer_scale;
  const float* row_scale;
  int64_t M, C, F, Fp, rows_per_sample;
  int64_t x_stride;
};

struct GeluMlpFwdParams {
  GeluMlpShape s;
  float pre_eps;
  void *out, *hidden;
  float *pre_mean, *pre_rstd;
  int64_t out_stride;
};

struct GeluMlpBwdParams {
  GeluMlpShape s;
  const void *dout, *hidden;  // hidden nullptr: recomputed from x
  const float *pre_mean, *pre_rstd;
  void *dx, *dw1, *dw2;
  ParamGrad db1, db2, dpre_weight, dpre_bias, dlayer_scale;
  int64_t dout_stride, dx_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_gelu_mlp_fwd, GeluMlpFwdParams)
EVA02_LAUNCHER(run_gelu_mlp_bwd, GeluMlpBwdParams)
