#include "common/token_rows.h"
#include "gather_tokens/gather_tokens.h"

namespace eva02 {
namespace {

// x and dx are (B, S, C) with a contiguous last dim; out and dout hold one row of C elements per index, contiguous:
// (B, K, C) or (M, C). The Python adapter has checked shapes and dtypes; values of the index are
// checked here, on the CPU.
void gather_tokens_fwd(Tensor x, Tensor idx, Tensor out) {
  run_gather_tokens_fwd({.dtype = dtype_of(x, "x"),
                         .x = ptr(x),
                         .index = token_index(idx, x.size(0), x.size(1), "idx"),
                         .out = ptr(out),
                         .seqlen = x.size(1),
                         .C = x.size(2),
                         .x_batch_stride = x.stride(0),
                         .x_token_stride = x.stride(1),
                         .out_stride = x.size(2)},
                        target_of(x));
}

void gather_tokens_bwd(Tensor dout, Tensor entries, Tensor offsets, Tensor dx) {
  run_gather_tokens_bwd({.dtype = dtype_of(dx, "dx"),
                         .dout = ptr(dout),
                         .inverse = inverse_of(entries, offsets),
                         .dx = ptr(dx),
                         .batch = dx.size(0),
                         .seqlen = dx.size(1),
                         .C = dx.size(2),
                         .dout_stride = dx.size(2),
                         .dx_batch_stride = dx.stride(0),
                         .dx_token_stride = dx.stride(1)},
                        target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("gather_tokens_fwd" EVA02_TARGET "(Tensor x, Tensor idx, Tensor(a!) out) -> ()");
  m.def("gather_tokens_bwd" EVA02_TARGET "(Tensor dout, Tensor entries, Tensor offsets, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("gather_tokens_fwd" EVA02_TARGET, TORCH_BOX(&gather_tokens_fwd));
  m.impl("gather_tokens_bwd" EVA02_TARGET, TORCH_BOX(&gather_tokens_bwd));
}

}  // namespace eva02
