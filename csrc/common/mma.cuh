// Tensor-core building blocks for compute capability 8.0 and later: asynchronous copies into shared memory, ldmatrix,
// and mma.sync on tiles of 16 x 8, for float32, bfloat16 and float16 operands with float32 sums.
//
// Fragments of a warp, lane = 4 * g + t: a 16 x K tile of A in 4 registers, a K x 8 tile of B in 2, a 16 x 8 tile of
// sums in 4 floats: rows g and g + 8, columns 2t and 2t + 1. K = 16 for 16-bit operands and 8 for float32 (as tf32).
//
// float32 products: tf32 keeps 11 bits of a significand. Where torch asks for float32 products (ieee) each operand is
// split into three such parts and the six largest products are added, which drops 2^-33 of a product: as accurate as
// FMA, and faster than it. Where torch allows tf32, the first part alone is used.
#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace eva02::cuda {

template <class T>
constexpr int kMmaK = sizeof(T) == 2 ? 16 : 8;

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- asynchronous copies --------------------------------------------------------------------------------------------
// 16 bytes from global to shared memory, zeros where not `there` (the source is not read then). Both aligned to 16.
__device__ inline void copy_async_16(void* shared, const void* global, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
// The first `bytes` of 16, zeros behind them.
__device__ inline void copy_async_part(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// 8 bytes, aligned to 8.
__device__ inline void copy_async_8(void* shared, const void* global, bool there = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 8 : 0)
               : "memory");
}
// 4 bytes, aligned to 4.
__device__ inline void copy_async_4(void* shared, const void* global, bool there = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 4 : 0)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- fragments from shared memory -----------------------------------------------------------------------------------
// Four 8 x 8 matrices of 16-bit elements (8 x 4 of float32), matrix i from the row addresses that lanes 8i ... 8i + 7
// give, each of 16 bytes, aligned to 16.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices(r, shared_address(row)); }
// The same, each matrix transposed: 16-bit elements alone.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_transposed(r, shared_address(row));
}

// Two floats as 16-bit elements of one register, `low` in the lower half.
template <class T>
__device__ uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Ones in a register of operands.
template <class T>
__device__ uint32_t two_ones() {
  if constexpr (sizeof(T) == 4)
    return __float_as_uint(1.f);
  else
    return packed<T>(1.f, 1.f);
}

// ---- products -------------------------------------------------------------------------------------------------------
__device__ inline uint32_t tf32_of(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(r) : "f"(x));
  return r;
}

__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// v, the bits of a float, becomes its part in tf32; returns the rest.
__device__ inline uint32_t split_tf32(uint32_t& v) {
  const float x = __uint_as_float(v);
  v = tf32_of(x);
  return __float_as_uint(x - __uint_as_float(v));
}

// d += A B of float32 in three parts each, the smallest products of a step first: tensor cores truncate their sums, so
// that d is to be small, of a step or two, and what is larger to be summed by FADD. The last parts are exact in tf32
// but for float32's own last bits.
__device__ inline void mma_parts(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t a0[4], a1[4], a2[4], b0[2], b1[2], b2[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a0[i] = a[i];
    a1[i] = split_tf32(a0[i]);
    a2[i] = split_tf32(a1[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    b0[i] = b[i];
    b1[i] = split_tf32(b0[i]);
    b2[i] = split_tf32(b1[i]);
  }
  mma_tf32(d, a2, b0);
  mma_tf32(d, a0, b2);
  mma_tf32(d, a1, b1);
  mma_tf32(d, a1, b0);
  mma_tf32(d, a0, b1);
  mma_tf32(d, a0, b0);
}

// d += A B. kTf32: float32 operands are rounded to tf32 (16-bit ones are as they are).
template <class T, bool kTf32>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, f16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kTf32) {
    const uint32_t ar[4] = {tf32_of(__uint_as_float(a[0])), tf32_of(__uint_as_float(a[1])),
                            tf32_of(__uint_as_float(a[2])), tf32_of(__uint_as_float(a[3]))};
    const uint32_t br[2] = {tf32_of(__uint_as_float(b[0])), tf32_of(__uint_as_float(b[1]))};
    mma_tf32(d, ar, br);
  } else {
    float part[4] = {};
    mma_parts(part, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i];
  }
}

}  // namespace eva02::cuda
