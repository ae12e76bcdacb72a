#pragma once

#include "common/param.h"

namespace eva02 {

// x (M, C), out, dout, dx with any row stride; w_gate, w_up (F, C) and w_down (C, F) contiguous. gate_up is (M, 2, Fp):
// row stride 2 Fp, gate at 0, up at Fp. row_scale (float32) has one factor for every rows_per_sample rows.
// A null pointer is an absent operand or an output that is not wanted; pre_norm and sub_norm say which LayerNorms there
// are (their weights may be absent, their statistics not).
struct SwigluMlpShape {
  DType dtype;
  const void* x;
  const void *w_gate, *w_up, *w_down;
  Param b_gate, b_up, b_down;
  bool sub_norm, pre_norm, add_x;
  Param norm_weight, norm_bias, pre_weight, pre_bias;
  Param layer_scale;
  const float* row_scale;
  int64_t M, C, F, Fp, rows_per_sample;
  int64_t x_stride;
};

struct SwigluMlpFwdParams {
  SwigluMlpShape s;
  float eps, pre_eps;
  void *out, *gate_up;
  float *mean, *rstd, *pre_mean, *pre_rstd;
  int64_t out_stride;
};

struct SwigluMlpBwdParams {
  SwigluMlpShape s;
  const void *dout, *gate_up;  // gate_up nullptr: recomputed from x
  const float *mean, *rstd, *pre_mean, *pre_rstd;
  void *dx, *dw_gate, *dw_up, *dw_down;
  ParamGrad db_gate, db_up, db_down, dnorm_weight, dnorm_bias, dpre_weight, dpre_bias, dlayer_scale;
  int64_t dout_stride, dx_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_swiglu_mlp_fwd, SwigluMlpFwdParams)
EVA02_LAUNCHER(run_swiglu_mlp_bwd, SwigluMlpBwdParams)
