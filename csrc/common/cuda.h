// What a CUDA launcher sees of the world: a stream on the current device, and memory.
#pragma once

#include "common/dtype.h"

namespace eva02 {

struct Device {
  void* stream;  // cudaStream_t
  // Uninitialised memory for the kernels of this call, aligned to 256 bytes; nullptr where there is none left.
  void* (*allocate)(size_t bytes, void* allocator);
  void* allocator;
};

// Throws where a launcher says what went wrong.
void check_launch(const char* error, const char* launcher);

}  // namespace eva02

// Declares launcher `name(const Params&, const Device&)`. What it is built from, cuda::name, comes from another
// compiler with another C++ runtime: it throws nothing and returns nullptr, or a message that lives as long as the
// library.
#define EVA02_LAUNCHER(name, Params)                                                                                \
  namespace eva02::cuda {                                                                                           \
  const char* name(const Params&, const Device&);                                                                   \
  }                                                                                                                 \
  namespace eva02 {                                                                                                 \
  inline void name(const Params& params, const Device& device) { check_launch(cuda::name(params, device), #name); } \
  }
