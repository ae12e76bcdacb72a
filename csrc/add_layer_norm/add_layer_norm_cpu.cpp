// add_layer_norm: sum = residual + row_scale * layer_scale * x; normed = LayerNorm(sum) * w + b, or RMSNorm
// Fused     drop path, layer scale, residual add, norm (eager: 4 kernels, 11n elements moved); backward in one pass,
//           with the norm's parameter gradients and the layer scale's
// Bytes     forward moves 4n elements; backward 4n, plus n for dx where it differs from dresidual and n to read x for
//           the layer scale: the minimum of both; large float32 outputs bypass the caches
// Launch    parallel over rows, at least 16 Ki elements a thread; backward over at most 64 fixed chunks of rows
// Numerics  float32 inside; sum is rounded to the dtype before its statistics, so that normed is a function of the sum
//           that is kept; variance from a second pass over the row
// Limits    last dim contiguous; any row stride, any C (masked tail); one float32 row per thread stays in cache
// Source    original; Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467; Touvron et al.,
// arXiv:2103.17239
#include "add_layer_norm/add_layer_norm.h"
#include "common/rows.h"

namespace eva02::EVA02_ISA {
namespace {

// v rounded to T, as float32.
template <class T>
EVA02_INLINE vf rounded(vf v) {
  T buffer[kLanes];
  store(buffer, v);
  return load(buffer);
}
template <>
EVA02_INLINE vf rounded<float>(vf v) {
  return v;
}

template <class T, bool kRms>
void add_layer_norm_fwd(const AddLayerNormFwdParams& p, const Runtime& runtime) {
  const int64_t C = p.C, width = padded(C);
  const Buffer params(3 * width);
  float *w = params, *b = w + width, *scale = b + width;
  load_param(w, p.weight, C, 1.f);
  load_param(b, p.bias, C, 0.f);
  load_param(scale, p.layer_scale, C, 1.f);
  const bool streamed = is_streamed(static_cast<const T*>(p.normed), p.normed_stride, p.rows, C) &&
                        (p.sum == nullptr || is_streamed(static_cast<const T*>(p.sum), p.sum_stride, p.rows, C));
  runtime.parallel_for(0, p.rows, row_grain(C), [&](int64_t begin, int64_t end) {
    const Buffer scratch(width);
    float* s = scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* out = static_cast<T*>(p.normed) + row * p.normed_stride;
      T* sum_out = static_cast<T*>(p.sum) + row * p.sum_stride;
      const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
      Sum sum, squares;
      columns(C, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
        vf v = ld(x + i, part) * (row_scale * load(scale + i));
        if (p.residual != nullptr) v = v + ld(residual + i, part);
        v = rounded<T>(v);
        if (p.sum != nullptr) streamed ? st_streamed(sum_out + i, v, part) : st(sum_out + i, v, part);
        store(s + i, v);
        sum.add(v, a);
      });
      const float mean = kRms ? 0.f : sum.total() / static_cast<float>(C);
      columns(C, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
        const vf d = zero_tail(load(s + i) - mean, part);
        squares.add(d * d, a);
      });
      const float rstd = 1.f / __builtin_sqrtf(squares.total() / static_cast<float>(C) + p.eps);
      columns(C, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
        const vf value = (load(s + i) - mean) * rstd * load(w + i) + load(b + i);
        streamed ? st_streamed(out + i, value, part) : st(out + i, value, part);
      });
      if (!kRms && p.mean != nullptr) p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
    if (streamed) stream_fence();
  });
}

template <class T, bool kParamGrads, bool kScaleGrad>
void add_layer_norm_bwd(const AddLayerNormBwdParams& p, const Runtime& runtime) {
  const int64_t C = p.C, width = padded(C);
  constexpr int64_t kPartials = (kParamGrads ? 2 : 0) + (kScaleGrad ? 1 : 0);
  const Buffer params(2 * width);
  float *w = params, *scale = w + width;
  load_param(w, p.weight, C, 1.f);
  load_param(scale, p.layer_scale, C, 1.f);
  const RowChunks chunks(p.rows);
  const Buffer partials(chunks.count * kPartials * width);
  const bool streamed =
      is_streamed(static_cast<const T*>(p.dx), p.dx_stride, p.rows, C) &&
      (p.dresidual == nullptr || is_streamed(static_cast<const T*>(p.dresidual), p.dresidual_stride, p.rows, C));
  runtime.parallel_for(0, chunks.count, chunks.grain(C), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* dw = partials + chunk * kPartials * width;
      float* db = dw + width;
      float* dscale = dw + (kPartials - 1) * width;
      fill(dw, kPartials * width, 0.f);
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        const T* dy = static_cast<const T*>(p.dnormed) + row * p.dnormed_stride;
        const T* dsum = static_cast<const T*>(p.dsum) + row * p.dsum_stride;
        const T* s = static_cast<const T*>(p.sum) + row * p.sum_stride;
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
        T* dx = static_cast<T*>(p.dx) + row * p.dx_stride;
        T* dresidual = static_cast<T*>(p.dresidual) + row * p.dresidual_stride;
        const float row_scale = p.row_scale == nullptr ? 1.f : p.row_scale[row / p.rows_per_sample];
        const float mean = p.rms ? 0.f : p.mean[row], rstd = p.rstd[row];
        // Where memory is the bound, each pass asks for what the next one reads: else half of the inputs idle in turn.
        Sum sum_d, sum_dx;  // of w * dy, and of w * dy * xhat
        columns(C, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
          if (streamed) {
            if (p.dsum != nullptr) __builtin_prefetch(dsum + i);
            if constexpr (kScaleGrad) __builtin_prefetch(x + i);
          }
          const vf dout = ld(dy + i, part), xhat = (ld(s + i, part) - mean) * rstd;
          const vf d = dout * load(w + i);
          sum_d.add(d, a);
          sum_dx.add(d * xhat, a);
          if constexpr (kParamGrads) {
            store(dw + i, load(dw + i) + dout * xhat);
            store(db + i, load(db + i) + dout);
          }
        });
        if (p.dx == nullptr && p.dresidual == nullptr && !kScaleGrad) continue;
        const float c1 = p.rms ? 0.f : sum_d.total() / static_cast<float>(C);
        const float c2 = sum_dx.total() / static_cast<float>(C);
        columns(C, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
          if (streamed) {
            __builtin_prefetch(dy + p.dnormed_stride + i);
            __builtin_prefetch(s + p.sum_stride + i);
          }
          const vf xhat = (ld(s + i, part) - mean) * rstd;
          vf d = (ld(dy + i, part) * load(w + i) - c1 - xhat * c2) * rstd;
          if (p.dsum != nullptr) d = d + ld(dsum + i, part);
          if (p.dresidual != nullptr) streamed ? st_streamed(dresidual + i, d, part) : st(dresidual + i, d, part);
          const vf scaled = row_scale * d, value = scaled * load(scale + i);
          if (p.dx != nullptr) streamed ? st_streamed(dx + i, value, part) : st(dx + i, value, part);
          if constexpr (kScaleGrad) store(dscale + i, load(dscale + i) + scaled * ld(x + i, part));
        });
      }
    }
    if (streamed) stream_fence();
  });
  if (kParamGrads) {
    reduce(p.dweight, partials, chunks.count, kPartials * width, C, runtime);
    reduce(p.dbias, partials + width, chunks.count, kPartials * width, C, runtime);
  }
  if (kScaleGrad)
    reduce(p.dlayer_scale, partials + (kPartials - 1) * width, chunks.count, kPartials * width, C, runtime);
}

template <class T>
void add_layer_norm_fwd(const AddLayerNormFwdParams& p, const Runtime& runtime) {
  p.rms ? add_layer_norm_fwd<T, true>(p, runtime) : add_layer_norm_fwd<T, false>(p, runtime);
}

template <class T>
void add_layer_norm_bwd(const AddLayerNormBwdParams& p, const Runtime& runtime) {
  const bool params = p.dweight.data != nullptr || p.dbias.data != nullptr, scale = p.dlayer_scale.data != nullptr;
  if (params)
    scale ? add_layer_norm_bwd<T, true, true>(p, runtime) : add_layer_norm_bwd<T, true, false>(p, runtime);
  else
    scale ? add_layer_norm_bwd<T, false, true>(p, runtime) : add_layer_norm_bwd<T, false, false>(p, runtime);
}

}  // namespace

void run_add_layer_norm_fwd(const AddLayerNormFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return add_layer_norm_fwd<float>(p, runtime);
    case DType::bf16: return add_layer_norm_fwd<bf16>(p, runtime);
    case DType::f16: return add_layer_norm_fwd<f16>(p, runtime);
  }
}

void run_add_layer_norm_bwd(const AddLayerNormBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return add_layer_norm_bwd<float>(p, runtime);
    case DType::bf16: return add_layer_norm_bwd<bf16>(p, runtime);
    case DType::f16: return add_layer_norm_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
