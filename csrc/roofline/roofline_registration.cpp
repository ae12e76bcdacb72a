#include "common/torch_adapter.h"
#include "roofline/roofline.h"

namespace eva02 {
namespace {

void fma_peak_cpu(int64_t iterations, Tensor out) {
  STD_TORCH_CHECK(dtype_of(out, "out") == DType::f32 && out.dim() == 2 && out.size(1) == 2 && out.is_contiguous(),
                  "out: expected a contiguous float32 tensor (chunks, 2)");
  run_fma_peak(
      {.out = ptr_as<float>(out), .chunks = out.size(0), .iterations = iterations, .factor = 0.5f, .term = 1.f},
      target_of(out));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) { m.def("fma_peak_cpu(int iterations, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, CPU, m) { m.impl("fma_peak_cpu", TORCH_BOX(&fma_peak_cpu)); }

}  // namespace eva02
