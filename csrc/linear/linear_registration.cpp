#include "common/param_adapter.h"
#include "linear/linear.h"

namespace eva02 {
namespace {

// Activations are rows (common/param_adapter.h), weights contiguous; the Python adapter has checked shapes and dtypes.
int64_t rows_per_sample(const OptTensor& row_scale, int64_t rows) {
  return ptr(row_scale) == nullptr ? 1 : rows / row_scale->size(0);
}

void linear_fwd(Tensor x, Tensor weight, OptTensor bias, OptTensor residual, OptTensor layer_scale, OptTensor row_scale,
                Tensor out) {
  run_linear_fwd({.dtype = dtype_of(x, "x"),
                  .x = ptr(x),
                  .weight = ptr(weight),
                  .residual = ptr(residual),
                  .bias = param_of(bias, "bias"),
                  .layer_scale = param_of(layer_scale, "layer_scale"),
                  .row_scale = ptr_as<const float>(row_scale),
                  .out = ptr(out),
                  .M = num_rows(x),
                  .N = weight.size(0),
                  .K = num_columns(x),
                  .rows_per_sample = rows_per_sample(row_scale, num_rows(x)),
                  .x_stride = row_stride(x),
                  .residual_stride = row_stride(residual),
                  .out_stride = row_stride(out)},
                 target_of(x));
}

void linear_bwd(Tensor dout, Tensor x, Tensor weight, OptTensor bias, OptTensor layer_scale, OptTensor row_scale,
                OptTensor dx, OptTensor dweight, OptTensor dbias, OptTensor dlayer_scale) {
  run_linear_bwd({.dtype = dtype_of(x, "x"),
                  .dout = ptr(dout),
                  .x = ptr(x),
                  .weight = ptr(weight),
                  .bias = param_of(bias, "bias"),
                  .layer_scale = param_of(layer_scale, "layer_scale"),
                  .row_scale = ptr_as<const float>(row_scale),
                  .dx = ptr(dx),
                  .dweight = ptr(dweight),
                  .dbias = param_grad_of(dbias, "dbias"),
                  .dlayer_scale = param_grad_of(dlayer_scale, "dlayer_scale"),
                  .M = num_rows(x),
                  .N = weight.size(0),
                  .K = num_columns(x),
                  .rows_per_sample = rows_per_sample(row_scale, num_rows(x)),
                  .dout_stride = row_stride(dout),
                  .x_stride = row_stride(x),
                  .dx_stride = row_stride(dx)},
                 target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("linear_fwd" EVA02_TARGET
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? layer_scale, Tensor? row_scale, "
        "Tensor(a!) out) -> ()");
  m.def("linear_bwd" EVA02_TARGET
        "(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? row_scale, "
        "Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dlayer_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("linear_fwd" EVA02_TARGET, TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd" EVA02_TARGET, TORCH_BOX(&linear_bwd));
}

}  // namespace eva02
