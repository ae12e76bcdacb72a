// Host side of the CUDA launchers: from run-time values to template arguments, and launching.
//
// Nothing here throws or uses the C++ runtime: these objects link into a library whose own runtime is another one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda.h"

namespace eva02::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline cudaStream_t stream_of(const Device& device) { return static_cast<cudaStream_t>(device.stream); }

inline constexpr char kNoMemory[] = "no memory for a workspace";

// Floats for the kernels of this call.
inline float* workspace(const Device& device, int64_t floats) {
  return static_cast<float*>(
      device.allocate(static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float), device.allocator));
}

// Multiprocessors of the current device.
inline int num_sms() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// nullptr, or why the launches before could not be made.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// f.template operator()<T>() for the type of the tensors' elements.
template <class F>
const char* by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
  }
  return "unknown dtype";
}

template <class F>
const char* by_bool(bool value, const F& f) {
  return value ? f.template operator()<true>() : f.template operator()<false>();
}

// Elements of an access: as many as 16 bytes hold where every address allows it, else 4 bytes' worth, else one.
class PackWidth {
 public:
  explicit PackWidth(size_t element_size) : size_(element_size) {}
  // Rows of a tensor begin at p + i * stride elements, for any of the strides; an absent tensor allows all.
  template <class... Strides>
  PackWidth& rows(const void* p, Strides... strides) {
    if (p != nullptr) {
      bits_ |= reinterpret_cast<uintptr_t>(p);
      ((bits_ |= static_cast<uintptr_t>(strides) * size_), ...);
    }
    return *this;
  }
  int bytes() const { return bits_ % 16 == 0 ? 16 : bits_ % 4 == 0 ? 4 : static_cast<int>(size_); }

 private:
  size_t size_;
  uintptr_t bits_ = 0;
};

// f.template operator()<W>() for the number of elements of an access.
template <class T, class F>
const char* by_width(const PackWidth& width, const F& f) {
  if (width.bytes() == 16) return f.template operator()<static_cast<int>(16 / sizeof(T))>();
  if constexpr (sizeof(T) < 4)
    if (width.bytes() == 4) return f.template operator()<static_cast<int>(4 / sizeof(T))>();
  return f.template operator()<1>();
}

}  // namespace eva02::cuda
