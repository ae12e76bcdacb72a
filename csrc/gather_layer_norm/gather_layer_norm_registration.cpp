#include "common/param_adapter.h"
#include "common/token_rows.h"
#include "gather_layer_norm/gather_layer_norm.h"

namespace eva02 {
namespace {

// x and dx are (B, S, C) with a contiguous last dim; out and dout hold one row of C elements per index, contiguous;
// mean and rstd one float32 per index. The Python adapter has checked shapes and dtypes; values of the index
// are checked here, on the CPU.
void gather_layer_norm_fwd(Tensor x, Tensor idx, Tensor weight, Tensor bias, double eps, Tensor out, Tensor mean,
                           Tensor rstd) {
  run_gather_layer_norm_fwd({.dtype = dtype_of(x, "x"),
                             .x = ptr(x),
                             .index = token_index(idx, x.size(0), x.size(1), "idx"),
                             .weight = param_of(weight, "weight"),
                             .bias = param_of(bias, "bias"),
                             .eps = static_cast<float>(eps),
                             .out = ptr(out),
                             .mean = ptr_as<float>(mean),
                             .rstd = ptr_as<float>(rstd),
                             .seqlen = x.size(1),
                             .C = x.size(2),
                             .x_batch_stride = x.stride(0),
                             .x_token_stride = x.stride(1)},
                            target_of(x));
}

void gather_layer_norm_bwd(Tensor dout, Tensor x, Tensor entries, Tensor offsets, Tensor weight, Tensor mean,
                           Tensor rstd, OptTensor dx, OptTensor dweight, OptTensor dbias) {
  const bool has_dx = ptr(dx) != nullptr;
  run_gather_layer_norm_bwd({.dtype = dtype_of(x, "x"),
                             .dout = ptr(dout),
                             .x = ptr(x),
                             .inverse = inverse_of(entries, offsets),
                             .weight = param_of(weight, "weight"),
                             .mean = ptr_as<float>(mean),
                             .rstd = ptr_as<float>(rstd),
                             .dx = ptr(dx),
                             .dweight = param_grad_of(dweight, "dweight"),
                             .dbias = param_grad_of(dbias, "dbias"),
                             .batch = x.size(0),
                             .seqlen = x.size(1),
                             .C = x.size(2),
                             .x_batch_stride = x.stride(0),
                             .x_token_stride = x.stride(1),
                             .dx_batch_stride = has_dx ? dx->stride(0) : 0,
                             .dx_token_stride = has_dx ? dx->stride(1) : 0},
                            target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("gather_layer_norm_fwd" EVA02_TARGET
        "(Tensor x, Tensor idx, Tensor weight, Tensor bias, float eps, Tensor(a!) out, "
        "Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def("gather_layer_norm_bwd" EVA02_TARGET
        "(Tensor dout, Tensor x, Tensor entries, Tensor offsets, Tensor weight, Tensor mean, Tensor rstd, "
        "Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("gather_layer_norm_fwd" EVA02_TARGET, TORCH_BOX(&gather_layer_norm_fwd));
  m.impl("gather_layer_norm_bwd" EVA02_TARGET, TORCH_BOX(&gather_layer_norm_bwd));
}

}  // namespace eva02
