#include "common/param_adapter.h"
#include "common/rope_adapter.h"
#include "rope_attention/rope_attention.h"

// What the CUDA kernels are told besides: the host does not read cu_seqlens, and torch has a switch for tf32.
#if defined(EVA02_CUDA)
#define EVA02_ATTENTION_TARGET_ARGS , int64_t max_seqlen, bool tf32
#define EVA02_ATTENTION_TARGET_SCHEMA ", int max_seqlen, bool tf32"
#define EVA02_SET_ATTENTION_TARGET_ARGS(p) \
  p.max_seqlen = max_seqlen;               \
  p.tf32 = tf32
#else
#define EVA02_ATTENTION_TARGET_ARGS
#define EVA02_ATTENTION_TARGET_SCHEMA ""
#define EVA02_SET_ATTENTION_TARGET_ARGS(p)
#endif

namespace eva02 {
namespace {

HeadTensor head_tensor(const OptTensor& t) {
  if (ptr(t) == nullptr) return {};
  if (t->dim() == 3) return {.data = ptr(t), .batch = 0, .token = t->stride(0), .head = t->stride(1)};
  return {.data = ptr(t), .batch = t->stride(0), .token = t->stride(1), .head = t->stride(2)};
}

// q, k, v: (B, S, H, D), or with cu_seqlens (T, H, D); a contiguous last dim, any other strides. The Python adapter has
// checked shapes and dtypes; what would be read out of bounds is checked here.
RopeAttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& rope_cos,
                                     const OptTensor& rope_sin, const OptTensor& rope_grids,
                                     const std::vector<int64_t>& rope_grid, const std::string& rope_layout,
                                     int64_t num_prefix_tokens, const OptTensor& keep_idx,
                                     const OptTensor& key_padding_mask, const OptTensor& cu_seqlens, bool causal,
                                     double scale, const OptTensor& q_norm, const OptTensor& k_norm, double norm_eps,
                                     const Tensor& out, const Tensor& lse) {
  const bool varlen = cu_seqlens.has_value() && cu_seqlens->defined();
  const int64_t dim = varlen ? 3 : 4;
  STD_TORCH_CHECK(q.dim() == dim && k.dim() == dim && v.dim() == dim, "q, k, v: expected ", dim, " dimensions");
  const int64_t S = q.size(dim - 3), H = q.size(dim - 2), Hkv = k.size(dim - 2), D = q.size(dim - 1);
  const int64_t B = varlen ? cu_seqlens->size(0) - 1 : q.size(0);
  STD_TORCH_CHECK(D % 4 == 0 && D >= 4 && D <= 256,
                  "q: expected a head dim that is a multiple of 4 in [4, 256], found ", D);
  STD_TORCH_CHECK(H == 0 || (Hkv > 0 && H % Hkv == 0), "k: expected a number of heads that divides ", H, ", found ",
                  Hkv);
  RopeTokens tokens{B, S, D, H, Hkv};
  if (varlen) tokens.cu = checked_cu_seqlens(*cu_seqlens, S);
  const bool masked = key_padding_mask.has_value() && key_padding_mask->defined();
  if (masked) {
    STD_TORCH_CHECK(!varlen, "key_padding_mask: cannot be combined with cu_seqlens");
    STD_TORCH_CHECK(key_padding_mask->scalar_type() == torch::headeronly::ScalarType::Bool &&
                        key_padding_mask->dim() == 2 && key_padding_mask->size(0) == B &&
                        key_padding_mask->size(1) == S && key_padding_mask->is_contiguous(),
                    "key_padding_mask: expected a contiguous bool tensor (", B, ", ", S, ")");
  }
  STD_TORCH_CHECK(lse.is_contiguous(), "lse: expected a contiguous tensor");
  return {.dtype = dtype_of(q, "q"),
          .B = B,
          .S = S,
          .H = H,
          .Hkv = Hkv,
          .D = D,
          .cu_seqlens = tokens.cu,
          .q = head_tensor(q),
          .k = head_tensor(k),
          .v = head_tensor(v),
          .out = head_tensor(out),
          .lse = ptr_as<float>(lse),
          .rope = checked_rope_table(rope_cos, rope_sin, rope_grids, rope_grid, rope_layout, num_prefix_tokens,
                                     keep_idx, tokens),
          .key_mask = masked ? ptr_as<const bool>(key_padding_mask) : nullptr,
          .causal = causal,
          .scale = static_cast<float>(scale),
          .q_norm = param_of(q_norm, "q_norm"),
          .k_norm = param_of(k_norm, "k_norm"),
          .norm_eps = static_cast<float>(norm_eps),
          .dout = {},
          .dq = {},
          .dk = {},
          .dv = {},
          .dcos = nullptr,
          .dsin = nullptr,
          .dq_norm = {},
          .dk_norm = {}};
}

void rope_attention_fwd(Tensor q, Tensor k, Tensor v, OptTensor rope_cos, OptTensor rope_sin, OptTensor rope_grids,
                        std::vector<int64_t> rope_grid, std::string rope_layout, int64_t num_prefix_tokens,
                        OptTensor keep_idx, OptTensor key_padding_mask, OptTensor cu_seqlens, bool causal, double scale,
                        OptTensor q_norm, OptTensor k_norm, double norm_eps EVA02_ATTENTION_TARGET_ARGS, Tensor out,
                        Tensor lse) {
  RopeAttentionParams p =
      attention_params(q, k, v, rope_cos, rope_sin, rope_grids, rope_grid, rope_layout, num_prefix_tokens, keep_idx,
                       key_padding_mask, cu_seqlens, causal, scale, q_norm, k_norm, norm_eps, out, lse);
  EVA02_SET_ATTENTION_TARGET_ARGS(p);
  run_rope_attention_fwd(p, target_of(q));
}

void rope_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptTensor rope_cos,
                        OptTensor rope_sin, OptTensor rope_grids, std::vector<int64_t> rope_grid,
                        std::string rope_layout, int64_t num_prefix_tokens, OptTensor keep_idx,
                        OptTensor key_padding_mask, OptTensor cu_seqlens, bool causal, double scale, OptTensor q_norm,
                        OptTensor k_norm, double norm_eps EVA02_ATTENTION_TARGET_ARGS, OptTensor dq, OptTensor dk,
                        OptTensor dv, OptTensor dcos, OptTensor dsin, OptTensor dq_norm, OptTensor dk_norm) {
  RopeAttentionParams p =
      attention_params(q, k, v, rope_cos, rope_sin, rope_grids, rope_grid, rope_layout, num_prefix_tokens, keep_idx,
                       key_padding_mask, cu_seqlens, causal, scale, q_norm, k_norm, norm_eps, out, lse);
  EVA02_SET_ATTENTION_TARGET_ARGS(p);
  p.dout = head_tensor(dout);
  p.dq = head_tensor(dq);
  p.dk = head_tensor(dk);
  p.dv = head_tensor(dv);
  p.dcos = ptr_as<float>(dcos);
  p.dsin = ptr_as<float>(dsin);
  STD_TORCH_CHECK((p.dcos == nullptr) == (p.dsin == nullptr), "dcos, dsin: expected both or neither");
  STD_TORCH_CHECK(p.dcos == nullptr || (p.rope.form != RopeForm::none && p.rope.form != RopeForm::axis),
                  "dcos: expected dense tables");
  p.dq_norm = param_grad_of(dq_norm, "dq_norm");
  p.dk_norm = param_grad_of(dk_norm, "dk_norm");
  run_rope_attention_bwd(p, target_of(dout));
}

}  // namespace

#define EVA02_ATTENTION_SCHEMA                                                                                       \
  EVA02_ROPE_SCHEMA                                                                                                  \
  ", Tensor? key_padding_mask, Tensor? cu_seqlens, bool causal, float scale, Tensor? q_norm, Tensor? k_norm, float " \
  "norm_eps" EVA02_ATTENTION_TARGET_SCHEMA

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("rope_attention_fwd" EVA02_TARGET "(Tensor q, Tensor k, Tensor v, " EVA02_ATTENTION_SCHEMA
        ", Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("rope_attention_bwd" EVA02_TARGET
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
        "lse, " EVA02_ATTENTION_SCHEMA
        ", Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dcos, Tensor(e!)? dsin, Tensor(f!)? dq_norm, "
        "Tensor(g!)? dk_norm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("rope_attention_fwd" EVA02_TARGET, TORCH_BOX(&rope_attention_fwd));
  m.impl("rope_attention_bwd" EVA02_TARGET, TORCH_BOX(&rope_attention_bwd));
}

}  // namespace eva02
