#include "common/param_adapter.h"
#include "gelu_mlp/gelu_mlp.h"

namespace eva02 {
namespace {

// Activations are rows (common/param_adapter.h), weights and hidden (M, Fp) contiguous; the Python adapter has checked
// shapes and dtypes.
GeluMlpShape shape_of(const Tensor& x, const Tensor& w1, const OptTensor& b1, const Tensor& w2, const OptTensor& b2,
                      bool pre_norm, const OptTensor& pre_weight, const OptTensor& pre_bias,
                      const OptTensor& layer_scale, const OptTensor& row_scale, bool add_x) {
  const float* const scale = ptr_as<const float>(row_scale);
  return {.dtype = dtype_of(x, "x"),
          .x = ptr(x),
          .w1 = ptr(w1),
          .w2 = ptr(w2),
          .b1 = param_of(b1, "b1"),
          .b2 = param_of(b2, "b2"),
          .pre_norm = pre_norm,
          .add_x = add_x,
          .pre_weight = param_of(pre_weight, "pre_weight"),
          .pre_bias = param_of(pre_bias, "pre_bias"),
          .layer_scale = param_of(layer_scale, "layer_scale"),
          .row_scale = scale,
          .M = num_rows(x),
          .C = num_columns(x),
          .F = w2.size(1),
          .Fp = (w2.size(1) + 7) / 8 * 8,
          .rows_per_sample = scale == nullptr ? 1 : num_rows(x) / row_scale->size(0),
          .x_stride = row_stride(x)};
}

void gelu_mlp_fwd(Tensor x, Tensor w1, OptTensor b1, Tensor w2, OptTensor b2, OptTensor pre_weight, OptTensor pre_bias,
                  double pre_eps, OptTensor layer_scale, OptTensor row_scale, bool add_x, Tensor out, OptTensor hidden,
                  OptTensor pre_mean, OptTensor pre_rstd) {
  run_gelu_mlp_fwd(
      {.s = shape_of(x, w1, b1, w2, b2, ptr(pre_mean) != nullptr, pre_weight, pre_bias, layer_scale, row_scale, add_x),
       .pre_eps = static_cast<float>(pre_eps),
       .out = ptr(out),
       .hidden = ptr(hidden),
       .pre_mean = ptr_as<float>(pre_mean),
       .pre_rstd = ptr_as<float>(pre_rstd),
       .out_stride = row_stride(out)},
      target_of(x));
}

void gelu_mlp_bwd(Tensor dout, Tensor x, Tensor w1, OptTensor b1, Tensor w2, OptTensor b2, OptTensor pre_weight,
                  OptTensor pre_bias, OptTensor layer_scale, OptTensor row_scale, bool add_x, OptTensor hidden,
                  OptTensor pre_mean, OptTensor pre_rstd, OptTensor dx, OptTensor dw1, OptTensor db1, OptTensor dw2,
                  OptTensor db2, OptTensor dpre_weight, OptTensor dpre_bias, OptTensor dlayer_scale) {
  run_gelu_mlp_bwd(
      {.s = shape_of(x, w1, b1, w2, b2, ptr(pre_mean) != nullptr, pre_weight, pre_bias, layer_scale, row_scale, add_x),
       .dout = ptr(dout),
       .hidden = ptr(hidden),
       .pre_mean = ptr_as<const float>(pre_mean),
       .pre_rstd = ptr_as<const float>(pre_rstd),
       .dx = ptr(dx),
       .dw1 = ptr(dw1),
       .dw2 = ptr(dw2),
       .db1 = param_grad_of(db1, "db1"),
       .db2 = param_grad_of(db2, "db2"),
       .dpre_weight = param_grad_of(dpre_weight, "dpre_weight"),
       .dpre_bias = param_grad_of(dpre_bias, "dpre_bias"),
       .dlayer_scale = param_grad_of(dlayer_scale, "dlayer_scale"),
       .dout_stride = row_stride(dout),
       .dx_stride = row_stride(dx)},
      target_of(dout));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("gelu_mlp_fwd" EVA02_TARGET
        "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? pre_weight, Tensor? pre_bias, "
        "float pre_eps, Tensor? layer_scale, Tensor? row_scale, bool add_x, Tensor(a!) out, Tensor(b!)? hidden, "
        "Tensor(c!)? pre_mean, Tensor(d!)? pre_rstd) -> ()");
  m.def("gelu_mlp_bwd" EVA02_TARGET
        "(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? pre_weight, "
        "Tensor? pre_bias, Tensor? layer_scale, Tensor? row_scale, bool add_x, Tensor? hidden, Tensor? pre_mean, "
        "Tensor? pre_rstd, Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, "
        "Tensor(f!)? dpre_weight, Tensor(g!)? dpre_bias, Tensor(h!)? dlayer_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("gelu_mlp_fwd" EVA02_TARGET, TORCH_BOX(&gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd" EVA02_TARGET, TORCH_BOX(&gelu_mlp_bwd));
}

}  // namespace eva02
