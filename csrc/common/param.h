// Per-column parameters (norm weight and bias, layer scale, ...): each has its own dtype, since a model may keep them
// in float32 beside 16-bit activations. Contiguous; data == nullptr means absent.
#pragma once

#include "common/launcher.h"

namespace eva02 {

struct Param {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

struct ParamGrad {
  void* data = nullptr;
  DType dtype = DType::f32;
};

}  // namespace eva02
