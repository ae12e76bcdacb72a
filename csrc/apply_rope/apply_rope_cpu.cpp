// apply_rope: y = R(x), or R^T(x) for the inverse, on every head row
// Fused     angle lookup, rotation, prefix tokens, token selection, cast (eager: timm's expression moves about 9n
// elements) Bytes     moves 2n elements, the minimum; a token's angles are expanded once for all its heads Launch
// parallel over tokens, at least 16 Ki elements a thread; the table's gradient over patches Numerics  float32 inside,
// one rounding at the store; the table's gradient is summed in a fixed order, without atomics Limits    last dim
// contiguous; D a multiple of 4, at most 256 Source    original; rotary embedding: Su et al., arXiv:2104.09864
#include "apply_rope/apply_rope.h"
#include "common/rope.h"

namespace eva02::EVA02_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kGrainElements = 16384;

template <class T, bool Inverse>
void apply_rope_fwd(const ApplyRopeParams& p, const Runtime& runtime) {
  const bool shared_heads = rope_same_for_all_heads(p.rope);
  runtime.parallel_for(0, p.B * p.S, max64(1, kGrainElements / max64(1, p.H * p.D)), [&](int64_t begin, int64_t end) {
    alignas(64) float cs[2 * kMaxHeadDim];
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.S, t = token % p.S;
      const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + t * p.x_stride[1];
      T* y = static_cast<T*>(p.out) + b * p.out_stride[0] + t * p.out_stride[1];
      if (rope_patch(p.rope, b, t) < 0) {
        for (int64_t h = 0; h < p.H; ++h)
          memcpy(y + h * p.out_stride[2], x + h * p.x_stride[2], static_cast<size_t>(p.D) * sizeof(T));
        continue;
      }
      for (int64_t h = 0; h < p.H; ++h) {
        if (h == 0 || !shared_heads) rope_expand(p.rope, b, t, h, cs);
        rope_rotate<Inverse>(p.rope.interleaved, x + h * p.x_stride[2], cs, p.D, 1.f, y + h * p.out_stride[2]);
      }
    }
  });
}

template <class T>
void load_row(const T* x, int64_t D, float* row) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) store(row + i, load(x + i));
  if (i < D) store_partial(row + i, load_partial(x + i, D - i), D - i);
}

// A thread owns a range of patches and walks all tokens for the ones that are its own: the order of every sum is the
// order of the tokens, whatever the number of threads.
template <class T>
void apply_rope_table_grad(const ApplyRopeTableGradParams& p, const Runtime& runtime) {
  const RopeTable& rope = p.rope;
  const int64_t half = p.D / 2;
  const int64_t tables = rope.form == RopeForm::dense_head ? p.H : rope.form == RopeForm::dense_batch ? p.B : 1;
  const int64_t work = p.B * p.H * p.D;
  runtime.parallel_for(0, rope.rows, max64(1, kGrainElements / max64(1, work)), [&](int64_t begin, int64_t end) {
    alignas(64) float x[kMaxHeadDim], dy[kMaxHeadDim];
    for (int64_t table = 0; table < tables; ++table) {
      const int64_t at = table * rope.table_stride + begin * half;
      memset(p.dcos + at, 0, static_cast<size_t>((end - begin) * half) * sizeof(float));
      memset(p.dsin + at, 0, static_cast<size_t>((end - begin) * half) * sizeof(float));
    }
    for (int64_t b = 0; b < p.B; ++b) {
      // Without keep_idx a patch is one token: no need to look at the others.
      const int64_t first = rope.keep_idx ? rope.num_prefix : min64(p.S, rope.num_prefix + begin);
      const int64_t last = rope.keep_idx ? p.S : min64(p.S, rope.num_prefix + end);
      for (int64_t t = first; t < last; ++t) {
        const int64_t patch = rope_patch(rope, b, t);
        if (patch < begin || patch >= end) continue;
        for (int64_t h = 0; h < p.H; ++h) {
          const int64_t table = rope.form == RopeForm::dense_head ? h : rope.form == RopeForm::dense_batch ? b : 0;
          load_row(static_cast<const T*>(p.x) + b * p.x_stride[0] + t * p.x_stride[1] + h * p.x_stride[2], p.D, x);
          load_row(static_cast<const T*>(p.dout) + b * p.dout_stride[0] + t * p.dout_stride[1] + h * p.dout_stride[2],
                   p.D, dy);
          const int64_t at = table * rope.table_stride + patch * half;
          rope_add_table_grad(rope.interleaved, x, dy, p.D, 1.f, p.dcos + at, p.dsin + at);
        }
      }
    }
  });
}

}  // namespace

void run_apply_rope_fwd(const ApplyRopeParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32:
      return p.inverse ? apply_rope_fwd<float, true>(p, runtime) : apply_rope_fwd<float, false>(p, runtime);
    case DType::bf16:
      return p.inverse ? apply_rope_fwd<bf16, true>(p, runtime) : apply_rope_fwd<bf16, false>(p, runtime);
    case DType::f16: return p.inverse ? apply_rope_fwd<f16, true>(p, runtime) : apply_rope_fwd<f16, false>(p, runtime);
  }
}

void run_apply_rope_table_grad(const ApplyRopeTableGradParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return apply_rope_table_grad<float>(p, runtime);
    case DType::bf16: return apply_rope_table_grad<bf16>(p, runtime);
    case DType::f16: return apply_rope_table_grad<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
