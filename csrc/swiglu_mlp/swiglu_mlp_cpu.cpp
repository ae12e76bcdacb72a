// swiglu_mlp: out = [x +] row_scale * layer_scale * (LN_F(silu(g) * u) Wd^T + bd),  g, u = LN_pre(x) Wg^T + bg, .. Wu
// Fused     both LayerNorms on load; gate and up in one product, silu(g) * u in its epilogue; bias, layer scale, drop
//           path and residual in the second epilogue. Backward recomputes the hidden from gate, up and statistics on
//           load, and does sub-LayerNorm and SwiGLU backward in one pass
// Bytes     forward reads x and weights, writes out and gate_up once, plus the float32 hidden (M, F), written once and
//           read once a product; backward reads dout, gate_up twice, weights once, writes each gradient once, plus
//           float32 (M, 2F) of gradients, in workspace for at most chunk_rows rows at a time
// Launch    two parallel regions per product (gemm/gemm.h) and chunk of rows, one or two for row passes
// Numerics  float32 sums and workspace; gate and up are rounded to the activation dtype before the activation, so that
//           backward sees the forward's values; LayerNorm statistics in two passes; one rounding at each store
// Limits    any F: gate_up has padded rows and workspace rows are whole vectors; last dims contiguous
// Source    original; formula: Shazeer, arXiv:2002.05202; sub-LayerNorm: arXiv:2303.11331
#include "gemm/layers.h"
#include "swiglu_mlp/swiglu_mlp.h"

namespace eva02::EVA02_ISA {
namespace {

EVA02_INLINE vf swiglu(vf g, vf u) { return g * vsigmoid(g) * u; }

// silu(gate) * up, on load.
template <class T>
struct Hidden {
  const T* gate_up;
  int64_t padded;

  struct Row {
    const T* gate;
    const T* up;
    EVA02_INLINE vf load(int64_t c) const { return swiglu(EVA02_ISA::load(gate + c), EVA02_ISA::load(up + c)); }
    EVA02_INLINE vf load_partial(int64_t c, int64_t n) const {
      return swiglu(EVA02_ISA::load_partial(gate + c, n), EVA02_ISA::load_partial(up + c, n));
    }
  };
  EVA02_INLINE Row row(int64_t r) const {
    const T* const g = gate_up + r * 2 * padded;
    return {g, g + padded};
  }
};

// Gate and up of the rows that pack_x packs, into `gate_up` (may be nullptr), and silu(gate) * up into `hidden` (row
// stride Fp, may be nullptr).
template <class T, class PackX>
void gate_and_up(const SwigluMlpShape& s, const Runtime& runtime, int64_t rows, const PackX& pack_x,
                 const float* b_gate, const float* b_up, T* gate_up, float* hidden) {
  const Matrix<T> w[2] = {{static_cast<const T*>(s.w_gate), s.C}, {static_cast<const T*>(s.w_up), s.C}};
  gemm(
      runtime, {.m = rows, .n = s.F, .k = s.C, .parts = 2}, pack_x,
      [&](int part, int64_t col0, int64_t cols, int64_t k0, int64_t count, float* dst) {
        pack_rows<kNR>(w[part], col0, cols, k0, count, dst);
      },
      [&](const Tile& t) {
        for (int64_t i = 0; i < t.rows; ++i) {
          const int64_t r = t.row0 + i;
          const float *const g = t.row(i, 0), *const u = t.row(i, 1);
          T* const out = gate_up == nullptr ? nullptr : gate_up + r * 2 * s.Fp + t.col0;
          float* const h = hidden == nullptr ? nullptr : hidden + r * s.Fp + t.col0;
          if (h != nullptr && i + kRowsAhead < t.rows) prefetch<For::store>(h + kRowsAhead * s.Fp, t.cols);
          for_columns(t.cols, [&](int64_t c, int64_t lanes) {
            const vf gate = round_to<T>(load(g + c) + load(b_gate + t.col0 + c));
            const vf up = round_to<T>(load(u + c) + load(b_up + t.col0 + c));
            if (out != nullptr) {
              put(out + c, gate, lanes);
              put(out + s.Fp + c, up, lanes);
            }
            if (h != nullptr) put(h + c, swiglu(gate, up), lanes);
          });
        }
      });
}

template <class T>
void swiglu_mlp_fwd(const SwigluMlpFwdParams& p, const Runtime& runtime) {
  const SwigluMlpShape& s = p.s;
  const Matrix<T> x{static_cast<const T*>(s.x), s.x_stride}, w_down{static_cast<const T*>(s.w_down), s.F};
  const Floats b_gate(s.b_gate, s.F, 0.f), b_up(s.b_up, s.F, 0.f), b_down(s.b_down, s.C, 0.f);
  const Floats norm_weight(s.norm_weight, s.F, 1.f), norm_bias(s.norm_bias, s.F, 0.f);
  const Floats pre_weight(s.pre_weight, s.C, 1.f), pre_bias(s.pre_bias, s.C, 0.f), scale(s.layer_scale, s.C, 1.f);
  const RowScale row_scale{s.row_scale, s.rows_per_sample};
  const int64_t chunk = chunk_rows(s.M, s.F);
  const Buffer hidden(chunk * s.Fp);

  for (int64_t r0 = 0; r0 < s.M; r0 += chunk) {
    const int64_t rows = min64(chunk, s.M - r0);
    gate_and_up<T>(
        s, runtime, rows,
        NormalizedRowPanels<T>{x, r0, s.C, s.pre_norm, p.pre_eps, p.pre_mean, p.pre_rstd, pre_weight, pre_bias}, b_gate,
        b_up, p.gate_up == nullptr ? nullptr : static_cast<T*>(p.gate_up) + r0 * 2 * s.Fp, hidden);
    gemm(runtime, {.m = rows, .n = s.C, .k = s.F},
         NormalizedRowPanels<float>{
             {hidden, s.Fp}, 0, s.F, s.sub_norm, p.eps, p.mean + r0, p.rstd + r0, norm_weight, norm_bias},
         WeightRowPanels<Matrix<T>>{w_down}, [&](const Tile& t) {
           write_output(t, r0, b_down, scale, row_scale, s.add_x ? x.data : nullptr, x.stride, static_cast<T*>(p.out),
                        p.out_stride);
         });
  }
}

// Gradients with respect to gate and up of a row, from d, the gradient of the hidden (already through the sub-norm).
EVA02_INLINE void swiglu_grad(vf d, vf g, vf u, vf& dg, vf& du) {
  const vf sigmoid = vsigmoid(g), silu = g * sigmoid;
  du = d * silu;
  dg = d * u * (sigmoid + silu * (1.f - sigmoid));
}

template <class T>
void swiglu_mlp_bwd(const SwigluMlpBwdParams& p, const Runtime& runtime) {
  const SwigluMlpShape& s = p.s;
  const Matrix<T> x{static_cast<const T*>(s.x), s.x_stride}, w_down{static_cast<const T*>(s.w_down), s.F};
  const Stacked<T> w_in{{static_cast<const T*>(s.w_gate), static_cast<const T*>(s.w_up), nullptr}, {s.F, s.F, 0}, s.C};
  const Floats b_gate(s.b_gate, s.F, 0.f), b_up(s.b_up, s.F, 0.f), b_down(s.b_down, s.C, 0.f);
  const Floats norm_weight(s.norm_weight, s.F, 1.f), norm_bias(s.norm_bias, s.F, 0.f);
  const Floats pre_weight(s.pre_weight, s.C, 1.f), pre_bias(s.pre_bias, s.C, 0.f);
  const Floats scale(s.layer_scale, s.C, 1.f), ones(Param{}, s.C, 1.f);
  const RowScale row_scale{s.row_scale, s.rows_per_sample};
  const T* const dout = static_cast<const T*>(p.dout);
  const Scaled<T> dy{dout, p.dout_stride, row_scale, ones}, dy_scaled{dout, p.dout_stride, row_scale, scale};
  T* const dx = static_cast<T*>(p.dx);
  T *const dw_gate = static_cast<T*>(p.dw_gate), *const dw_up = static_cast<T*>(p.dw_up);

  // What the outputs asked for need.
  const bool dots = p.dlayer_scale.data != nullptr, down_sums = dots || p.db_down.data != nullptr;
  const bool down_product = dots || p.dw_down != nullptr;
  const bool in_product = dw_gate != nullptr || dw_up != nullptr;
  const bool in_sums = p.db_gate.data != nullptr || p.db_up.data != nullptr;
  const bool pre_sums = p.dpre_weight.data != nullptr || p.dpre_bias.data != nullptr;
  const bool norm_sums = p.dnorm_weight.data != nullptr || p.dnorm_bias.data != nullptr;
  const bool input_gradient = dx != nullptr || pre_sums;
  const bool gate_gradient = in_product || in_sums || input_gradient;
  const bool hidden_gradient = gate_gradient || norm_sums;

  const int64_t chunk = chunk_rows(s.M, 2 * s.F), chunks = max64(1, ceil_div(s.M, chunk));
  const int64_t Fp = round_up(s.F, 16), F2 = 2 * s.F;
  const Buffer dh(hidden_gradient ? chunk * Fp : 0), din(gate_gradient ? chunk * F2 + kLanes : 0);
  const Buffer dn(s.pre_norm && input_gradient ? chunk * s.C : 0);
  const bool recompute = p.gate_up == nullptr && (hidden_gradient || down_product);
  const Buffer recomputed(recompute ? chunk * 2 * s.Fp * static_cast<int64_t>(sizeof(T)) / 4 : 0);
  const OutputGradients<T> down(s.C, s.F, down_product ? chunks : 1, dots);
  const ChunkSums in_totals(F2, s.C, in_product ? chunks : 1);
  const Buffer in_column_sums(round_up(F2, 16));
  zero(in_column_sums, round_up(F2, 16));
  NormSums norm(norm_sums ? s.F : 1, norm_sums ? chunk : 1), pre(pre_sums ? s.C : 1, pre_sums ? chunk : 1);

  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t r0 = i * chunk, rows = min64(chunk, s.M - r0);
    const Normalized<Matrix<T>> xn{x, p.pre_mean, p.pre_rstd, pre_weight, pre_bias};
    const T* gate_up = static_cast<const T*>(p.gate_up) + r0 * 2 * s.Fp;  // rows from r0
    if (recompute) {
      T* const room = reinterpret_cast<T*>(static_cast<float*>(recomputed));
      const auto pack_x = [&](int64_t row0, int64_t n, float* dst) {
        if (s.pre_norm)
          pack_rows<kMR>(xn, r0 + row0, n, 0, s.C, dst);
        else
          pack_rows<kMR>(x, r0 + row0, n, 0, s.C, dst);
      };
      gate_and_up<T>(s, runtime, rows, pack_x, b_gate, b_up, room, nullptr);
      gate_up = room;
    }
    const Hidden<T> hidden{gate_up, s.Fp};

    if (down_product) {
      const auto accumulate = [&](const auto& source) {
        down.accumulate(runtime, i, rows, dy, r0, source, 0, down_sums, w_down.data, scale, static_cast<T*>(p.dw_down));
      };
      if (s.sub_norm)
        accumulate(Normalized<Hidden<T>>{hidden, p.mean + r0, p.rstd + r0, norm_weight, norm_bias});
      else
        accumulate(hidden);
    } else if (down_sums) {
      add_column_sums(runtime, r0, rows, s.C, dy, down.column_sums());
    }
    if (!hidden_gradient) continue;

    gemm(runtime, {.m = rows, .n = s.F, .k = s.C}, RowPanels<Scaled<T>>{dy_scaled, r0, s.C},
         ColumnPanels<Matrix<T>>{w_down, 0, s.F},
         [&](const Tile& t) { write_rows(t, 0, static_cast<float*>(dh), Fp); });
    runtime.parallel_for(0, ceil_div(rows, kBlockRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        if (norm_sums) norm.reset(block);
        for (int64_t row = block * kBlockRows; row < min64(rows, (block + 1) * kBlockRows); ++row) {
          const auto h = hidden.row(row);
          const float* const d = dh + row * Fp;
          float* const dg = din + row * F2;
          const auto emit = [&](int64_t c, int64_t lanes, vf v) {
            if (!gate_gradient) return;
            vf gate, up;
            swiglu_grad(v, get(h.gate + c, lanes), get(h.up + c, lanes), gate, up);
            put(dg + c, gate, lanes);
            put(dg + s.F + c, up, lanes);
          };
          if (s.sub_norm)
            norm_backward_row(h, d, s.F, p.mean[r0 + row], p.rstd[r0 + row], norm_weight,
                              norm_sums ? norm.weight(block) : nullptr, norm_sums ? norm.bias(block) : nullptr, emit);
          else
            for_columns(s.F, [&](int64_t c, int64_t lanes) { emit(c, lanes, get(d + c, lanes)); });
        }
      }
    });
    if (norm_sums) norm.add(runtime, rows);

    const Matrix<float> d_in{din, F2};
    if (input_gradient) {
      gemm(runtime, {.m = rows, .n = s.C, .k = F2}, RowPanels<Matrix<float>>{d_in, 0, F2},
           ColumnPanels<Stacked<T>>{w_in, 0, s.C}, [&](const Tile& t) {
             if (s.pre_norm)
               write_rows(t, 0, static_cast<float*>(dn), s.C);
             else
               write_rows(t, r0, dx, p.dx_stride, s.add_x ? dout : nullptr, p.dout_stride);
           });
      if (s.pre_norm)
        pre_norm_backward<T>(runtime, r0, rows, s.C, x, dn, s.C, p.pre_mean, p.pre_rstd, pre_weight,
                             s.add_x ? dout : nullptr, p.dout_stride, dx, p.dx_stride, pre_sums ? &pre : nullptr);
    }
    if (in_product) {
      const int64_t c0 = dw_gate == nullptr ? s.F : 0, n = (dw_up == nullptr ? s.F : F2) - c0;
      const auto product = [&](const auto& source) {
        weight_gradient(runtime, rows, n, s.C, Matrix<float>{din + c0, F2}, 0, source, r0, in_column_sums + c0,
                        [&](const Tile& t) {
                          for (int64_t j = 0; j < t.rows; ++j) {
                            Tile shifted = t;
                            shifted.row0 += c0;
                            if (!in_totals.add(shifted, j, i)) continue;
                            const int64_t r = shifted.row0 + j;
                            T* const out = (r < s.F ? dw_gate + r * s.C : dw_up + (r - s.F) * s.C) + t.col0;
                            const float* const v = t.row(j);
                            for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(out + c, load(v + c), lanes); });
                          }
                        });
      };
      if (s.pre_norm)
        product(xn);
      else
        product(x);
    }
    // Bias gradients whose weight gradient was not wanted.
    if (dw_gate == nullptr && p.db_gate.data != nullptr) add_column_sums(runtime, 0, rows, s.F, d_in, in_column_sums);
    if (dw_up == nullptr && p.db_up.data != nullptr)
      add_column_sums(runtime, 0, rows, s.F, Matrix<float>{din + s.F, F2}, in_column_sums + s.F);
  }
  down.finish(scale, b_down, p.db_down, p.dlayer_scale);
  write_vector(p.db_gate, in_column_sums, s.F);
  write_vector(p.db_up, in_column_sums + s.F, s.F);
  if (norm_sums) norm.write(p.dnorm_weight, p.dnorm_bias);
  if (pre_sums) pre.write(p.dpre_weight, p.dpre_bias);
}

}  // namespace

void run_swiglu_mlp_fwd(const SwigluMlpFwdParams& p, const Runtime& runtime) {
  switch (p.s.dtype) {
    case DType::f32: return swiglu_mlp_fwd<float>(p, runtime);
    case DType::bf16: return swiglu_mlp_fwd<bf16>(p, runtime);
    case DType::f16: return swiglu_mlp_fwd<f16>(p, runtime);
  }
}

void run_swiglu_mlp_bwd(const SwigluMlpBwdParams& p, const Runtime& runtime) {
  switch (p.s.dtype) {
    case DType::f32: return swiglu_mlp_bwd<float>(p, runtime);
    case DType::bf16: return swiglu_mlp_bwd<bf16>(p, runtime);
    case DType::f16: return swiglu_mlp_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
