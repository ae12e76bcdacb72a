#pragma once

#include "common/launcher.h"

namespace eva02 {

// out (chunks, 2): a checksum, and the floating-point operations of one iteration of that chunk. One thread a chunk.
struct FmaPeakParams {
  float* out;
  int64_t chunks, iterations;
  float factor, term;
};

}  // namespace eva02

EVA02_LAUNCHER(run_fma_peak, FmaPeakParams)
