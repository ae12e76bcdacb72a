#include "apply_rope/apply_rope.h"
#include "common/rope_adapter.h"

namespace eva02 {
namespace {

// x, out, dout: (B, S, H, D) with a contiguous last dim; the Python adapter has checked shapes and dtypes.
RopeTokens tokens_of(const Tensor& x) {
  const RopeTokens tokens{x.size(0), x.size(1), x.size(3), x.size(2), x.size(2)};
  STD_TORCH_CHECK(tokens.head_dim % 4 == 0 && tokens.head_dim >= 4 && tokens.head_dim <= 256,
                  "x: expected a head dim that is a multiple of 4 in [4, 256], found ", tokens.head_dim);
  return tokens;
}

void apply_rope_fwd(Tensor x, OptTensor rope_cos, OptTensor rope_sin, OptTensor rope_grids,
                    std::vector<int64_t> rope_grid, std::string rope_layout, int64_t num_prefix_tokens,
                    OptTensor keep_idx, bool inverse, Tensor out) {
  run_apply_rope_fwd({.dtype = dtype_of(x, "x"),
                      .x = ptr(x),
                      .out = ptr(out),
                      .B = x.size(0),
                      .S = x.size(1),
                      .H = x.size(2),
                      .D = x.size(3),
                      .x_stride = {x.stride(0), x.stride(1), x.stride(2)},
                      .out_stride = {out.stride(0), out.stride(1), out.stride(2)},
                      .inverse = inverse,
                      .rope = checked_rope_table(rope_cos, rope_sin, rope_grids, rope_grid, rope_layout,
                                                 num_prefix_tokens, keep_idx, tokens_of(x))},
                     target_of(x));
}

void apply_rope_table_grad(Tensor dout, Tensor x, OptTensor rope_cos, OptTensor rope_sin, OptTensor rope_grids,
                           std::vector<int64_t> rope_grid, std::string rope_layout, int64_t num_prefix_tokens,
                           OptTensor keep_idx, Tensor dcos, Tensor dsin) {
  const RopeTable rope = checked_rope_table(rope_cos, rope_sin, rope_grids, rope_grid, rope_layout, num_prefix_tokens,
                                            keep_idx, tokens_of(x));
  STD_TORCH_CHECK(rope.form != RopeForm::none && rope.form != RopeForm::axis,
                  "apply_rope_table_grad: expected dense tables");
  run_apply_rope_table_grad({.dtype = dtype_of(x, "x"),
                             .dout = ptr(dout),
                             .x = ptr(x),
                             .dcos = ptr_as<float>(dcos),
                             .dsin = ptr_as<float>(dsin),
                             .B = x.size(0),
                             .S = x.size(1),
                             .H = x.size(2),
                             .D = x.size(3),
                             .dout_stride = {dout.stride(0), dout.stride(1), dout.stride(2)},
                             .x_stride = {x.stride(0), x.stride(1), x.stride(2)},
                             .rope = rope},
                            target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("apply_rope_fwd" EVA02_TARGET "(Tensor x, " EVA02_ROPE_SCHEMA ", bool inverse, Tensor(a!) out) -> ()");
  m.def("apply_rope_table_grad" EVA02_TARGET "(Tensor dout, Tensor x, " EVA02_ROPE_SCHEMA
        ", Tensor(a!) dcos, Tensor(b!) dsin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("apply_rope_fwd" EVA02_TARGET, TORCH_BOX(&apply_rope_fwd));
  m.impl("apply_rope_table_grad" EVA02_TARGET, TORCH_BOX(&apply_rope_table_grad));
}

}  // namespace eva02
