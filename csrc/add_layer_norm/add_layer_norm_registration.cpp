#include "add_layer_norm/add_layer_norm.h"
#include "common/param_adapter.h"

namespace eva02 {
namespace {

// Activations are rows (common/param_adapter.h), parameters (C,) contiguous, row_scale (rows / rows_per_sample,), mean
// and rstd (rows,) float32; the Python adapter has checked shapes and dtypes.
void add_layer_norm_fwd(Tensor x, OptTensor residual, OptTensor weight, OptTensor bias, double eps,
                        OptTensor layer_scale, OptTensor row_scale, bool rms, int64_t rows_per_sample, Tensor normed,
                        OptTensor sum, OptTensor mean, Tensor rstd) {
  run_add_layer_norm_fwd({.dtype = dtype_of(x, "x"),
                          .x = ptr(x),
                          .residual = ptr(residual),
                          .weight = param_of(weight, "weight"),
                          .bias = param_of(bias, "bias"),
                          .layer_scale = param_of(layer_scale, "layer_scale"),
                          .row_scale = ptr_as<float>(row_scale),
                          .eps = static_cast<float>(eps),
                          .rms = rms,
                          .rows_per_sample = rows_per_sample,
                          .normed = ptr(normed),
                          .sum = ptr(sum),
                          .mean = ptr_as<float>(mean),
                          .rstd = ptr_as<float>(rstd),
                          .rows = num_rows(x),
                          .C = num_columns(x),
                          .x_stride = row_stride(x),
                          .residual_stride = row_stride(residual),
                          .normed_stride = row_stride(normed),
                          .sum_stride = row_stride(sum)},
                         target_of(x));
}

void add_layer_norm_bwd(Tensor dnormed, OptTensor dsum, Tensor sum, OptTensor weight, OptTensor mean, Tensor rstd,
                        OptTensor x, OptTensor layer_scale, OptTensor row_scale, bool rms, int64_t rows_per_sample,
                        OptTensor dx, OptTensor dresidual, OptTensor dweight, OptTensor dbias, OptTensor dlayer_scale) {
  STD_TORCH_CHECK(ptr(dlayer_scale) == nullptr || ptr(x) != nullptr || sum.numel() == 0,
                  "add_layer_norm: dlayer_scale needs x");
  run_add_layer_norm_bwd({.dtype = dtype_of(dnormed, "dnormed"),
                          .dnormed = ptr(dnormed),
                          .dsum = ptr(dsum),
                          .sum = ptr(sum),
                          .x = ptr(x),
                          .weight = param_of(weight, "weight"),
                          .layer_scale = param_of(layer_scale, "layer_scale"),
                          .row_scale = ptr_as<float>(row_scale),
                          .mean = ptr_as<float>(mean),
                          .rstd = ptr_as<float>(rstd),
                          .rms = rms,
                          .rows_per_sample = rows_per_sample,
                          .dx = ptr(dx),
                          .dresidual = ptr(dresidual),
                          .dweight = param_grad_of(dweight, "dweight"),
                          .dbias = param_grad_of(dbias, "dbias"),
                          .dlayer_scale = param_grad_of(dlayer_scale, "dlayer_scale"),
                          .rows = num_rows(sum),
                          .C = num_columns(sum),
                          .dnormed_stride = row_stride(dnormed),
                          .dsum_stride = row_stride(dsum),
                          .sum_stride = row_stride(sum),
                          .x_stride = row_stride(x),
                          .dx_stride = row_stride(dx),
                          .dresidual_stride = row_stride(dresidual)},
                         target_of(dnormed));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("add_layer_norm_fwd" EVA02_TARGET
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? "
        "layer_scale, "
        "Tensor? row_scale, bool rms, int rows_per_sample, Tensor(a!) normed, Tensor(b!)? sum, Tensor(c!)? mean, "
        "Tensor(d!) rstd) -> ()");
  m.def("add_layer_norm_bwd" EVA02_TARGET
        "(Tensor dnormed, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? mean, Tensor rstd, "
        "Tensor? x, Tensor? layer_scale, Tensor? row_scale, bool rms, int rows_per_sample, Tensor(a!)? dx, "
        "Tensor(b!)? dresidual, Tensor(c!)? dweight, Tensor(d!)? dbias, Tensor(e!)? dlayer_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("add_layer_norm_fwd" EVA02_TARGET, TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd" EVA02_TARGET, TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace eva02
