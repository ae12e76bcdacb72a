#pragma once

#include "common/param.h"

namespace eva02 {

// Rows x F elements; every activation has its own row stride (elements), the last dim is contiguous.
struct SublnSwigluFwdParams {
  DType dtype;
  const void *gate, *up;
  Param weight, bias;
  float eps;
  void* out;
  float *mean, *rstd;
  int64_t rows, F;
  int64_t gate_stride, up_stride, out_stride;
};

struct SublnSwigluBwdParams {
  DType dtype;
  const void *dout, *gate, *up;
  Param weight;
  const float *mean, *rstd;
  void *dgate, *dup;  // either may be nullptr, as may the two below
  ParamGrad dweight, dbias;
  int64_t rows, F;
  int64_t dout_stride, gate_stride, up_stride, dgate_stride, dup_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_subln_swiglu_fwd, SublnSwigluFwdParams)
EVA02_LAUNCHER(run_subln_swiglu_bwd, SublnSwigluBwdParams)
