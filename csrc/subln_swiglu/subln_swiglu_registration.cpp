#include "common/param_adapter.h"
#include "subln_swiglu/subln_swiglu.h"

namespace eva02 {
namespace {

// Activations are rows (common/param_adapter.h), parameters (F,) contiguous, mean and rstd (rows,) float32;
// the Python adapter has checked shapes and dtypes.
void subln_swiglu_fwd(Tensor gate, Tensor up, Tensor weight, Tensor bias, double eps, Tensor out, Tensor mean,
                      Tensor rstd) {
  run_subln_swiglu_fwd({.dtype = dtype_of(gate, "gate"),
                        .gate = ptr(gate),
                        .up = ptr(up),
                        .weight = param_of(weight, "weight"),
                        .bias = param_of(bias, "bias"),
                        .eps = static_cast<float>(eps),
                        .out = ptr(out),
                        .mean = ptr_as<float>(mean),
                        .rstd = ptr_as<float>(rstd),
                        .rows = num_rows(gate),
                        .F = num_columns(gate),
                        .gate_stride = row_stride(gate),
                        .up_stride = row_stride(up),
                        .out_stride = row_stride(out)},
                       target_of(gate));
}

SublnSwigluBwdParams bwd_params(const Tensor& dout, const Tensor& gate, const Tensor& up, const Tensor& weight,
                                const Tensor& mean, const Tensor& rstd, const OptTensor& dgate, const OptTensor& dup,
                                const OptTensor& dweight, const OptTensor& dbias) {
  return {.dtype = dtype_of(gate, "gate"),
          .dout = ptr(dout),
          .gate = ptr(gate),
          .up = ptr(up),
          .weight = param_of(weight, "weight"),
          .mean = ptr_as<float>(mean),
          .rstd = ptr_as<float>(rstd),
          .dgate = ptr(dgate),
          .dup = ptr(dup),
          .dweight = param_grad_of(dweight, "dweight"),
          .dbias = param_grad_of(dbias, "dbias"),
          .rows = num_rows(gate),
          .F = weight.size(0),
          .dout_stride = row_stride(dout),
          .gate_stride = row_stride(gate),
          .up_stride = row_stride(up),
          .dgate_stride = row_stride(dgate),
          .dup_stride = row_stride(dup)};
}

void subln_swiglu_bwd(Tensor dout, Tensor gate, Tensor up, Tensor weight, Tensor mean, Tensor rstd, OptTensor dgate,
                      OptTensor dup, OptTensor dweight, OptTensor dbias) {
  run_subln_swiglu_bwd(bwd_params(dout, gate, up, weight, mean, rstd, dgate, dup, dweight, dbias), target_of(dout));
}

#if defined(EVA02_CUDA)
// dgate, dup and hidden are (rows, cols), F columns of which are those of weight.
void subln_hidden_gradient(Tensor dout, Tensor gate, Tensor up, Tensor weight, OptTensor bias, Tensor mean, Tensor rstd,
                           Tensor dgate, Tensor dup, OptTensor hidden, OptTensor dweight, OptTensor dbias,
                           OptTensor db_gate, OptTensor db_up) {
  run_subln_hidden_gradient({.bwd = bwd_params(dout, gate, up, weight, mean, rstd, dgate, dup, dweight, dbias),
                             .bias = param_of(bias, "bias"),
                             .hidden = ptr(hidden),
                             .gate_sums = param_grad_of(db_gate, "db_gate"),
                             .up_sums = param_grad_of(db_up, "db_up"),
                             .cols = dgate.size(1),
                             .hidden_stride = row_stride(hidden)},
                            target_of(dout));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("subln_swiglu_fwd" EVA02_TARGET
        "(Tensor gate, Tensor up, Tensor weight, Tensor bias, float eps, Tensor(a!) out, "
        "Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def("subln_swiglu_bwd" EVA02_TARGET
        "(Tensor dout, Tensor gate, Tensor up, Tensor weight, Tensor mean, Tensor rstd, "
        "Tensor(a!)? dgate, Tensor(b!)? dup, Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()");
#if defined(EVA02_CUDA)
  m.def("subln_hidden_gradient" EVA02_TARGET
        "(Tensor dout, Tensor gate, Tensor up, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, "
        "Tensor(a!) dgate, Tensor(b!) dup, Tensor(c!)? hidden, Tensor(d!)? dweight, Tensor(e!)? dbias, "
        "Tensor(f!)? db_gate, Tensor(g!)? db_up) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("subln_swiglu_fwd" EVA02_TARGET, TORCH_BOX(&subln_swiglu_fwd));
  m.impl("subln_swiglu_bwd" EVA02_TARGET, TORCH_BOX(&subln_swiglu_bwd));
#if defined(EVA02_CUDA)
  m.impl("subln_hidden_gradient" EVA02_TARGET, TORCH_BOX(&subln_hidden_gradient));
#endif
}

}  // namespace eva02
