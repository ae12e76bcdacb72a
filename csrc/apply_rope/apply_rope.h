#pragma once

#include "common/launcher.h"
#include "common/rope_table.h"

namespace eva02 {

// x, out (B, S, H, D), last dim contiguous, any other strides (elements).
struct ApplyRopeParams {
  DType dtype;
  const void* x;
  void* out;
  int64_t B, S, H, D;
  int64_t x_stride[3], out_stride[3];  // of B, S, H
  bool inverse;
  RopeTable rope;
};

// Gradients of dense tables, float32 and of the tables' shape, overwritten.
struct ApplyRopeTableGradParams {
  DType dtype;
  const void *dout, *x;
  float *dcos, *dsin;
  int64_t B, S, H, D;
  int64_t dout_stride[3], x_stride[3];
  RopeTable rope;
};

}  // namespace eva02

EVA02_LAUNCHER(run_apply_rope_fwd, ApplyRopeParams)
EVA02_LAUNCHER(run_apply_rope_table_grad, ApplyRopeTableGradParams)
