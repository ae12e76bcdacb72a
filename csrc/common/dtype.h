#pragma once

#include <cstddef>
#include <cstdint>

// Functions for kernels of every target. Always inlined: the linker would merge the copies of the instruction sets, and
// a CPU without AVX-512 could be handed the AVX-512 one.
#if defined(__CUDACC__)
#define EVA02_KERNEL_INLINE __host__ __device__ __forceinline__
#else
#define EVA02_KERNEL_INLINE inline __attribute__((always_inline))
#endif

namespace eva02 {

enum class DType : int { f32, bf16, f16 };

}  // namespace eva02
