// subln_swiglu: y = LayerNorm(h) * w + b over the last dim, h = silu(g) * u, never rounded
// Fused     sigmoid, two multiplications, LayerNorm (eager: 3 kernels, 7n elements moved); backward in one pass, with
//           the weight and bias gradients
// Bytes     forward moves 3n elements, backward 5n: the minimum of both; mean and rstd are 8 bytes a row; large float32
//           outputs bypass the caches
// Launch    parallel over rows, at least 16 Ki elements a thread; backward over at most 64 fixed chunks of rows
// Numerics  float32 inside, one rounding at the store; variance from a second pass over the row
// Limits    last dim contiguous; any row stride, any F (masked tail); one float32 row per thread stays in cache
// Source    original; formulas: Shazeer, arXiv:2002.05202; EVA-02, arXiv:2303.11331
#include "common/rows.h"
#include "subln_swiglu/subln_swiglu.h"

namespace eva02::EVA02_ISA {
namespace {

template <class T>
void subln_swiglu_fwd(const SublnSwigluFwdParams& p, const Runtime& runtime) {
  const int64_t F = p.F, width = padded(F);
  const Buffer params(2 * width);
  float *w = params, *b = w + width;
  load_param(w, p.weight, F, 1.f);
  load_param(b, p.bias, F, 0.f);
  const bool streamed = is_streamed(static_cast<const T*>(p.out), p.out_stride, p.rows, F);
  runtime.parallel_for(0, p.rows, row_grain(F), [&](int64_t begin, int64_t end) {
    const Buffer scratch(width);
    float* h = scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* g = static_cast<const T*>(p.gate) + row * p.gate_stride;
      const T* u = static_cast<const T*>(p.up) + row * p.up_stride;
      T* y = static_cast<T*>(p.out) + row * p.out_stride;
      Sum sum, squares;
      columns(F, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
        const vf gate = ld(g + i, part);
        const vf value = gate * vsigmoid(gate) * ld(u + i, part);
        store(h + i, value);
        sum.add(value, a);
      });
      const float mean = sum.total() / static_cast<float>(F);
      columns(F, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
        const vf d = zero_tail(load(h + i) - mean, part);
        squares.add(d * d, a);
      });
      const float rstd = 1.f / __builtin_sqrtf(squares.total() / static_cast<float>(F) + p.eps);
      columns(F, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
        const vf value = (load(h + i) - mean) * rstd * load(w + i) + load(b + i);
        streamed ? st_streamed(y + i, value, part) : st(y + i, value, part);
      });
      p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
    if (streamed) stream_fence();
  });
}

template <class T, bool kParamGrads>
void subln_swiglu_bwd(const SublnSwigluBwdParams& p, const Runtime& runtime) {
  const int64_t F = p.F, width = padded(F);
  const Buffer params(width);
  float* w = params;
  load_param(w, p.weight, F, 1.f);
  const RowChunks chunks(p.rows);
  const Buffer partials(kParamGrads ? chunks.count * 2 * width : 0);
  const bool streamed = is_streamed(static_cast<const T*>(p.dgate), p.dgate_stride, p.rows, F) &&
                        is_streamed(static_cast<const T*>(p.dup), p.dup_stride, p.rows, F);
  runtime.parallel_for(0, chunks.count, chunks.grain(F), [&](int64_t begin, int64_t end) {
    const Buffer scratch(width);
    float* sig = scratch;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *dw = partials + chunk * 2 * width, *db = dw + width;
      if (kParamGrads) fill(dw, 2 * width, 0.f);
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        const T* dy = static_cast<const T*>(p.dout) + row * p.dout_stride;
        const T* g = static_cast<const T*>(p.gate) + row * p.gate_stride;
        const T* u = static_cast<const T*>(p.up) + row * p.up_stride;
        T* dg = static_cast<T*>(p.dgate) + row * p.dgate_stride;
        T* du = static_cast<T*>(p.dup) + row * p.dup_stride;
        const float mean = p.mean[row], rstd = p.rstd[row];
        Sum sum_d, sum_dx;  // of w * dy, and of w * dy * xhat
        columns(F, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
          const vf gate = ld(g + i, part), dout = ld(dy + i, part);
          const vf s = vsigmoid(gate);
          const vf x = (gate * s * ld(u + i, part) - mean) * rstd;
          store(sig + i, s);
          const vf d = dout * load(w + i);
          sum_d.add(d, a);
          sum_dx.add(d * x, a);
          if constexpr (kParamGrads) {
            store(dw + i, load(dw + i) + dout * x);
            store(db + i, load(db + i) + dout);
          }
        });
        if (p.dgate == nullptr && p.dup == nullptr) continue;
        const float c1 = sum_d.total() / static_cast<float>(F), c2 = sum_dx.total() / static_cast<float>(F);
        columns(F, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
          if (streamed) {  // memory is the bound, and this pass reads none of it: ask for the next row
            __builtin_prefetch(dy + p.dout_stride + i);
            __builtin_prefetch(g + p.gate_stride + i);
            __builtin_prefetch(u + p.up_stride + i);
          }
          const vf gate = ld(g + i, part), up = ld(u + i, part), s = load(sig + i), silu = gate * s;
          const vf x = (silu * up - mean) * rstd;
          const vf dh = (ld(dy + i, part) * load(w + i) - c1 - x * c2) * rstd;
          const vf dgate = dh * up * (s + silu * (1.f - s)), dup = dh * silu;
          if (streamed) {
            st_streamed(dg + i, dgate, part), st_streamed(du + i, dup, part);
          } else {
            if (p.dup != nullptr) st(du + i, dup, part);
            if (p.dgate != nullptr) st(dg + i, dgate, part);
          }
        });
      }
    }
    if (streamed) stream_fence();
  });
  if (kParamGrads) {
    reduce(p.dweight, partials, chunks.count, 2 * width, F, runtime);
    reduce(p.dbias, partials + width, chunks.count, 2 * width, F, runtime);
  }
}

template <class T>
void subln_swiglu_bwd(const SublnSwigluBwdParams& p, const Runtime& runtime) {
  if (p.dweight.data != nullptr || p.dbias.data != nullptr)
    subln_swiglu_bwd<T, true>(p, runtime);
  else
    subln_swiglu_bwd<T, false>(p, runtime);
}

}  // namespace

void run_subln_swiglu_fwd(const SublnSwigluFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return subln_swiglu_fwd<float>(p, runtime);
    case DType::bf16: return subln_swiglu_fwd<bf16>(p, runtime);
    case DType::f16: return subln_swiglu_fwd<f16>(p, runtime);
  }
}

void run_subln_swiglu_bwd(const SublnSwigluBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return subln_swiglu_bwd<float>(p, runtime);
    case DType::bf16: return subln_swiglu_bwd<bf16>(p, runtime);
    case DType::f16: return subln_swiglu_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
