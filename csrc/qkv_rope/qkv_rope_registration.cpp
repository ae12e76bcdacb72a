#include "common/param_adapter.h"
#include "common/rope_adapter.h"
#include "qkv_rope/qkv_rope.h"

namespace eva02 {
namespace {

// x and dx are rows (common/param_adapter.h), qkv and dqkv 2-D with a contiguous last dim, weights contiguous; the
// Python adapter has checked shapes and dtypes. wk and wv absent: wq holds the rows of q, k and v.
struct Layout {
  int64_t M, C, heads, kv_heads, head_dim, sequences, seqlen;
  int64_t rows[3];
  const int32_t* cu;
  RopeTable rope;
};

Layout layout_of(const Tensor& x, const Tensor& packed, const OptTensor& wk, const OptTensor& cu_seqlens,
                 int64_t seq_len, int64_t num_heads, int64_t num_kv_heads, const OptTensor& rope_cos,
                 const OptTensor& rope_sin, const OptTensor& rope_grids, const std::vector<int64_t>& rope_grid,
                 const std::string& rope_layout, int64_t num_prefix_tokens, const OptTensor& keep_idx) {
  Layout l{};
  l.M = num_rows(x);
  l.C = num_columns(x);
  l.heads = num_heads;
  l.kv_heads = num_kv_heads;
  l.head_dim = packed.size(1) / (num_heads + 2 * num_kv_heads);
  STD_TORCH_CHECK(l.head_dim <= 1024, "qkv_rope: expected a head dim of at most 1024, found ", l.head_dim);
  const bool is_packed = !wk.has_value() || !wk->defined();
  l.rows[0] = is_packed ? packed.size(1) : num_heads * l.head_dim;
  l.rows[1] = l.rows[2] = is_packed ? 0 : num_kv_heads * l.head_dim;
  RopeTokens tokens{0, seq_len, l.head_dim, num_heads, num_kv_heads};
  if (cu_seqlens.has_value() && cu_seqlens->defined()) {
    tokens.cu = checked_cu_seqlens(*cu_seqlens, l.M);
    tokens.sequences = cu_seqlens->size(0) - 1;
  } else {
    STD_TORCH_CHECK(seq_len > 0 ? l.M % seq_len == 0 : l.M == 0, "seq_len: expected a divisor of the ", l.M,
                    " rows of x, found ", seq_len);
    tokens.sequences = seq_len > 0 ? l.M / seq_len : 0;
  }
  l.sequences = tokens.sequences;
  l.seqlen = seq_len;
  l.cu = tokens.cu;
  l.rope =
      checked_rope_table(rope_cos, rope_sin, rope_grids, rope_grid, rope_layout, num_prefix_tokens, keep_idx, tokens);
  return l;
}

void qkv_rope_fwd(Tensor x, Tensor wq, OptTensor wk, OptTensor wv, OptTensor bq, OptTensor bk, OptTensor bv,
                  OptTensor pre_weight, OptTensor pre_bias, double pre_eps, OptTensor rope_cos, OptTensor rope_sin,
                  OptTensor rope_grids, std::vector<int64_t> rope_grid, std::string rope_layout,
                  int64_t num_prefix_tokens, OptTensor keep_idx, OptTensor cu_seqlens, int64_t seq_len,
                  int64_t num_heads, int64_t num_kv_heads, Tensor qkv, OptTensor pre_mean, OptTensor pre_rstd) {
  const Layout l = layout_of(x, qkv, wk, cu_seqlens, seq_len, num_heads, num_kv_heads, rope_cos, rope_sin, rope_grids,
                             rope_grid, rope_layout, num_prefix_tokens, keep_idx);
  run_qkv_rope_fwd({.dtype = dtype_of(x, "x"),
                    .x = ptr(x),
                    .weight = {ptr(wq), ptr(wk), ptr(wv)},
                    .weight_rows = {l.rows[0], l.rows[1], l.rows[2]},
                    .bias = {param_of(bq, "bq"), param_of(bk, "bk"), param_of(bv, "bv")},
                    .normalize = ptr(pre_mean) != nullptr,
                    .pre_weight = param_of(pre_weight, "pre_weight"),
                    .pre_bias = param_of(pre_bias, "pre_bias"),
                    .pre_eps = static_cast<float>(pre_eps),
                    .rope = l.rope,
                    .cu = l.cu,
                    .qkv = ptr(qkv),
                    .pre_mean = ptr_as<float>(pre_mean),
                    .pre_rstd = ptr_as<float>(pre_rstd),
                    .M = l.M,
                    .C = l.C,
                    .N = qkv.size(1),
                    .sequences = l.sequences,
                    .seqlen = l.seqlen,
                    .heads = l.heads,
                    .kv_heads = l.kv_heads,
                    .head_dim = l.head_dim,
                    .x_stride = row_stride(x),
                    .qkv_stride = qkv.stride(0)},
                   target_of(x));
}

void qkv_rope_bwd(Tensor dqkv, Tensor x, Tensor wq, OptTensor wk, OptTensor wv, OptTensor pre_weight,
                  OptTensor pre_bias, OptTensor pre_mean, OptTensor pre_rstd, OptTensor rope_cos, OptTensor rope_sin,
                  OptTensor rope_grids, std::vector<int64_t> rope_grid, std::string rope_layout,
                  int64_t num_prefix_tokens, OptTensor keep_idx, OptTensor cu_seqlens, int64_t seq_len,
                  int64_t num_heads, int64_t num_kv_heads, OptTensor dx, OptTensor dwq, OptTensor dwk, OptTensor dwv,
                  OptTensor dbq, OptTensor dbk, OptTensor dbv, OptTensor dpre_weight, OptTensor dpre_bias) {
  const Layout l = layout_of(x, dqkv, wk, cu_seqlens, seq_len, num_heads, num_kv_heads, rope_cos, rope_sin, rope_grids,
                             rope_grid, rope_layout, num_prefix_tokens, keep_idx);
  run_qkv_rope_bwd({.dtype = dtype_of(x, "x"),
                    .dqkv = ptr(dqkv),
                    .x = ptr(x),
                    .weight = {ptr(wq), ptr(wk), ptr(wv)},
                    .weight_rows = {l.rows[0], l.rows[1], l.rows[2]},
                    .normalize = ptr(pre_mean) != nullptr,
                    .pre_weight = param_of(pre_weight, "pre_weight"),
                    .pre_bias = param_of(pre_bias, "pre_bias"),
                    .pre_mean = ptr_as<const float>(pre_mean),
                    .pre_rstd = ptr_as<const float>(pre_rstd),
                    .rope = l.rope,
                    .cu = l.cu,
                    .dx = ptr(dx),
                    .dweight = {ptr(dwq), ptr(dwk), ptr(dwv)},
                    .dbias = {param_grad_of(dbq, "dbq"), param_grad_of(dbk, "dbk"), param_grad_of(dbv, "dbv")},
                    .dpre_weight = param_grad_of(dpre_weight, "dpre_weight"),
                    .dpre_bias = param_grad_of(dpre_bias, "dpre_bias"),
                    .M = l.M,
                    .C = l.C,
                    .N = dqkv.size(1),
                    .sequences = l.sequences,
                    .seqlen = l.seqlen,
                    .heads = l.heads,
                    .kv_heads = l.kv_heads,
                    .head_dim = l.head_dim,
                    .dqkv_stride = dqkv.stride(0),
                    .x_stride = row_stride(x),
                    .dx_stride = row_stride(dx)},
                   target_of(dqkv));
}

}  // namespace

#define EVA02_QKV_ARGS EVA02_ROPE_SCHEMA ", Tensor? cu_seqlens, int seq_len, int num_heads, int num_kv_heads, "

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("qkv_rope_fwd" EVA02_TARGET
        "(Tensor x, Tensor wq, Tensor? wk, Tensor? wv, Tensor? bq, Tensor? bk, Tensor? bv, "
        "Tensor? pre_weight, Tensor? pre_bias, float pre_eps, " EVA02_QKV_ARGS
        "Tensor(a!) qkv, Tensor(b!)? pre_mean, Tensor(c!)? pre_rstd) -> ()");
  m.def("qkv_rope_bwd" EVA02_TARGET
        "(Tensor dqkv, Tensor x, Tensor wq, Tensor? wk, Tensor? wv, Tensor? pre_weight, "
        "Tensor? pre_bias, Tensor? pre_mean, Tensor? pre_rstd, " EVA02_QKV_ARGS
        "Tensor(a!)? dx, Tensor(b!)? dwq, Tensor(c!)? dwk, Tensor(d!)? dwv, Tensor(e!)? dbq, Tensor(f!)? dbk, "
        "Tensor(g!)? dbv, Tensor(h!)? dpre_weight, Tensor(i!)? dpre_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("qkv_rope_fwd" EVA02_TARGET, TORCH_BOX(&qkv_rope_fwd));
  m.impl("qkv_rope_bwd" EVA02_TARGET, TORCH_BOX(&qkv_rope_bwd));
}

}  // namespace eva02
