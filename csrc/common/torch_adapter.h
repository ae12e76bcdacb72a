// Between torch's stable ABI and the launchers: the only header that includes torch, for *_registration.cpp alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "common/launcher.h"

namespace eva02 {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// An exception must not leave this library as it is: the wheel's library carries a C++ runtime of its own, and torch's
// (libstdc++) would not recognise the exception and end the process. So operators run inside a try, and torch's
// runtime is asked to throw the message.
[[noreturn]] void throw_runtime_error(const char* message) __asm__("_ZSt21__throw_runtime_errorPKc");

using BoxedFunction = void(StableIValue*, uint64_t, uint64_t);

[[gnu::noinline]] inline bool succeeds(BoxedFunction* function, StableIValue* stack, uint64_t num_args,
                                       uint64_t num_outputs, char* message, size_t message_size) noexcept {
  try {
    function(stack, num_args, num_outputs);
    return true;
  } catch (const std::exception& error) {
    snprintf(message, message_size, "%s", error.what());
  } catch (...) {
    snprintf(message, message_size, "unknown error");
  }
  return false;
}

// Nothing here has a destructor: torch's runtime unwinds this frame, and could not run this library's clean-up code.
template <BoxedFunction* function>
void guarded(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  char message[1024];
  if (!succeeds(function, stack, num_args, num_outputs, message, sizeof(message))) throw_runtime_error(message);
}

#undef TORCH_BOX
#define TORCH_BOX(func) \
  (&::eva02::guarded<&torch::stable::detail::boxer<std::remove_pointer_t<decltype(func)>, (func)>::boxed_fn>)

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16"); return DType::f32;
  }
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

// target_of(tensor): what the launchers of this build need beside their parameters. EVA02_TARGET ends the names of its
// operators, EVA02_KEY is the dispatch key they are registered for; kHostValues tells whether the host may look at the
// values of index tensors.
#if defined(EVA02_CUDA)
#include "common/cuda_adapter.h"
#else
#include "common/cpu_adapter.h"
#endif
