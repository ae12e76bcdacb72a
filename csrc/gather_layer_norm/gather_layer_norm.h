#pragma once

#include "common/param.h"

namespace eva02 {

// `index` holds `count` rows of the flattened (batch * seqlen) tokens, -1 for padding; checked by the caller.
struct GatherLayerNormFwdParams {
  DType dtype;
  const void* x;
  const int64_t* index;
  Param weight, bias;
  float eps;
  void* out;  // (count, C) contiguous
  float *mean, *rstd;
  int64_t count, seqlen, C;
  int64_t x_batch_stride, x_token_stride;
};

struct GatherLayerNormBwdParams {
  DType dtype;
  const void *dout, *x;  // dout (count, C) contiguous
  const int64_t* index;
  Param weight;
  const float *mean, *rstd;
  void* dx;  // (batch, seqlen, C); may be nullptr, as may the two below
  ParamGrad dweight, dbias;
  int64_t count, batch, seqlen, C;
  int64_t x_batch_stride, x_token_stride, dx_batch_stride, dx_token_stride;
};

}  // namespace eva02

EVA02_CPU_LAUNCHER(run_gather_layer_norm_fwd, GatherLayerNormFwdParams)
EVA02_CPU_LAUNCHER(run_gather_layer_norm_bwd, GatherLayerNormBwdParams)
