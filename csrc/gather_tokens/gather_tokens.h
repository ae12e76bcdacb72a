#pragma once

#include "common/launcher.h"
#include "common/token_index.h"

namespace eva02 {

struct GatherTokensFwdParams {
  DType dtype;
  const void* x;
  TokenIndex index;
  void* out;  // (index.count, C), row stride out_stride
  int64_t seqlen, C;
  int64_t x_batch_stride, x_token_stride, out_stride;
};

struct GatherTokensBwdParams {
  DType dtype;
  const void* dout;  // a row of C for each entry of the index, row stride dout_stride
  InverseTokenIndex inverse;
  void* dx;  // (batch, seqlen, C)
  int64_t batch, seqlen, C;
  int64_t dout_stride, dx_batch_stride, dx_token_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_gather_tokens_fwd, GatherTokensFwdParams)
EVA02_LAUNCHER(run_gather_tokens_bwd, GatherTokensBwdParams)
