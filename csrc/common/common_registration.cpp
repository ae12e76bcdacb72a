// The library itself: which instruction sets it can run here, and (for tests) which it is told to use.
#include "common/torch_adapter.h"

namespace eva02 {
namespace {

int64_t cpu_isa_get() { return static_cast<int64_t>(cpu_isa()); }

void cpu_isa_set(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= 2 && cpu_has(static_cast<Isa>(isa)),
                  "cpu_isa: this CPU or this build lacks the instruction set asked for");
  set_cpu_isa(static_cast<Isa>(isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eva02_kernels_C, m) {
  m.def("cpu_isa_get() -> int");
  m.def("cpu_isa_set(int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(eva02_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa_get", TORCH_BOX(&cpu_isa_get));
  m.impl("cpu_isa_set", TORCH_BOX(&cpu_isa_set));
}

}  // namespace eva02
