#pragma once

#include "common/launcher.h"
#include "common/token_index.h"

namespace eva02 {

// Row m of pred is compared with row index[m] of target; negative: the row is left out.
// Row strides in elements, last dim contiguous.
struct MaskedCosineLossFwdParams {
  DType dtype;
  const void *pred, *target;
  TokenIndex index;
  float* loss;   // one element
  float* stats;  // (3, M): 1 / max(|pred|, eps), 1 / max(|target|, eps), cosine; zero for a row left out
  int64_t M, D;
  int64_t pred_stride, target_stride;
};

struct MaskedCosineLossBwdParams {
  DType dtype;
  const float* dloss;  // one element
  const void *pred, *target;
  TokenIndex index;
  InverseTokenIndex inverse;  // for dtarget, where there is an index
  const float* stats;
  void *dpred, *dtarget;  // either may be nullptr
  int64_t M, T, D;        // T rows of target
  int64_t pred_stride, target_stride, dpred_stride, dtarget_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_masked_cosine_loss_fwd, MaskedCosineLossFwdParams)
EVA02_LAUNCHER(run_masked_cosine_loss_bwd, MaskedCosineLossBwdParams)
