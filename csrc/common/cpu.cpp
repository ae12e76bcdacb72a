#include "common/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace eva02 {
namespace {

// Asked of the CPU itself: what __builtin_cpu_supports answers depends on the compiler's runtime, and one says no to
// all.
Isa best_isa() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::baseline;
  const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  const unsigned wanted = fma | osxsave | avx | f16c;
  if ((ecx & wanted) != wanted) return Isa::baseline;
  unsigned xcr0, high;  // the register states that the operating system saves
  __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  if ((xcr0 & 0x6u) != 0x6u || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::baseline;
  if ((ebx & (1u << 5)) == 0) return Isa::baseline;                           // AVX2
  const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  return (ebx & avx512) == avx512 && (xcr0 & 0xe0u) == 0xe0u ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

Isa& current_isa() {
  static Isa isa = best_isa();
  return isa;
}

}  // namespace

Isa cpu_isa() { return current_isa(); }
bool cpu_has(Isa isa) { return static_cast<int>(isa) <= static_cast<int>(best_isa()); }
void set_cpu_isa(Isa isa) { current_isa() = isa; }

}  // namespace eva02
