#include "common/token_rows.h"
#include "gather_tokens/gather_tokens.h"

namespace eva02 {
namespace {

// x and dx are (B, S, C) with a contiguous last dim; out and dout hold one row of C elements per index, contiguous:
// (B, K, C) or (M, C). The Python adapter has checked shapes and dtypes; indices are checked here.
void gather_tokens_fwd_cpu(Tensor x, Tensor idx, Tensor out) {
  const std::vector<int64_t> index = token_rows(idx, x.size(0), x.size(1), "idx");
  run_gather_tokens_fwd({.dtype = dtype_of(x, "x"),
                         .x = ptr(x),
                         .index = index.data(),
                         .out = ptr(out),
                         .count = static_cast<int64_t>(index.size()),
                         .seqlen = x.size(1),
                         .C = x.size(2),
                         .x_batch_stride = x.stride(0),
                         .x_token_stride = x.stride(1),
                         .out_stride = x.size(2)},
                        torch_runtime());
}

void gather_tokens_bwd_cpu(Tensor dout, Tensor idx, Tensor dx) {
  const std::vector<int64_t> index = token_rows(idx, dx.size(0), dx.size(1), "idx");
  run_gather_tokens_bwd({.dtype = dtype_of(dx, "dx"),
                         .dout = ptr(dout),
                         .index = index.data(),
                         .dx = ptr(dx),
                         .count = static_cast<int64_t>(index.size()),
                         .batch = dx.size(0),
                         .seqlen = dx.size(1),
                         .C = dx.size(2),
                         .dout_stride = dx.size(2),
                         .dx_batch_stride = dx.stride(0),
                         .dx_token_stride = dx.stride(1)},
                        torch_runtime());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("gather_tokens_fwd_cpu(Tensor x, Tensor idx, Tensor(a!) out) -> ()");
  m.def("gather_tokens_bwd_cpu(Tensor dout, Tensor idx, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, CPU, m) {
  m.impl("gather_tokens_fwd_cpu", TORCH_BOX(&gather_tokens_fwd_cpu));
  m.impl("gather_tokens_bwd_cpu", TORCH_BOX(&gather_tokens_bwd_cpu));
}

}  // namespace eva02
