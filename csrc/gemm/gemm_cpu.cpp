// micro-kernel of the matrix product: kMR x kNR float32 sums held in registers over the k loop
// Fused     nothing: packing and epilogues belong to the callers of gemm (gemm.h)
// Bytes     per step of k: kMR + kNR floats from L1/L2 for 2 * kMR * kNR operations
// Launch    called by the workers of gemm
// Numerics  float32 fused multiply-adds (multiply, then add, in the baseline)
// Limits    a variant for every row count up to kMR, so that a short last panel costs what it holds
// Source    original; blocking as in Goto and van de Geijn, doi:10.1145/1356052.1356053
#include "gemm/gemm.h"

namespace eva02::EVA02_ISA {
namespace {

template <int Rows>
void kernel(int64_t k, const float* __restrict a, const float* __restrict b, float* __restrict c, int64_t ldc,
            bool accumulate, const float* next_a) {
  vf acc[Rows][2];
  static_for<Rows>([&](auto i) __attribute__((always_inline)) {
    acc[i][0] = vf{};
    acc[i][1] = vf{};
  });
  for (int64_t step = 0; step < k; ++step) {
    const vf b0 = load(b), b1 = load(b + kLanes);
    static_for<Rows>([&](auto i) __attribute__((always_inline)) {
      const vf x = splat(a[i]);
      acc[i][0] = fma(x, b0, acc[i][0]);
      acc[i][1] = fma(x, b1, acc[i][1]);
    });
    __builtin_prefetch(next_a);
    next_a += kMR;
    a += kMR;
    b += kNR;
  }
  if (accumulate) {
    static_for<Rows>([&](auto i) __attribute__((always_inline)) {
      acc[i][0] += load(c + i * ldc);
      acc[i][1] += load(c + i * ldc + kLanes);
    });
  }
  static_for<Rows>([&](auto i) __attribute__((always_inline)) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + kLanes, acc[i][1]);
  });
}

template <int Rows>
EVA02_INLINE MicroKernel pick(int64_t rows) {
  if constexpr (Rows > 1)
    return rows == Rows ? kernel<Rows> : pick<Rows - 1>(rows);
  else
    return kernel<1>;
}

}  // namespace

MicroKernel micro_kernel(int64_t rows) { return pick<kMR>(rows); }

}  // namespace eva02::EVA02_ISA
