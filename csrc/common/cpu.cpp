#include "common/cpu.h"

#include <cstdlib>
#include <new>

namespace eva02 {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa& current_isa() {
  static Isa isa = best_isa();
  return isa;
}

}  // namespace

void* allocate_workspace(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  return p;
}

void free_workspace(void* p) { free(p); }

Isa cpu_isa() { return current_isa(); }
bool cpu_has(Isa isa) { return static_cast<int>(isa) <= static_cast<int>(best_isa()); }
void set_cpu_isa(Isa isa) { current_isa() = isa; }

}  // namespace eva02
