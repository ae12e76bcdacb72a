// fma_peak: a <- a * factor + term in registers, for as many iterations as asked: the CPU's multiply-add rate
// Fused     nothing; no memory is touched inside the loop
// Bytes     none
// Launch    one chunk a thread
// Numerics  float32; converges to term / (1 - factor), so no value overflows or becomes subnormal
// Limits    measures the instruction set this copy is built for
// Source    original
#include "common/vec.h"
#include "roofline/roofline.h"

namespace eva02::EVA02_ISA {
namespace {

// Two units with a latency of four or five cycles need at most ten chains; twelve and two operands fit 16 registers.
constexpr int kChains = 12;

}  // namespace

void run_fma_peak(const FmaPeakParams& p, const Runtime& runtime) {
  runtime.parallel_for(0, p.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      // Values from memory: constants would let the compiler run the loop itself.
      const vf factor = splat(p.factor), term = splat(p.term);
      vf a[kChains];
      for (int i = 0; i < kChains; ++i) a[i] = splat(static_cast<float>(i));
      for (int64_t n = 0; n < p.iterations; ++n) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) a[i] = fma(a[i], factor, term);
      }
      vf sum = a[0];
      for (int i = 1; i < kChains; ++i) sum += a[i];
      p.out[2 * chunk] = hsum(sum);
      p.out[2 * chunk + 1] = 2.f * kChains * kLanes;
    }
  });
}

}  // namespace eva02::EVA02_ISA
