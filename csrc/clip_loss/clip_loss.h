#pragma once

#include "common/launcher.h"

namespace eva02 {

// Logit (i, j) is scale * rows[i] . keys[j]; row i belongs to key first + i, and their logit is its target. A loss is a
// log-sum-exp less the target: a number as small as it can be, so that float32 holds enough of it. Row strides in
// elements, last dim contiguous.
struct ClipLossFwdParams {
  DType dtype;
  const void *rows, *keys;
  const float* scale;        // one element
  float *target, *row_loss;  // (M,)
  float* column_loss;        // (N,) or nullptr; it needs M == N
  float* loss;               // one element: sum of the losses over 2 N
  int64_t M, N, D, first;
  int64_t row_stride, key_stride;
};

struct ClipLossBwdParams {
  DType dtype;
  const float *dloss, *scale;  // one element each
  const void *rows, *keys;
  const float *row_target, *row_loss, *key_target, *key_loss;  // (M,), (M,), (N,), (N,)
  void *drows, *dkeys;                                         // dkeys, which needs M == N, and drows may be nullptr
  float* dscale;                                               // one element: the rows' share; may be nullptr
  int64_t M, N, D, first;
  int64_t row_stride, key_stride, drow_stride, dkey_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_clip_loss_fwd, ClipLossFwdParams)
EVA02_LAUNCHER(run_clip_loss_bwd, ClipLossBwdParams)
