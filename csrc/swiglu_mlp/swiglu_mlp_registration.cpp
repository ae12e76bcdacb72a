#include "common/param_adapter.h"
#include "swiglu_mlp/swiglu_mlp.h"

namespace eva02 {
namespace {

// Activations are rows (common/param_adapter.h), weights contiguous, gate_up (M, 2, Fp) contiguous; the Python adapter
// has checked shapes and dtypes. w_up absent: w_gate holds the rows of both, b_gate their biases.
SwigluMlpShape shape_of(const Tensor& x, const Tensor& w_gate, const OptTensor& b_gate, const OptTensor& w_up,
                        const OptTensor& b_up, const Tensor& w_down, const OptTensor& b_down, bool sub_norm,
                        const OptTensor& norm_weight, const OptTensor& norm_bias, bool pre_norm,
                        const OptTensor& pre_weight, const OptTensor& pre_bias, const OptTensor& layer_scale,
                        const OptTensor& row_scale, bool add_x) {
  SwigluMlpShape s{};
  s.dtype = dtype_of(x, "x");
  s.M = num_rows(x);
  s.C = num_columns(x);
  s.F = w_down.size(1);
  s.Fp = (s.F + 7) / 8 * 8;
  s.x = ptr(x);
  s.x_stride = row_stride(x);
  s.w_gate = ptr(w_gate);
  s.w_up = ptr(w_up);
  s.w_down = ptr(w_down);
  s.b_gate = param_of(b_gate, "b_gate");
  s.b_up = param_of(b_up, "b_up");
  s.b_down = param_of(b_down, "b_down");
  if (!w_up.has_value() || !w_up->defined()) {
    const int64_t weight_bytes = s.F * s.C * static_cast<int64_t>(w_gate.element_size());
    if (s.w_gate != nullptr) s.w_up = static_cast<const char*>(s.w_gate) + weight_bytes;
    if (s.b_gate.data != nullptr) {
      const int64_t bias_bytes = s.F * static_cast<int64_t>(b_gate->element_size());
      s.b_up = {.data = static_cast<const char*>(s.b_gate.data) + bias_bytes, .dtype = s.b_gate.dtype};
    }
  }
  s.sub_norm = sub_norm;
  s.norm_weight = param_of(norm_weight, "norm_weight");
  s.norm_bias = param_of(norm_bias, "norm_bias");
  s.pre_norm = pre_norm;
  s.pre_weight = param_of(pre_weight, "pre_weight");
  s.pre_bias = param_of(pre_bias, "pre_bias");
  s.layer_scale = param_of(layer_scale, "layer_scale");
  s.row_scale = ptr_as<const float>(row_scale);
  s.rows_per_sample = s.row_scale == nullptr ? 1 : s.M / row_scale->size(0);
  s.add_x = add_x;
  return s;
}

void swiglu_mlp_fwd(Tensor x, Tensor w_gate, OptTensor b_gate, OptTensor w_up, OptTensor b_up, Tensor w_down,
                    OptTensor b_down, OptTensor norm_weight, OptTensor norm_bias, double eps, OptTensor pre_weight,
                    OptTensor pre_bias, double pre_eps, OptTensor layer_scale, OptTensor row_scale, bool add_x,
                    Tensor out, OptTensor gate_up, OptTensor mean, OptTensor rstd, OptTensor pre_mean,
                    OptTensor pre_rstd) {
  run_swiglu_mlp_fwd(
      {.s = shape_of(x, w_gate, b_gate, w_up, b_up, w_down, b_down, ptr(mean) != nullptr, norm_weight, norm_bias,
                     ptr(pre_mean) != nullptr, pre_weight, pre_bias, layer_scale, row_scale, add_x),
       .eps = static_cast<float>(eps),
       .pre_eps = static_cast<float>(pre_eps),
       .out = ptr(out),
       .gate_up = ptr(gate_up),
       .mean = ptr_as<float>(mean),
       .rstd = ptr_as<float>(rstd),
       .pre_mean = ptr_as<float>(pre_mean),
       .pre_rstd = ptr_as<float>(pre_rstd),
       .out_stride = row_stride(out)},
      target_of(x));
}

// A packed gradient (w_up absent): the second half of dw_gate and db_gate is up's.
void swiglu_mlp_bwd(Tensor dout, Tensor x, Tensor w_gate, OptTensor b_gate, OptTensor w_up, OptTensor b_up,
                    Tensor w_down, OptTensor b_down, OptTensor norm_weight, OptTensor norm_bias, OptTensor pre_weight,
                    OptTensor pre_bias, OptTensor layer_scale, OptTensor row_scale, bool add_x, OptTensor gate_up,
                    OptTensor mean, OptTensor rstd, OptTensor pre_mean, OptTensor pre_rstd, OptTensor dx,
                    OptTensor dw_gate, OptTensor db_gate, OptTensor dw_up, OptTensor db_up, OptTensor dw_down,
                    OptTensor db_down, OptTensor dnorm_weight, OptTensor dnorm_bias, OptTensor dpre_weight,
                    OptTensor dpre_bias, OptTensor dlayer_scale) {
  SwigluMlpBwdParams p{
      .s = shape_of(x, w_gate, b_gate, w_up, b_up, w_down, b_down, ptr(mean) != nullptr, norm_weight, norm_bias,
                    ptr(pre_mean) != nullptr, pre_weight, pre_bias, layer_scale, row_scale, add_x),
      .dout = ptr(dout),
      .gate_up = ptr(gate_up),
      .mean = ptr_as<const float>(mean),
      .rstd = ptr_as<const float>(rstd),
      .pre_mean = ptr_as<const float>(pre_mean),
      .pre_rstd = ptr_as<const float>(pre_rstd),
      .dx = ptr(dx),
      .dw_gate = ptr(dw_gate),
      .dw_up = ptr(dw_up),
      .dw_down = ptr(dw_down),
      .db_gate = param_grad_of(db_gate, "db_gate"),
      .db_up = param_grad_of(db_up, "db_up"),
      .db_down = param_grad_of(db_down, "db_down"),
      .dnorm_weight = param_grad_of(dnorm_weight, "dnorm_weight"),
      .dnorm_bias = param_grad_of(dnorm_bias, "dnorm_bias"),
      .dpre_weight = param_grad_of(dpre_weight, "dpre_weight"),
      .dpre_bias = param_grad_of(dpre_bias, "dpre_bias"),
      .dlayer_scale = param_grad_of(dlayer_scale, "dlayer_scale"),
      .dout_stride = row_stride(dout),
      .dx_stride = row_stride(dx)};
  if (!w_up.has_value() || !w_up->defined()) {
    if (p.dw_gate != nullptr)
      p.dw_up = static_cast<char*>(p.dw_gate) + p.s.F * p.s.C * static_cast<int64_t>(dw_gate->element_size());
    if (p.db_gate.data != nullptr)
      p.db_up = {.data = static_cast<char*>(p.db_gate.data) + p.s.F * static_cast<int64_t>(db_gate->element_size()),
                 .dtype = p.db_gate.dtype};
  }
  run_swiglu_mlp_bwd(p, target_of(dout));
}

}  // namespace

#define EVA02_SWIGLU_MLP_WEIGHTS                                                                                    \
  "Tensor w_gate, Tensor? b_gate, Tensor? w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, Tensor? norm_weight, " \
  "Tensor? norm_bias, "

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("swiglu_mlp_fwd" EVA02_TARGET "(Tensor x, " EVA02_SWIGLU_MLP_WEIGHTS
        "float eps, Tensor? pre_weight, Tensor? pre_bias, float pre_eps, Tensor? layer_scale, Tensor? row_scale, "
        "bool add_x, Tensor(a!) out, Tensor(b!)? gate_up, Tensor(c!)? mean, Tensor(d!)? rstd, Tensor(e!)? pre_mean, "
        "Tensor(f!)? pre_rstd) -> ()");
  m.def("swiglu_mlp_bwd" EVA02_TARGET "(Tensor dout, Tensor x, " EVA02_SWIGLU_MLP_WEIGHTS
        "Tensor? pre_weight, Tensor? pre_bias, Tensor? layer_scale, Tensor? row_scale, bool add_x, Tensor? gate_up, "
        "Tensor? mean, Tensor? rstd, Tensor? pre_mean, Tensor? pre_rstd, Tensor(a!)? dx, Tensor(b!)? dw_gate, "
        "Tensor(c!)? db_gate, Tensor(d!)? dw_up, Tensor(e!)? db_up, Tensor(f!)? dw_down, Tensor(g!)? db_down, "
        "Tensor(h!)? dnorm_weight, Tensor(i!)? dnorm_bias, Tensor(j!)? dpre_weight, Tensor(k!)? dpre_bias, "
        "Tensor(l!)? dlayer_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("swiglu_mlp_fwd" EVA02_TARGET, TORCH_BOX(&swiglu_mlp_fwd));
  m.impl("swiglu_mlp_bwd" EVA02_TARGET, TORCH_BOX(&swiglu_mlp_bwd));
}

}  // namespace eva02
