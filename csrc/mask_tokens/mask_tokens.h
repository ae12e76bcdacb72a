#pragma once

#include "common/param.h"

namespace eva02 {

// Strides in elements; the last dim of patches, out and their gradients is contiguous. N = num_prefix + P.
struct MaskTokensFwdParams {
  DType dtype;
  const void* patches;  // (B, P, C)
  const bool* mask;     // (B, P), true = replaced by the mask token; nullptr: none
  Param mask_token;     // (C,)
  Param pos_embed;      // (N, C)
  Param prefix_tokens;  // (num_prefix, C)
  void* out;            // (B, N, C)
  int64_t batch, P, num_prefix, C;
  int64_t patches_batch_stride, patches_token_stride, mask_batch_stride, mask_token_stride;
  int64_t out_batch_stride, out_token_stride;
};

struct MaskTokensBwdParams {
  DType dtype;
  const void* dout;  // (B, N, C)
  const bool* mask;
  void* dpatches;  // may be nullptr, as may the three below
  ParamGrad dmask_token, dpos_embed, dprefix_tokens;
  int64_t batch, P, num_prefix, C;
  int64_t dout_batch_stride, dout_token_stride, mask_batch_stride, mask_token_stride;
  int64_t dpatches_batch_stride, dpatches_token_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_mask_tokens_fwd, MaskTokensFwdParams)
EVA02_LAUNCHER(run_mask_tokens_bwd, MaskTokensBwdParams)
