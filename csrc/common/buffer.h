// What kernels work in: uninitialised floats for the duration of a call, on a cache line.
#pragma once

#include "common/vec.h"

namespace eva02::EVA02_ISA {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reset(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free_workspace(data_); }
  void reset(int64_t count) {
    free_workspace(data_);
    data_ = nullptr;
    data_ = static_cast<float*>(allocate_workspace(static_cast<size_t>(max64(count, 1)) * sizeof(float)));
  }
  operator float*() const { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace eva02::EVA02_ISA
