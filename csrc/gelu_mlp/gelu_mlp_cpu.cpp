// gelu_mlp: out = [x +] row_scale * layer_scale * (gelu(LN_pre(x) W1^T + b1) W2^T + b2), gelu(h) = h * cdf_normal(h)
// Fused     LayerNorm on load; bias and GELU in the first epilogue; bias, layer scale, drop path and residual in the
//           second. Backward recomputes the activation from hidden on load, and applies its derivative in an epilogue
// Bytes     forward reads x and weights, writes out and hidden once, plus the float32 activation (M, F), written and
//           read once; backward reads dout and hidden twice, weights once, writes each gradient once, plus float32
//           (M, F) of gradients, in workspace for at most chunk_rows rows at a time
// Launch    two parallel regions per product (gemm/gemm.h) and chunk of rows
// Numerics  float32 sums and workspace; hidden is kept before b1 (a 16-bit number is as exact as it is small) and
//           rounded to the activation dtype before the activation, so that backward sees the forward's values;
//           LayerNorm statistics in two passes; one rounding at each store
// Limits    any F: hidden has padded rows; last dims contiguous
// Source    original; formula: Hendrycks and Gimpel, arXiv:1606.08415
#include "gelu_mlp/gelu_mlp.h"
#include "gemm/layers.h"

namespace eva02::EVA02_ISA {
namespace {

EVA02_INLINE vf gelu(vf h) {
  vf cdf, density;
  vnormal(h, cdf, density);
  return h * cdf;
}
EVA02_INLINE vf gelu_grad(vf d, vf h) {
  vf cdf, density;
  vnormal(h, cdf, density);
  return d * (cdf + h * density);
}

// The activation of hidden + b1, on load.
template <class T>
struct Activated {
  Matrix<T> hidden;
  const float* b1;

  struct Row {
    typename Matrix<T>::Row h;
    const float* b1;
    EVA02_INLINE vf load(int64_t c) const { return gelu(h.load(c) + eva02::EVA02_ISA::load(b1 + c)); }
    EVA02_INLINE vf load_partial(int64_t c, int64_t n) const {
      return gelu(h.load_partial(c, n) + eva02::EVA02_ISA::load(b1 + c));
    }
  };
  EVA02_INLINE Row row(int64_t r) const { return {hidden.row(r), b1}; }
};

// Hidden of the rows that pack_x packs, into `hidden` (T, may be nullptr) and its activation into `active` (may be
// nullptr), both with row stride Fp.
template <class T, class PackX>
void first_product(const GeluMlpShape& s, const Runtime& runtime, int64_t rows, const PackX& pack_x, const float* b1,
                   T* hidden, float* active) {
  gemm(runtime, {.m = rows, .n = s.F, .k = s.C}, pack_x, WeightRowPanels<Matrix<T>>{{static_cast<const T*>(s.w1), s.C}},
       [&](const Tile& t) {
         for (int64_t i = 0; i < t.rows; ++i) {
           const float* const v = t.row(i);
           const int64_t at = (t.row0 + i) * s.Fp + t.col0;
           for_columns(t.cols, [&](int64_t c, int64_t lanes) {
             const vf h = round_to<T>(load(v + c));
             if (hidden != nullptr) put(hidden + at + c, h, lanes);
             if (active != nullptr) put(active + at + c, gelu(h + load(b1 + t.col0 + c)), lanes);
           });
         }
       });
}

template <class T>
void gelu_mlp_fwd(const GeluMlpFwdParams& p, const Runtime& runtime) {
  const GeluMlpShape& s = p.s;
  const Matrix<T> x{static_cast<const T*>(s.x), s.x_stride}, w2{static_cast<const T*>(s.w2), s.F};
  const Floats b1(s.b1, s.F, 0.f), b2(s.b2, s.C, 0.f), scale(s.layer_scale, s.C, 1.f);
  const Floats pre_weight(s.pre_weight, s.C, 1.f), pre_bias(s.pre_bias, s.C, 0.f);
  const RowScale row_scale{s.row_scale, s.rows_per_sample};
  const int64_t chunk = chunk_rows(s.M, s.F);
  const Buffer active(chunk * s.Fp);

  for (int64_t r0 = 0; r0 < s.M; r0 += chunk) {
    const int64_t rows = min64(chunk, s.M - r0);
    first_product<T>(
        s, runtime, rows,
        NormalizedRowPanels<T>{x, r0, s.C, s.pre_norm, p.pre_eps, p.pre_mean, p.pre_rstd, pre_weight, pre_bias}, b1,
        p.hidden == nullptr ? nullptr : static_cast<T*>(p.hidden) + r0 * s.Fp, active);
    gemm(runtime, {.m = rows, .n = s.C, .k = s.F}, RowPanels<Matrix<float>>{{active, s.Fp}, 0, s.F},
         WeightRowPanels<Matrix<T>>{w2}, [&](const Tile& t) {
           write_output(t, r0, b2, scale, row_scale, s.add_x ? x.data : nullptr, x.stride, static_cast<T*>(p.out),
                        p.out_stride);
         });
  }
}

template <class T>
void gelu_mlp_bwd(const GeluMlpBwdParams& p, const Runtime& runtime) {
  const GeluMlpShape& s = p.s;
  const Matrix<T> x{static_cast<const T*>(s.x), s.x_stride};
  const Matrix<T> w1{static_cast<const T*>(s.w1), s.C}, w2{static_cast<const T*>(s.w2), s.F};
  const Floats b1(s.b1, s.F, 0.f), b2(s.b2, s.C, 0.f), scale(s.layer_scale, s.C, 1.f), ones(Param{}, s.C, 1.f);
  const Floats pre_weight(s.pre_weight, s.C, 1.f), pre_bias(s.pre_bias, s.C, 0.f);
  const RowScale row_scale{s.row_scale, s.rows_per_sample};
  const T* const dout = static_cast<const T*>(p.dout);
  const Scaled<T> dy{dout, p.dout_stride, row_scale, ones}, dy_scaled{dout, p.dout_stride, row_scale, scale};
  T *const dx = static_cast<T*>(p.dx), *const dw1 = static_cast<T*>(p.dw1);

  // What the outputs asked for need.
  const bool dots = p.dlayer_scale.data != nullptr, sums2 = dots || p.db2.data != nullptr;
  const bool product2 = dots || p.dw2 != nullptr;
  const bool pre_sums = p.dpre_weight.data != nullptr || p.dpre_bias.data != nullptr;
  const bool input_gradient = dx != nullptr || pre_sums;
  const bool hidden_gradient = input_gradient || dw1 != nullptr || p.db1.data != nullptr;

  const int64_t chunk = chunk_rows(s.M, s.F), chunks = max64(1, ceil_div(s.M, chunk));
  const Buffer d_hidden(hidden_gradient ? chunk * s.Fp + kLanes : 0);
  const Buffer dn(s.pre_norm && input_gradient ? chunk * s.C : 0);
  const bool recompute = p.hidden == nullptr && (hidden_gradient || product2);
  const Buffer recomputed(recompute ? chunk * s.Fp * static_cast<int64_t>(sizeof(T)) / 4 : 0);
  const OutputGradients<T> second(s.C, s.F, product2 ? chunks : 1, dots);
  const ChunkSums totals1(s.F, s.C, dw1 != nullptr ? chunks : 1);
  const Buffer column_sums1(round_up(s.F, 16));
  zero(column_sums1, round_up(s.F, 16));
  NormSums pre(pre_sums ? s.C : 1, pre_sums ? chunk : 1);

  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t r0 = i * chunk, rows = min64(chunk, s.M - r0);
    const Normalized<Matrix<T>> xn{x, p.pre_mean, p.pre_rstd, pre_weight, pre_bias};
    const T* hidden = static_cast<const T*>(p.hidden) + r0 * s.Fp;  // rows from r0
    if (recompute) {
      T* const room = reinterpret_cast<T*>(static_cast<float*>(recomputed));
      const auto pack_x = [&](int64_t row0, int64_t n, float* dst) {
        if (s.pre_norm)
          pack_rows<kMR>(xn, r0 + row0, n, 0, s.C, dst);
        else
          pack_rows<kMR>(x, r0 + row0, n, 0, s.C, dst);
      };
      first_product<T>(s, runtime, rows, pack_x, b1, room, nullptr);
      hidden = room;
    }
    if (product2)
      second.accumulate(runtime, i, rows, dy, r0, Activated<T>{{hidden, s.Fp}, b1}, 0, sums2, w2.data, scale,
                        static_cast<T*>(p.dw2));
    else if (sums2)
      add_column_sums(runtime, r0, rows, s.C, dy, second.column_sums());
    if (!hidden_gradient) continue;

    gemm(runtime, {.m = rows, .n = s.F, .k = s.C}, RowPanels<Scaled<T>>{dy_scaled, r0, s.C},
         ColumnPanels<Matrix<T>>{w2, 0, s.F}, [&](const Tile& t) {
           for (int64_t j = 0; j < t.rows; ++j) {
             const float* const v = t.row(j);
             const int64_t at = (t.row0 + j) * s.Fp + t.col0;
             for_columns(t.cols, [&](int64_t c, int64_t lanes) {
               const vf h = get(hidden + at + c, lanes) + load(b1 + t.col0 + c);
               put(d_hidden + at + c, gelu_grad(load(v + c), h), lanes);
             });
           }
         });
    const Matrix<float> d{d_hidden, s.Fp};
    if (input_gradient) {
      gemm(runtime, {.m = rows, .n = s.C, .k = s.F}, RowPanels<Matrix<float>>{d, 0, s.F},
           ColumnPanels<Matrix<T>>{w1, 0, s.C}, [&](const Tile& t) {
             if (s.pre_norm)
               write_rows(t, 0, static_cast<float*>(dn), s.C);
             else
               write_rows(t, r0, dx, p.dx_stride, s.add_x ? dout : nullptr, p.dout_stride);
           });
      if (s.pre_norm)
        pre_norm_backward<T>(runtime, r0, rows, s.C, x, dn, s.C, p.pre_mean, p.pre_rstd, pre_weight,
                             s.add_x ? dout : nullptr, p.dout_stride, dx, p.dx_stride, pre_sums ? &pre : nullptr);
    }
    if (dw1 != nullptr) {
      const auto product = [&](const auto& source) {
        weight_gradient(runtime, rows, s.F, s.C, d, 0, source, r0, column_sums1, [&](const Tile& t) {
          for (int64_t j = 0; j < t.rows; ++j) {
            if (!totals1.add(t, j, i)) continue;
            T* const out = dw1 + (t.row0 + j) * s.C + t.col0;
            const float* const v = t.row(j);
            for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(out + c, load(v + c), lanes); });
          }
        });
      };
      if (s.pre_norm)
        product(xn);
      else
        product(x);
    } else if (p.db1.data != nullptr) {
      add_column_sums(runtime, 0, rows, s.F, d, column_sums1);
    }
  }
  second.finish(scale, b2, p.db2, p.dlayer_scale);
  write_vector(p.db1, column_sums1, s.F);
  if (pre_sums) pre.write(p.dpre_weight, p.dpre_bias);
}

}  // namespace

void run_gelu_mlp_fwd(const GeluMlpFwdParams& p, const Runtime& runtime) {
  switch (p.s.dtype) {
    case DType::f32: return gelu_mlp_fwd<float>(p, runtime);
    case DType::bf16: return gelu_mlp_fwd<bf16>(p, runtime);
    case DType::f16: return gelu_mlp_fwd<f16>(p, runtime);
  }
}

void run_gelu_mlp_bwd(const GeluMlpBwdParams& p, const Runtime& runtime) {
  switch (p.s.dtype) {
    case DType::f32: return gelu_mlp_bwd<float>(p, runtime);
    case DType::bf16: return gelu_mlp_bwd<bf16>(p, runtime);
    case DType::f16: return gelu_mlp_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
