// The steps of operators with matrix products that the CUDA backend composes in Python
// (eva02_kernels/ops/_products.py). The CPU's operators compose theirs in C++.
#if defined(EVA02_CUDA)
#include "common/param_adapter.h"
#include "common/rope_adapter.h"
#include "gemm/product.h"

namespace eva02 {
namespace {

// Activations are 2-D with a contiguous last dim; the Python adapter has checked shapes and dtypes. a is (rows, K) and
// b (K, N), each with rows or columns contiguous. A product that is known comes as `values` instead.
struct Order {
  bool k, outer;  // whether the operand may be taken as contiguous in k, in its other index
};

Order order_of(int64_t k_stride, int64_t K, int64_t outer_stride, int64_t outer) {
  return {k_stride == 1 || K <= 1, outer_stride == 1 || outer <= 1};
}

// A (rows, K) times B (K, N), whose operands are still to be named.
Product product_of_sizes(const Tensor& like, bool tf32, int64_t rows, int64_t N, int64_t K) {
  Product p{};
  p.dtype = dtype_of(like, "a");
  p.tf32 = tf32;
  p.rows = rows;
  p.N = N;
  p.K = K;
  return p;
}

Product product_of(const OptTensor& a, const OptTensor& b, const OptTensor& b2, const OptTensor& values,
                   const OptTensor& values2, const Tensor& like, bool tf32) {
  if (values.has_value() && values->defined()) {
    Product p = product_of_sizes(like, tf32, values->size(0), values->size(1), 0);
    p.values = ptr(values);
    p.values2 = ptr(values2);
    p.values_stride = values->stride(0);
    return p;
  }
  Product p = product_of_sizes(like, tf32, a->size(0), b->size(1), a->size(1));
  const Order in_a = order_of(a->stride(1), p.K, a->stride(0), p.rows);
  const Order in_b = order_of(b->stride(0), p.K, b->stride(1), p.N);
  p.b.k_contiguous = in_b.k;
  STD_TORCH_CHECK(in_a.k && (in_b.k || in_b.outer), "product: expected a (rows, K) with b (N, K) or (K, N)");
  p.a.data = ptr(a);
  p.a.stride = a->stride(0);
  p.b.data = ptr(b);
  p.b.stride = b->stride(p.b.k_contiguous ? 1 : 0);
  p.b2 = p.b;
  p.b2.data = ptr(b2);
  return p;
}

int64_t rows_per_sample(const OptTensor& row_scale, int64_t rows) {
  return ptr(row_scale) == nullptr ? 1 : rows / row_scale->size(0);
}

ProjectParams project_params(const Product& product, const OptTensor& bias, const OptTensor& residual,
                             const OptTensor& layer_scale, const OptTensor& row_scale, const Tensor& out) {
  return {.product = product,
          .bias = param_of(bias, "bias"),
          .layer_scale = param_of(layer_scale, "layer_scale"),
          .row_scale = ptr_as<const float>(row_scale),
          .rows_per_sample = rows_per_sample(row_scale, out.size(0)),
          .residual = ptr(residual),
          .out = ptr(out),
          .out_float32 = dtype_of(out, "out") == DType::f32,
          .residual_stride = row_stride(residual),
          .out_stride = out.stride(0)};
}

void project(OptTensor a, OptTensor b, OptTensor values, OptTensor bias, OptTensor residual, OptTensor layer_scale,
             OptTensor row_scale, bool tf32, Tensor out) {
  const Tensor& like = values.has_value() ? *values : *a;
  const Product product = product_of(a, b, {}, values, {}, like, tf32);
  run_project(project_params(product, bias, residual, layer_scale, row_scale, out), target_of(out));
}

void activate(OptTensor a, OptTensor w_gate, OptTensor w_up, OptTensor gate_values, OptTensor up_values,
              OptTensor b_gate, OptTensor b_up, OptTensor norm_weight, bool tf32, OptTensor gate, OptTensor up,
              OptTensor hidden, OptTensor pieces) {
  const Tensor& like = gate_values.has_value() ? *gate_values : *a;
  STD_TORCH_CHECK(!w_up.has_value() || w_up->stride(1) == w_gate->stride(1),
                  "w_up: expected the row stride of w_gate, ", w_gate->stride(1), ", found ", w_up->stride(1));
  run_activate({.product = product_of(a, w_gate, w_up, gate_values, up_values, like, tf32),
                .gate_bias = param_of(b_gate, "b_gate"),
                .up_bias = param_of(b_up, "b_up"),
                .gate = ptr(gate),
                .up = ptr(up),
                .hidden = ptr(hidden),
                .gate_stride = row_stride(gate),
                .hidden_stride = row_stride(hidden),
                .norm_weight = param_of(norm_weight, "norm_weight"),
                .pieces = ptr_as<float>(pieces)},
               target_of(like));
}

void fold_norm(Tensor pieces, Tensor norm_weight, OptTensor norm_bias, double eps, Tensor weight, OptTensor bias,
               Tensor mean, Tensor rstd, Tensor weight_sums, Tensor shift) {
  run_fold_norm({.dtype = dtype_of(weight, "weight"),
                 .pieces = ptr_as<const float>(pieces),
                 .norm_weight = param_of(norm_weight, "norm_weight"),
                 .norm_bias = param_of(norm_bias, "norm_bias"),
                 .bias = param_of(bias, "bias"),
                 .weight = ptr(weight),
                 .eps = static_cast<float>(eps),
                 .mean = ptr_as<float>(mean),
                 .rstd = ptr_as<float>(rstd),
                 .weight_sums = ptr_as<float>(weight_sums),
                 .shift = ptr_as<float>(shift),
                 .rows = mean.size(0),
                 .F = norm_weight.size(0),
                 .N = weight.size(0),
                 .weight_stride = weight.stride(0)},
                target_of(weight));
}

void project_normed(Tensor a, Tensor b, Tensor mean, Tensor rstd, Tensor weight_sums, Tensor shift, OptTensor residual,
                    OptTensor layer_scale, OptTensor row_scale, bool tf32, Tensor out) {
  const Product product = product_of(a, b, {}, {}, {}, a, tf32);
  STD_TORCH_CHECK(product.b.k_contiguous, "b: expected (K, N) with contiguous columns");
  run_project_normed({.project = project_params(product, shift, residual, layer_scale, row_scale, out),
                      .mean = ptr_as<const float>(mean),
                      .rstd = ptr_as<const float>(rstd),
                      .weight_sums = ptr_as<const float>(weight_sums)},
                     target_of(out));
}

void project_parts(Tensor a, Tensor w0, Tensor w1, Tensor w2, OptTensor b0, OptTensor b1, OptTensor b2, bool tf32,
                   Tensor out) {
  STD_TORCH_CHECK(w1.stride(0) == w0.stride(0) && w2.stride(0) == w0.stride(0), "weights: expected one row stride");
  ProjectPartsParams p{};
  p.product = product_of_sizes(a, tf32, a.size(0), out.size(1), a.size(1));
  p.product.a = {ptr(a), a.stride(0), true};
  p.product.b = {ptr(w0), w0.stride(0), true};
  const Tensor* const weights[] = {&w0, &w1, &w2};
  const OptTensor* const biases[] = {&b0, &b1, &b2};
  for (int i = 0; i < 3; ++i) {
    p.weights[i] = ptr(*weights[i]);
    p.widths[i] = weights[i]->size(0);
    p.bias[i] = param_of(*biases[i], "bias");
  }
  p.out = ptr(out);
  p.out_stride = out.stride(0);
  run_project_parts(p, target_of(a));
}

// A part of dy's columns from `first` on, those of a weight or, without one, of a bias.
WeightPart part_of_gradient(const OptTensor& weight, const OptTensor& bias, int64_t first) {
  const bool has_weight = ptr(weight) != nullptr, has_bias = ptr(bias) != nullptr;
  return {.weight = ptr(weight),
          .bias = param_grad_of(bias, "bias"),
          .first = first,
          .rows = has_weight ? weight->size(0)
                  : has_bias ? bias->size(0)
                             : 0,
          .stride = row_stride(weight)};
}

// dy (K, columns) and a (K, N).
void weight_gradient(Tensor dy, Tensor a, bool tf32, std::vector<int64_t> first, OptTensor dw0, OptTensor dw1,
                     OptTensor dw2, OptTensor db0, OptTensor db1, OptTensor db2) {
  STD_TORCH_CHECK(first.size() == 3, "first: expected 3 columns, found ", first.size());
  WeightGradientParams p{};
  p.product = product_of_sizes(dy, tf32, dy.size(1), a.size(1), dy.size(0));
  p.product.a = {ptr(dy), dy.stride(0), false};
  p.product.b = {ptr(a), a.stride(0), false};
  p.parts[0] = part_of_gradient(dw0, db0, first[0]);
  p.parts[1] = part_of_gradient(dw1, db1, first[1]);
  p.parts[2] = part_of_gradient(dw2, db2, first[2]);
  for (const WeightPart& part : p.parts) p.sums_rows |= part.bias.data != nullptr;
  for (const OptTensor& dw : {dw0, dw1, dw2})
    if (ptr(dw) != nullptr) p.out_float32 = dtype_of(*dw, "dw") == DType::f32;
  run_weight_gradient(p, target_of(dy));
}

void hidden_gradient(OptTensor a, OptTensor b, OptTensor values, Tensor gate, OptTensor up, OptTensor b_gate,
                     OptTensor centre, bool tf32, Tensor dgate, OptTensor dup, OptTensor hidden, OptTensor db_gate,
                     OptTensor db_up) {
  run_hidden_gradient({.product = product_of(a, b, {}, values, {}, gate, tf32),
                       .gate = ptr(gate),
                       .up = ptr(up),
                       .gate_bias = param_of(b_gate, "b_gate"),
                       .centre = param_of(centre, "centre"),
                       .dgate = ptr(dgate),
                       .dup = ptr(dup),
                       .hidden = ptr(hidden),
                       .gate_sums = param_grad_of(db_gate, "db_gate"),
                       .up_sums = param_grad_of(db_up, "db_up"),
                       .gate_stride = gate.stride(0),
                       .dgate_stride = dgate.stride(0),
                       .hidden_stride = row_stride(hidden)},
                      target_of(gate));
}

void project_rope(Tensor a, Tensor b, OptTensor bias, OptTensor rope_cos, OptTensor rope_sin, OptTensor rope_grids,
                  std::vector<int64_t> rope_grid, std::string rope_layout, int64_t num_prefix_tokens,
                  OptTensor keep_idx, int64_t seq_len, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                  bool tf32, Tensor out) {
  STD_TORCH_CHECK(seq_len > 0 ? a.size(0) % seq_len == 0 : a.size(0) == 0, "seq_len: expected a divisor of the ",
                  a.size(0), " rows of a, found ", seq_len);
  const RopeTokens tokens{seq_len > 0 ? a.size(0) / seq_len : 0, seq_len, head_dim, num_heads, num_kv_heads};
  const RopeTable rope =
      checked_rope_table(rope_cos, rope_sin, rope_grids, rope_grid, rope_layout, num_prefix_tokens, keep_idx, tokens);
  STD_TORCH_CHECK(rope.interleaved, "rope_layout: expected interleaved, found ", rope_layout);
  run_project_rope({.product = product_of(a, b, {}, {}, {}, a, tf32),
                    .bias = param_of(bias, "bias"),
                    .rope = rope,
                    .out = ptr(out),
                    .out_stride = out.stride(0),
                    .seq_len = seq_len,
                    .heads = num_heads,
                    .rotated = (num_heads + num_kv_heads) * head_dim},
                   target_of(a));
}

void scale_and_sum(Tensor x, OptTensor layer_scale, OptTensor row_scale, OptTensor scaled, OptTensor row_scaled,
                   OptTensor sums) {
  run_scale_and_sum({.dtype = dtype_of(x, "x"),
                     .x = ptr(x),
                     .layer_scale = param_of(layer_scale, "layer_scale"),
                     .row_scale = ptr_as<const float>(row_scale),
                     .rows_per_sample = rows_per_sample(row_scale, x.size(0)),
                     .scaled = ptr(scaled),
                     .row_scaled = ptr(row_scaled),
                     .sums = param_grad_of(sums, "sums"),
                     .rows = x.size(0),
                     .N = x.size(1),
                     .x_stride = x.stride(0),
                     .scaled_stride = row_stride(scaled),
                     .row_scaled_stride = row_stride(row_scaled)},
                    target_of(x));
}

void finish_gradients(OptTensor product, OptTensor sums, OptTensor centre, Tensor weight, OptTensor bias,
                      OptTensor layer_scale, OptTensor dweight, OptTensor dbias, OptTensor dlayer_scale) {
  run_finish_gradients({.dtype = dtype_of(weight, "weight"),
                        .product = ptr_as<const float>(product),
                        .sums = ptr_as<const float>(sums),
                        .centre = ptr_as<const float>(centre),
                        .weight = ptr(weight),
                        .bias = param_of(bias, "bias"),
                        .layer_scale = param_of(layer_scale, "layer_scale"),
                        .dweight = ptr(dweight),
                        .dbias = param_grad_of(dbias, "dbias"),
                        .dlayer_scale = param_grad_of(dlayer_scale, "dlayer_scale"),
                        .N = weight.size(0),
                        .K = weight.size(1),
                        .weight_stride = weight.stride(0)},
                       target_of(weight));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("project" EVA02_TARGET
        "(Tensor? a, Tensor? b, Tensor? values, Tensor? bias, Tensor? residual, Tensor? layer_scale, Tensor? "
        "row_scale, bool tf32, Tensor(a!) out) -> ()");
  m.def("activate" EVA02_TARGET
        "(Tensor? a, Tensor? w_gate, Tensor? w_up, Tensor? gate_values, Tensor? up_values, Tensor? b_gate, Tensor? "
        "b_up, Tensor? norm_weight, bool tf32, Tensor(a!)? gate, Tensor(b!)? up, Tensor(c!)? hidden, Tensor(d!)? "
        "pieces) -> ()");
  m.def("fold_norm" EVA02_TARGET
        "(Tensor pieces, Tensor norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, Tensor(a!) "
        "mean, Tensor(b!) rstd, Tensor(c!) weight_sums, Tensor(d!) shift) -> ()");
  m.def("project_normed" EVA02_TARGET
        "(Tensor a, Tensor b, Tensor mean, Tensor rstd, Tensor weight_sums, Tensor shift, Tensor? residual, Tensor? "
        "layer_scale, Tensor? row_scale, bool tf32, Tensor(a!) out) -> ()");
  m.def("project_parts" EVA02_TARGET
        "(Tensor a, Tensor w0, Tensor w1, Tensor w2, Tensor? b0, Tensor? b1, Tensor? b2, bool tf32, Tensor(a!) out) "
        "-> ()");
  m.def("weight_gradient" EVA02_TARGET
        "(Tensor dy, Tensor a, bool tf32, int[] first, Tensor(a!)? dw0, Tensor(b!)? dw1, Tensor(c!)? dw2, "
        "Tensor(d!)? db0, Tensor(e!)? db1, Tensor(f!)? db2) -> ()");
  m.def("hidden_gradient" EVA02_TARGET
        "(Tensor? a, Tensor? b, Tensor? values, Tensor gate, Tensor? up, Tensor? b_gate, Tensor? centre, bool tf32, "
        "Tensor(a!) dgate, Tensor(b!)? dup, Tensor(c!)? hidden, Tensor(d!)? db_gate, Tensor(e!)? db_up) -> ()");
  m.def("project_rope" EVA02_TARGET "(Tensor a, Tensor b, Tensor? bias, " EVA02_ROPE_SCHEMA
        ", int seq_len, int num_heads, int num_kv_heads, int head_dim, bool tf32, Tensor(a!) out) -> "
        "()");
  m.def("scale_and_sum" EVA02_TARGET
        "(Tensor x, Tensor? layer_scale, Tensor? row_scale, Tensor(a!)? scaled, Tensor(b!)? row_scaled, Tensor(c!)? "
        "sums) -> ()");
  m.def("finish_gradients" EVA02_TARGET
        "(Tensor? product, Tensor? sums, Tensor? centre, Tensor weight, Tensor? bias, Tensor? layer_scale, "
        "Tensor(a!)? dweight, Tensor(b!)? dbias, Tensor(c!)? dlayer_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, EVA02_KEY, m) {
  m.impl("project" EVA02_TARGET, TORCH_BOX(&project));
  m.impl("activate" EVA02_TARGET, TORCH_BOX(&activate));
  m.impl("fold_norm" EVA02_TARGET, TORCH_BOX(&fold_norm));
  m.impl("project_normed" EVA02_TARGET, TORCH_BOX(&project_normed));
  m.impl("project_parts" EVA02_TARGET, TORCH_BOX(&project_parts));
  m.impl("weight_gradient" EVA02_TARGET, TORCH_BOX(&weight_gradient));
  m.impl("hidden_gradient" EVA02_TARGET, TORCH_BOX(&hidden_gradient));
  m.impl("project_rope" EVA02_TARGET, TORCH_BOX(&project_rope));
  m.impl("scale_and_sum" EVA02_TARGET, TORCH_BOX(&scale_and_sum));
  m.impl("finish_gradients" EVA02_TARGET, TORCH_BOX(&finish_gradients));
}

}  // namespace eva02
#endif
