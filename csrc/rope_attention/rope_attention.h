#pragma once

#include "common/launcher.h"
#include "common/param.h"
#include "common/rope_table.h"

namespace eva02 {

// (batch, token, head, channel) with a contiguous last dim; strides in elements. Packed q, k, v are three of these in
// one buffer. Varlen: (token, head, channel), batch stride 0, cu_seqlens tells where a sequence starts.
struct HeadTensor {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct RopeAttentionParams {
  DType dtype;                // of every HeadTensor
  int64_t B, S, H, Hkv, D;    // B sequences; S: tokens of each (varlen: of all of them together)
  const int32_t* cu_seqlens;  // (B + 1), or nullptr
  HeadTensor q, k, v, out;
  float* lse;  // natural log; (B, H, S), varlen (H, S)
  RopeTable rope;
  const bool* key_mask;  // (B, S), true = attend; or nullptr
  bool causal;
  float scale;
  Param q_norm, k_norm;  // (D,) weights of the RMS norm of each head before the rotation
  float norm_eps;
  int64_t max_seqlen = 0;  // CUDA: the longest sequence, since the host does not read cu_seqlens
  bool tf32 = false;       // CUDA: float32 products may be of tf32

  // Backward only; absent gradients are not computed.
  HeadTensor dout, dq, dk, dv;
  float *dcos, *dsin;  // dense tables, overwritten
  ParamGrad dq_norm, dk_norm;
};

}  // namespace eva02

EVA02_LAUNCHER(run_rope_attention_fwd, RopeAttentionParams)
EVA02_LAUNCHER(run_rope_attention_bwd, RopeAttentionParams)
