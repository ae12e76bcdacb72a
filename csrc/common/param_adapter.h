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

// Rows of an activation: a tensor (rows, C) with a contiguous last dim, or one of any other shape and contiguous.
inline int64_t num_columns(const Tensor& t) { return t.size(t.dim() - 1); }
inline int64_t num_rows(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}
inline int64_t row_stride(const Tensor& t) { return t.dim() == 2 ? t.stride(0) : num_columns(t); }
inline int64_t row_stride(const OptTensor& t) { return ptr(t) == nullptr ? 0 : row_stride(*t); }

}  // namespace eva02
