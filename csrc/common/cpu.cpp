#include "common/cpu.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
#if defined(__linux__)
  // Large workspaces ask for huge pages: a first touch of 2 MiB is one page fault instead of 512, and a product that
  // streams a packed operand misses the TLB less.
  constexpr size_t kHugePage = size_t{2} << 20;
  if (bytes >= kHugePage) {
    if (posix_memalign(&p, kHugePage, bytes) != 0) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);  // advice: where it cannot be taken, small pages do
    return p;
  }
#endif
  if (posix_memalign(&p, 64, bytes) != 0) throw std::bad_alloc();
  return p;
}

void free_workspace(void* p) { free(p); }

Isa cpu_isa() { return current_isa(); }
bool cpu_has(Isa isa) { return static_cast<int>(isa) <= static_cast<int>(best_isa()); }
void set_cpu_isa(Isa isa) { current_isa() = isa; }

}  // namespace eva02
