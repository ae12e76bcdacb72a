// swiglu: y = silu(g) * u, silu(g) = g * sigmoid(g)
// Fused     sigmoid, two multiplications, cast (eager: 2 passes, 5n elements moved); backward in one pass
// Bytes     forward moves 3n elements, backward 5n: the minimum of both
// Launch    parallel over rows, at least 16 Ki elements a thread
// Numerics  float32 inside, one rounding at the store
// Limits    last dim contiguous; any row stride, any F (masked tail)
// Source    original; formula: Shazeer, arXiv:2002.05202
#include "common/vec.h"
#include "swiglu/swiglu.h"

namespace eva02::EVA02_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;

EVA02_INLINE vf swiglu(vf g, vf u) { return g * vsigmoid(g) * u; }

EVA02_INLINE void swiglu_grad(vf dy, vf g, vf u, vf& dg, vf& du) {
  const vf s = vsigmoid(g), silu = g * s;
  du = dy * silu;
  dg = dy * u * (s + silu * (1.f - s));
}

template <class T>
void swiglu_fwd(const SwigluFwdParams& p, const Runtime& runtime) {
  runtime.parallel_for(0, p.rows, max64(1, kGrainElements / max64(1, p.F)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* g = static_cast<const T*>(p.gate) + row * p.gate_stride;
      const T* u = static_cast<const T*>(p.up) + row * p.up_stride;
      T* y = static_cast<T*>(p.out) + row * p.out_stride;
      int64_t i = 0;
      for (; i + kLanes <= p.F; i += kLanes) store(y + i, swiglu(load(g + i), load(u + i)));
      if (i < p.F) {
        const int64_t n = p.F - i;
        store_partial(y + i, swiglu(load_partial(g + i, n), load_partial(u + i, n)), n);
      }
    }
  });
}

template <class T>
void swiglu_bwd(const SwigluBwdParams& p, const Runtime& runtime) {
  runtime.parallel_for(0, p.rows, max64(1, kGrainElements / max64(1, p.F)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = static_cast<const T*>(p.dout) + row * p.dout_stride;
      const T* g = static_cast<const T*>(p.gate) + row * p.gate_stride;
      const T* u = static_cast<const T*>(p.up) + row * p.up_stride;
      T* dg = static_cast<T*>(p.dgate) + row * p.dgate_stride;
      T* du = static_cast<T*>(p.dup) + row * p.dup_stride;
      vf a, b;
      int64_t i = 0;
      for (; i + kLanes <= p.F; i += kLanes) {
        swiglu_grad(load(dy + i), load(g + i), load(u + i), a, b);
        store(dg + i, a);
        store(du + i, b);
      }
      if (i < p.F) {
        const int64_t n = p.F - i;
        swiglu_grad(load_partial(dy + i, n), load_partial(g + i, n), load_partial(u + i, n), a, b);
        store_partial(dg + i, a, n);
        store_partial(du + i, b, n);
      }
    }
  });
}

}  // namespace

void run_swiglu_fwd(const SwigluFwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return swiglu_fwd<float>(p, runtime);
    case DType::bf16: return swiglu_fwd<bf16>(p, runtime);
    case DType::f16: return swiglu_fwd<f16>(p, runtime);
  }
}

void run_swiglu_bwd(const SwigluBwdParams& p, const Runtime& runtime) {
  switch (p.dtype) {
    case DType::f32: return swiglu_bwd<float>(p, runtime);
    case DType::bf16: return swiglu_bwd<bf16>(p, runtime);
    case DType::f16: return swiglu_bwd<f16>(p, runtime);
  }
}

}  // namespace eva02::EVA02_ISA
