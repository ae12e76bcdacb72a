#pragma once

#include "common/launcher.h"

namespace eva02 {

// Rows x F elements; every tensor has its own row stride (elements), the last dim is contiguous.
// Packed gate|up of width 2F is two of these pointers into one buffer.
struct SwigluFwdParams {
  DType dtype;
  const void *gate, *up;
  void* out;
  int64_t rows, F;
  int64_t gate_stride, up_stride, out_stride;
};

struct SwigluBwdParams {
  DType dtype;
  const void *dout, *gate, *up;
  void *dgate, *dup;
  int64_t rows, F;
  int64_t dout_stride, gate_stride, up_stride, dgate_stride, dup_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_swiglu_fwd, SwigluFwdParams)
EVA02_LAUNCHER(run_swiglu_bwd, SwigluBwdParams)
