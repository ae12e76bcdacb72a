// Between torch's stable ABI and the launchers: the only header that includes torch, for *_registration.cpp alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "common/cpu.h"

namespace eva02 {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16"); return DType::f32;
  }
}

inline Runtime torch_runtime() {
  return Runtime{static_cast<int>(torch::stable::get_num_threads()),
                 [](int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx) {
                   torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(b, e, ctx); });
                 }};
}

// Pointer of a tensor that may be absent (an absent optional or an empty tensor both mean nullptr).
inline void* ptr(const Tensor& t) { return t.numel() == 0 ? nullptr : t.data_ptr(); }
inline void* ptr(const OptTensor& t) { return t.has_value() && t->defined() ? ptr(*t) : nullptr; }
template <class T>
T* ptr_as(const Tensor& t) {
  return static_cast<T*>(ptr(t));
}
template <class T>
T* ptr_as(const OptTensor& t) {
  return static_cast<T*>(ptr(t));
}

}  // namespace eva02
