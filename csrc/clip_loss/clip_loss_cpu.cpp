// clip_loss: cross-entropy of scale * rows keys^T with key first + i as row i's class, and the same of its transpose
// Fused     scale, both log-sum-exps and the targets over one product; backward both softmaxes and the logits' gradient
//           over the product computed again (eager: the logits, their softmaxes and gradients, five matrices of M x N)
// Bytes     reads both and writes each gradient once; workspace: kRows x N float32 logits, and N x D for the keys'
//           gradient where there are several blocks of rows
// Launch    blocks of kRows rows one after the other; within one the product's regions (gemm/gemm.h), then parallel
// over
//           rows and over columns
// Numerics  float32; the loss and the scale's gradient are summed over rows in float64
// Limits    last dim contiguous; any row stride
// Source    original; CLIP, arXiv:2103.00020
#include "clip_loss/clip_loss.h"
#include "gemm/layers.h"

namespace eva02::EVA02_ISA {
namespace {

constexpr int64_t kRows = 256;    // rows whose logits exist at a time
constexpr int64_t kColumns = 64;  // columns that a thread takes at a time

// Logits are kept as factor * product, rounded: a logit less itself is then zero, whatever the compiler contracts.
struct Scale {
  float value, factor;
  explicit Scale(float scale) : value(scale == 0.f ? 0.f : 1.f), factor(scale == 0.f ? 1.f : scale) {}
};

// out (count, N) = scale.factor * rows[r0 ...] keys^T
template <class T>
void dot_products(const Runtime& runtime, const Matrix<T>& rows, int64_t r0, int64_t count, const Matrix<T>& keys,
                  int64_t N, int64_t D, const Scale& scale, float* out) {
  gemm(runtime, {.m = count, .n = N, .k = D}, RowPanels<Matrix<T>>{rows, r0, D}, WeightRowPanels<Matrix<T>>{keys},
       [&](const Tile& t) {
         for (int64_t i = 0; i < t.rows; ++i) {
           float* const y = out + (t.row0 + i) * N + t.col0;
           for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(y + c, load(t.row(i) + c) * scale.factor, lanes); });
         }
       });
}

// log(sum of exp(scale * x)) - target over n values.
float row_loss(const float* x, int64_t n, float scale, float target) {
  const float lowest = -__builtin_inff();
  vf most = splat(lowest);
  for_columns(n, [&](int64_t c, int64_t lanes) {
    const vf v = get(x + c, lanes) * scale;
    if (lanes >= kLanes)
      most = v > most ? v : most;
    else
      for (int64_t i = 0; i < lanes; ++i) most[0] = v[i] > most[0] ? v[i] : most[0];
  });
  const float largest = hmax(most);
  vf sum = {};
  for_columns(n, [&](int64_t c, int64_t lanes) {
    const vf e = vexp(get(x + c, lanes) * scale - largest);
    if (lanes >= kLanes)
      sum += e;
    else
      for (int64_t i = 0; i < lanes; ++i) sum[i] += e[i];
  });
  return largest - target + __builtin_logf(hsum(sum));
}

// Takes `count` more rows of logits into the largest logit and the sum of exp(logit - largest) of n columns.
void add_rows(const float* x, int64_t stride, int64_t count, int64_t n, float scale, float* largest, float* sum) {
  for_columns(n, [&](int64_t c, int64_t lanes) {
    const vf before = get(largest + c, lanes);
    vf now = before;
    for (int64_t i = 0; i < count; ++i) {
      const vf v = get(x + i * stride + c, lanes) * scale;
      now = v > now ? v : now;
    }
    vf total = get(sum + c, lanes) * vexp(before - now);
    for (int64_t i = 0; i < count; ++i) total += vexp(get(x + i * stride + c, lanes) * scale - now);
    put(largest + c, now, lanes);
    put(sum + c, total, lanes);
  });
}

template <class T>
void clip_loss_fwd(const ClipLossFwdParams& p, const Runtime& runtime) {
  const Matrix<T> rows{static_cast<const T*>(p.rows), p.row_stride}, keys{static_cast<const T*>(p.keys), p.key_stride};
  const Scale scale(*p.scale);
  const Buffer logits(min64(kRows, p.M) * p.N), column_sum(p.column_loss == nullptr ? 0 : p.N);
  float* const column_largest = p.column_loss;  // becomes the loss in the end
  if (p.column_loss != nullptr)
    for (int64_t j = 0; j < p.N; ++j) column_largest[j] = -__builtin_inff(), column_sum[j] = 0.f;
  for (int64_t r0 = 0; r0 < p.M; r0 += kRows) {
    const int64_t count = min64(kRows, p.M - r0);
    dot_products(runtime, rows, r0, count, keys, p.N, p.D, scale, logits);
    runtime.parallel_for(0, count, max64(1, 16384 / max64(p.N, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const x = logits + i * p.N;
        const float target = p.target[r0 + i] = x[p.first + r0 + i] * scale.value;
        p.row_loss[r0 + i] = row_loss(x, p.N, scale.value, target);
      }
    });
    if (p.column_loss != nullptr)
      runtime.parallel_for(0, ceil_div(p.N, kColumns), 1, [&](int64_t begin, int64_t end) {
        const int64_t c = begin * kColumns, n = min64(p.N, end * kColumns) - c;
        add_rows(logits + c, p.N, count, n, scale.value, column_largest + c, column_sum + c);
      });
  }
  double loss = 0.;
  for (int64_t i = 0; i < p.M; ++i) loss += p.row_loss[i];
  if (p.column_loss != nullptr)
    for (int64_t j = 0; j < p.N; ++j)
      loss += p.column_loss[j] = column_largest[j] - p.target[j] + __builtin_logf(column_sum[j]);
  *p.loss = p.N == 0 ? 0.f : static_cast<float>(loss / static_cast<double>(2 * p.N));
}

// In place of x, a row whose logits are scale * x: d loss / d logit in units of dloss / 2 N. Returns the sum of both's
// products. Of the row's own key the gradient is the sum of two exp(-loss) - 1, which are too near to zero to be had as
// differences.
double logit_gradients(float* x, int64_t n, float scale, float target, float loss, const float* key_target,
                       const float* key_loss, int64_t own) {
  vf sum = {};
  for_columns(n, [&](int64_t c, int64_t lanes) {
    const vf product = get(x + c, lanes), logit = product * scale;
    vf g = vexp(logit - target - loss) + vexp(logit - get(key_target + c, lanes) - get(key_loss + c, lanes));
    if (own >= c && own < c + lanes) g[own - c] = __builtin_expm1f(-loss) + __builtin_expm1f(-key_loss[own]);
    put(x + c, g, lanes);
    if (lanes >= kLanes)
      sum += g * product;
    else
      for (int64_t i = 0; i < lanes; ++i) sum[i] += g[i] * product[i];
  });
  return static_cast<double>(hsum(sum));
}

template <class T>
EVA02_INLINE void write_scaled(const Tile& t, int64_t i, float factor, T* out) {
  const float* const v = t.row(i);
  for_columns(t.cols, [&](int64_t c, int64_t lanes) { put(out + t.col0 + c, load(v + c) * factor, lanes); });
}

template <class T>
void clip_loss_bwd(const ClipLossBwdParams& p, const Runtime& runtime) {
  using Rows = Matrix<T>;
  const Rows rows{static_cast<const T*>(p.rows), p.row_stride}, keys{static_cast<const T*>(p.keys), p.key_stride};
  T *const drows = static_cast<T*>(p.drows), *const dkeys = static_cast<T*>(p.dkeys);
  const Scale scale(*p.scale);
  const float unit = p.N == 0 ? 0.f : *p.dloss / static_cast<float>(2 * p.N);
  const int64_t chunks = max64(1, ceil_div(p.M, kRows));
  const Buffer logits(min64(kRows, p.M) * p.N);
  const ChunkSums sums(dkeys == nullptr ? 0 : p.N, p.D, chunks);
  double dots[kRows], dscale = 0.;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t r0 = chunk * kRows, count = min64(kRows, p.M - r0);
    dot_products(runtime, rows, r0, count, keys, p.N, p.D, scale, logits);
    runtime.parallel_for(0, count, max64(1, 16384 / max64(p.N, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        dots[i] = logit_gradients(logits + i * p.N, p.N, scale.value, p.row_target[r0 + i], p.row_loss[r0 + i],
                                  p.key_target, p.key_loss, p.first + r0 + i);
    });
    for (int64_t i = 0; i < count; ++i) dscale += dots[i];
    const Matrix<float> gradients{logits, p.N};
    if (drows != nullptr)
      gemm(runtime, {.m = count, .n = p.D, .k = p.N}, RowPanels<Matrix<float>>{gradients, 0, p.N},
           ColumnPanels<Rows>{keys, 0, p.D}, [&](const Tile& t) {
             for (int64_t i = 0; i < t.rows; ++i)
               write_scaled(t, i, *p.scale * unit, drows + (r0 + t.row0 + i) * p.drow_stride);
           });
    if (dkeys != nullptr)
      weight_gradient(runtime, count, p.N, p.D, gradients, 0, rows, r0, nullptr, [&](const Tile& t) {
        for (int64_t i = 0; i < t.rows; ++i)
          if (sums.add(t, i, chunk)) write_scaled(t, i, *p.scale * unit, dkeys + (t.row0 + i) * p.dkey_stride);
      });
  }
  if (p.dscale != nullptr)
    *p.dscale = static_cast<float>(dscale * static_cast<double>(unit) / static_cast<double>(scale.factor));
}

}  // namespace

void run_clip_loss_fwd(const ClipLossFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return clip_loss_fwd<float>(p, runtime);
    case DType::bf16: return clip_loss_fwd<bf16>(p, runtime);
    case DType::f16: return clip_loss_fwd<f16>(p, runtime);
  }
}

void run_clip_loss_bwd(const ClipLossBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return clip_loss_bwd<float>(p, runtime);
    case DType::bf16: return clip_loss_bwd<bf16>(p, runtime);
    case DType::f16: return clip_loss_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
