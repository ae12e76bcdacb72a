// silu(x) = x sigmoid(x), the exact GELU x Phi(x), and their slopes, float32.
#pragma once

#include "common/launch.cuh"

namespace eva02::cuda {

// Of values that T stored: for 16-bit ones the fast exponential and division, whose error is far below their rounding.
template <class T>
__device__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1.f / (1.f + expf(-x));
  return __fdividef(1.f, 1.f + __expf(-x));
}

struct Activation {
  float value, slope;
};

template <class T>
__device__ Activation silu(float x) {
  const float s = sigmoid<T>(x), value = x * s;
  return {value, s + value * (1.f - s)};
}

__device__ inline Activation gelu(float x) {
  const float cdf = 0.5f * (1.f + erff(x * 0.7071067811865476f));
  return {x * cdf, cdf + x * (0.3989422804014327f * expf(-0.5f * x * x))};
}

}  // namespace eva02::cuda
