#pragma once

#include "common/cpu.h"

namespace eva02 {

// `index` holds `count` rows of the flattened (batch * seqlen) tokens, -1 for padding; checked by the caller.
struct GatherTokensFwdParams {
  DType dtype;
  const void* x;
  const int64_t* index;
  void* out;  // (count, C), row stride out_stride
  int64_t count, seqlen, C;
  int64_t x_batch_stride, x_token_stride, out_stride;
};

struct GatherTokensBwdParams {
  DType dtype;
  const void* dout;  // (count, C), row stride dout_stride
  const int64_t* index;
  void* dx;  // (batch, seqlen, C)
  int64_t count, batch, seqlen, C;
  int64_t dout_stride, dx_batch_stride, dx_token_stride;
};

}  // namespace eva02

EVA02_CPU_LAUNCHER(run_gather_tokens_fwd, GatherTokensFwdParams)
EVA02_CPU_LAUNCHER(run_gather_tokens_bwd, GatherTokensBwdParams)
