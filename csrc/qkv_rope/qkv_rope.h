#pragma once

#include "common/param.h"
#include "common/rope_table.h"

namespace eva02 {

// x (M, C) with any row stride; qkv, dqkv (M, N) with any row stride, N = (heads + 2 kv_heads) * D, columns q, k, v.
// weight: up to three contiguous blocks of weight_rows[i] rows on top of each other, (N, C) in all (one packed weight,
// or those of q, k and v); bias likewise. Token t of sequence b is row b * seqlen + t, or cu[b] + t. A null pointer is
// an absent operand or an output that is not wanted; normalize says whether x goes through a LayerNorm first.
struct QkvRopeFwdParams {
  DType dtype;
  const void* x;
  const void* weight[3];
  int64_t weight_rows[3];
  Param bias[3];
  bool normalize;
  Param pre_weight, pre_bias;
  float pre_eps;
  RopeTable rope;
  const int32_t* cu;
  void* qkv;
  float *pre_mean, *pre_rstd;
  int64_t M, C, N, sequences, seqlen, heads, kv_heads, head_dim;
  int64_t x_stride, qkv_stride;
};

struct QkvRopeBwdParams {
  DType dtype;
  const void *dqkv, *x;
  const void* weight[3];
  int64_t weight_rows[3];
  bool normalize;
  Param pre_weight, pre_bias;
  const float *pre_mean, *pre_rstd;
  RopeTable rope;
  const int32_t* cu;
  void* dx;
  void* dweight[3];
  ParamGrad dbias[3];
  ParamGrad dpre_weight, dpre_bias;
  int64_t M, C, N, sequences, seqlen, heads, kv_heads, head_dim;
  int64_t dqkv_stride, x_stride, dx_stride;
};

}  // namespace eva02

EVA02_LAUNCHER(run_qkv_rope_fwd, QkvRopeFwdParams)
EVA02_LAUNCHER(run_qkv_rope_bwd, QkvRopeBwdParams)
