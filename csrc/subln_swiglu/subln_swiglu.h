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

// The same inside an MLP, with the normalised hidden layer again and the column sums of dgate and dup, the gradients of
// the projections' biases. dgate, dup and hidden have `cols` columns, those beyond F become zero; all rows are aligned
// to 16 bytes.
struct SublnHiddenGradientParams {
  SublnSwigluBwdParams bwd;
  Param bias;
  void* hidden;                  // may be nullptr
  ParamGrad gate_sums, up_sums;  // as may these
  int64_t cols, hidden_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_subln_swiglu_fwd, SublnSwigluFwdParams)
EVA02_LAUNCHER(run_subln_swiglu_bwd, SublnSwigluBwdParams)
#if defined(EVA02_CUDA)
EVA02_LAUNCHER(run_subln_hidden_gradient, SublnHiddenGradientParams)
#endif
