// gather_layer_norm: out[m] = LayerNorm(x[index[m]]) * w + b; a padding row (index[m] < 0) is zero, statistics included
// Fused     gather, LayerNorm (eager: two kernels over n selected elements, or LayerNorm over all N tokens first)
// Bytes     forward moves 2n elements; backward reads 2n and writes dx once: the minimum of both
// Launch    parallel over selected rows, backward over at most 64 fixed chunks of the rows of x, at least 16
//           Ki elements a thread
// Numerics  float32 inside, one rounding; a row selected k times sums its k output gradients before the one norm
// backward Limits    last dim contiguous; any batch and token stride of x; one float32 row per thread stays in cache
// Source    original; Ba et al., arXiv:1607.06450
#include "common/rows.h"
#include "gather_layer_norm/gather_layer_norm.h"

namespace eva02::EVA02_ISA {
namespace {

template <class T>
void gather_layer_norm_fwd(const GatherLayerNormFwdParams& p, const Runtime& runtime) {
  const int64_t C = p.C, width = padded(C);
  const Buffer params(2 * width);
  float *w = params, *b = w + width;
  load_param(w, p.weight, C, 1.f);
  load_param(b, p.bias, C, 0.f);
  runtime.parallel_for(0, p.index.count, row_grain(C), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* out = static_cast<T*>(p.out) + m * C;
      const int64_t row = p.index[m];
      if (row < 0) {
        memset(out, 0, static_cast<size_t>(C) * sizeof(T));
        p.mean[m] = p.rstd[m] = 0.f;
        continue;
      }
      const T* x = static_cast<const T*>(p.x) + row / p.seqlen * p.x_batch_stride + row % p.seqlen * p.x_token_stride;
      Sum sum, squares;
      columns(C, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE { sum.add(ld(x + i, part), a); });
      const float mean = sum.total() / static_cast<float>(C);
      columns(C, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
        const vf d = zero_tail(ld(x + i, part) - mean, part);
        squares.add(d * d, a);
      });
      const float rstd = 1.f / __builtin_sqrtf(squares.total() / static_cast<float>(C) + p.eps);
      columns(C, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
        st(out + i, (ld(x + i, part) - mean) * rstd * load(w + i) + load(b + i), part);
      });
      p.mean[m] = mean;
      p.rstd[m] = rstd;
    }
  });
}

template <class T, bool kParamGrads>
void gather_layer_norm_bwd(const GatherLayerNormBwdParams& p, const Runtime& runtime) {
  const int64_t C = p.C, width = padded(C);
  const Buffer params(width);
  float* w = params;
  load_param(w, p.weight, C, 1.f);
  const RowChunks chunks(p.batch * p.seqlen);
  const Buffer partials(kParamGrads ? chunks.count * 2 * width : 0);
  runtime.parallel_for(0, chunks.count, chunks.grain(C), [&](int64_t begin, int64_t end) {
    const Buffer scratch(width);
    float* dy = scratch;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *dw = partials + chunk * 2 * width, *db = dw + width;
      if (kParamGrads) fill(dw, 2 * width, 0.f);
      for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
        const int64_t b = row / p.seqlen, s = row % p.seqlen;
        const T* x = static_cast<const T*>(p.x) + b * p.x_batch_stride + s * p.x_token_stride;
        T* dx = static_cast<T*>(p.dx) + b * p.dx_batch_stride + s * p.dx_token_stride;
        const int32_t* entries = p.inverse.entries + p.inverse.offsets[row];
        const int64_t count = p.inverse.offsets[row + 1] - p.inverse.offsets[row];
        if (count == 0) {
          if (p.dx != nullptr) memset(dx, 0, static_cast<size_t>(C) * sizeof(T));
          continue;
        }
        const float mean = p.mean[entries[0]], rstd = p.rstd[entries[0]];
        const T* dout = static_cast<const T*>(p.dout);
        Sum sum_d, sum_dx;  // of w * dy, and of w * dy * xhat
        columns(C, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
          vf g = ld(dout + entries[0] * C + i, part);
          for (int64_t k = 1; k < count; ++k) g = g + ld(dout + entries[k] * C + i, part);
          const vf xhat = (ld(x + i, part) - mean) * rstd, d = g * load(w + i);
          store(dy + i, g);
          sum_d.add(d, a);
          sum_dx.add(d * xhat, a);
          if constexpr (kParamGrads) {
            store(dw + i, load(dw + i) + g * xhat);
            store(db + i, load(db + i) + g);
          }
        });
        if (p.dx == nullptr) continue;
        const float c1 = sum_d.total() / static_cast<float>(C), c2 = sum_dx.total() / static_cast<float>(C);
        columns(C, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
          const vf xhat = (ld(x + i, part) - mean) * rstd;
          st(dx + i, (load(dy + i) * load(w + i) - c1 - xhat * c2) * rstd, part);
        });
      }
    }
  });
  if (kParamGrads) {
    reduce(p.dweight, partials, chunks.count, 2 * width, C, runtime);
    reduce(p.dbias, partials + width, chunks.count, 2 * width, C, runtime);
  }
}

template <class T>
void gather_layer_norm_bwd(const GatherLayerNormBwdParams& p, const Runtime& runtime) {
  if (p.dweight.data != nullptr || p.dbias.data != nullptr)
    gather_layer_norm_bwd<T, true>(p, runtime);
  else
    gather_layer_norm_bwd<T, false>(p, runtime);
}

}  // namespace

void run_gather_layer_norm_fwd(const GatherLayerNormFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return gather_layer_norm_fwd<float>(p, runtime);
    case DType::bf16: return gather_layer_norm_fwd<bf16>(p, runtime);
    case DType::f16: return gather_layer_norm_fwd<f16>(p, runtime);
  }
}

void run_gather_layer_norm_bwd(const GatherLayerNormBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return gather_layer_norm_bwd<float>(p, runtime);
    case DType::bf16: return gather_layer_norm_bwd<bf16>(p, runtime);
    case DType::f16: return gather_layer_norm_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
