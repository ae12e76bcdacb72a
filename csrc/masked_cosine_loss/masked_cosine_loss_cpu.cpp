// masked_cosine_loss: -mean over selected rows of cos(pred[m], target[index[m]]); 0 where no row is selected
// Fused     gather of the target rows, both norms, dot product, mean (eager: 6 kernels); each backward in one pass
// Bytes     forward reads 2n elements; backward reads 2n and writes n for dpred, and the same for dtarget
// Launch    parallel over rows, at least 16 Ki elements a thread
// Numerics  float32 inside, the mean over rows in float64; norms are clamped from below by 1e-8, and a clamped norm is
//           a constant (its derivative is zero)
// Limits    last dim contiguous; any row stride; target rows may repeat (their gradients are summed in index order)
// Source    original; the feature distillation loss of EVA-02, arXiv:2303.11331
#include "common/rows.h"
#include "masked_cosine_loss/masked_cosine_loss.h"

namespace eva02::EVA02_ISA {
namespace {

constexpr float kEps = 1e-8f, kClamped = 1.f / kEps;

int64_t count_selected(const TokenIndex& index, int64_t M) {
  if (index.data == nullptr) return M;
  int64_t count = 0;
  for (int64_t m = 0; m < M; ++m) count += index[m] >= 0;
  return count;
}

template <class T>
void masked_cosine_loss_fwd(const MaskedCosineLossFwdParams& p, const Runtime& runtime) {
  runtime.parallel_for(0, p.M, row_grain(p.D), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float *stat = p.stats + m, inv_x = 0.f, inv_t = 0.f, cosine = 0.f;
      const int64_t row = p.index[m];
      if (row >= 0) {
        const T* x = static_cast<const T*>(p.pred) + m * p.pred_stride;
        const T* t = static_cast<const T*>(p.target) + row * p.target_stride;
        Sum xx, tt, xt;
        columns(p.D, [&](int64_t i, auto part, int a) EVA02_ALWAYS_INLINE {
          const vf u = ld(x + i, part), v = ld(t + i, part);
          xx.add(u * u, a);
          tt.add(v * v, a);
          xt.add(u * v, a);
        });
        const float norm_x = __builtin_sqrtf(xx.total()), norm_t = __builtin_sqrtf(tt.total());
        inv_x = norm_x < kEps ? kClamped : 1.f / norm_x;  // a NaN norm stays NaN
        inv_t = norm_t < kEps ? kClamped : 1.f / norm_t;
        cosine = xt.total() * inv_x * inv_t;
      }
      stat[0] = inv_x;
      stat[p.M] = inv_t;
      stat[2 * p.M] = cosine;
    }
  });
  const int64_t count = count_selected(p.index, p.M);
  double sum = 0.;
  for (int64_t m = 0; m < p.M; ++m) sum += p.stats[2 * p.M + m];
  *p.loss = count == 0 ? 0.f : static_cast<float>(-sum / static_cast<double>(count));
}

// d cos / d x = (t / |t| - cos * x / |x|) / |x|, without the second term where |x| is clamped.
struct Coefficients {
  float other, self;
};
EVA02_INLINE Coefficients coefficients(float scale, float inv_self, float inv_other, float cosine) {
  return {scale * inv_self * inv_other, inv_self < kClamped ? -scale * cosine * inv_self * inv_self : 0.f};
}

template <class T>
void masked_cosine_loss_bwd(const MaskedCosineLossBwdParams& p, const Runtime& runtime) {
  const int64_t count = count_selected(p.index, p.M);
  const float scale = count == 0 ? 0.f : -*p.dloss / static_cast<float>(count);
  const float *inv_x = p.stats, *inv_t = p.stats + p.M, *cosine = p.stats + 2 * p.M;
  const size_t bytes = static_cast<size_t>(p.D) * sizeof(T);
  const T *pred = static_cast<const T*>(p.pred), *target = static_cast<const T*>(p.target);
  if (p.dpred != nullptr)
    runtime.parallel_for(0, p.M, row_grain(p.D), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        T* dx = static_cast<T*>(p.dpred) + m * p.dpred_stride;
        const int64_t row = p.index[m];
        if (row < 0) {
          memset(dx, 0, bytes);
          continue;
        }
        const T *x = pred + m * p.pred_stride, *t = target + row * p.target_stride;
        const Coefficients c = coefficients(scale, inv_x[m], inv_t[m], cosine[m]);
        columns(p.D, [&](int64_t i, auto part, int) EVA02_ALWAYS_INLINE {
          st(dx + i, c.other * ld(t + i, part) + c.self * ld(x + i, part), part);
        });
      }
    });
  if (p.dtarget == nullptr) return;
  runtime.parallel_for(0, p.T, row_grain(p.D), [&](int64_t begin, int64_t end) {
    const Buffer scratch(padded(p.D));
    float* sum = scratch;
    for (int64_t row = begin; row < end; ++row) {
      T* dt = static_cast<T*>(p.dtarget) + row * p.dtarget_stride;
      const T* t = target + row * p.target_stride;
      // Without an index, row m is named by m alone.
      const bool indexed = p.index.data != nullptr;
      const int32_t* entries = indexed ? p.inverse.entries + p.inverse.offsets[row] : nullptr;
      const int64_t repeats = indexed ? p.inverse.offsets[row + 1] - p.inverse.offsets[row] : 1;
      if (repeats == 0) {
        memset(dt, 0, bytes);
        continue;
      }
      fill(sum, padded(p.D), 0.f);
      float self = 0.f;
      for (int64_t k = 0; k < repeats; ++k) {
        const int64_t m = indexed ? entries[k] : row;
        const T* x = pred + m * p.pred_stride;
        const Coefficients c = coefficients(scale, inv_t[m], inv_x[m], cosine[m]);
        self += c.self;
        columns(p.D, [&](int64_t i, auto part, int)
                         EVA02_ALWAYS_INLINE { store(sum + i, load(sum + i) + c.other * ld(x + i, part)); });
      }
      columns(p.D, [&](int64_t i, auto part, int)
                       EVA02_ALWAYS_INLINE { st(dt + i, load(sum + i) + self * ld(t + i, part), part); });
    }
  });
}

}  // namespace

void run_masked_cosine_loss_fwd(const MaskedCosineLossFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return masked_cosine_loss_fwd<float>(p, runtime);
    case DType::bf16: return masked_cosine_loss_fwd<bf16>(p, runtime);
    case DType::f16: return masked_cosine_loss_fwd<f16>(p, runtime);
  }
}

void run_masked_cosine_loss_bwd(const MaskedCosineLossBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return masked_cosine_loss_bwd<float>(p, runtime);
    case DType::bf16: return masked_cosine_loss_bwd<bf16>(p, runtime);
    case DType::f16: return masked_cosine_loss_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
