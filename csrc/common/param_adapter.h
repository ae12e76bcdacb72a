// Per-column parameters as the launchers take them. For *_registration.cpp alone.
#pragma once

#include "common/param.h"
#include "common/torch_adapter.h"

namespace eva02 {

inline Param param_of(const OptTensor& t, const char* name) {
  if (ptr(t) == nullptr) return {};
  return {.data = ptr(t), .dtype = dtype_of(*t, name)};
}

inline ParamGrad param_grad_of(const OptTensor& t, const char* name) {
  if (ptr(t) == nullptr) return {};
  return {.data = ptr(t), .dtype = dtype_of(*t, name)};
}

// Row stride of an optional 2-D tensor.
inline int64_t row_stride(const Tensor& t) { return t.stride(0); }
inline int64_t row_stride(const OptTensor& t) { return ptr(t) == nullptr ? 0 : t->stride(0); }

}  // namespace eva02
