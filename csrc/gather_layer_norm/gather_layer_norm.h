#pragma once

#include "common/param.h"
#include "common/token_index.h"

namespace eva02 {

struct GatherLayerNormFwdParams {
  DType dtype;
  const void* x;
  TokenIndex index;
  Param weight, bias;
  float eps;
  void* out;  // (index.count, C) contiguous
  float *mean, *rstd;
  int64_t seqlen, C;
  int64_t x_batch_stride, x_token_stride;
};

struct GatherLayerNormBwdParams {
  DType dtype;
  const void *dout, *x;  // dout: a contiguous row of C for each entry of the index
  InverseTokenIndex inverse;
  Param weight;
  const float *mean, *rstd;
  void* dx;  // (batch, seqlen, C); may be nullptr, as may the two below
  ParamGrad dweight, dbias;
  int64_t batch, seqlen, C;
  int64_t x_batch_stride, x_token_stride, dx_batch_stride, dx_token_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_gather_layer_norm_fwd, GatherLayerNormFwdParams)
EVA02_LAUNCHER(run_gather_layer_norm_bwd, GatherLayerNormBwdParams)
