// torch's current stream and memory as the CUDA launchers take them. Included by common/torch_adapter.h.
//
// Built for the simulator (EVA02_SIMULATOR) the operators take CPU tensors; which memory those are, the caller says
// (eva02_kernels.testing.gpusim.Runtime), and workspaces are said here.
#pragma once

#include <memory>
#include <stdexcept>

#define EVA02_TARGET "_cuda"

#if defined(EVA02_SIMULATOR)
#include "gpusim/seam.h"
#define EVA02_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define EVA02_KEY CUDA
#endif

namespace eva02 {

constexpr bool kHostValues = false;

inline void check_launch(const char* error, const char* launcher) {
  if (error != nullptr) throw std::runtime_error(std::string(launcher) + ": " + error);
}

// The device of a tensor, current while this lives, and the memory of one call: it goes back to torch's allocator with
// this, which is right while kernels still run because the allocator follows the stream's order.
class Target {
 public:
  explicit Target(const Tensor& like) : like_(like) {
#if !defined(EVA02_SIMULATOR)
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(like.get_device_index());
    if (aoti_torch_get_current_cuda_stream(like.get_device_index(), &device_.stream) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("torch has no current CUDA stream");
#endif
    device_.allocator = this;
    device_.allocate = [](size_t bytes, void* self) { return static_cast<Target*>(self)->allocate(bytes); };
  }
  ~Target() {
#if defined(EVA02_SIMULATOR)
    for (const Tensor& t : workspaces_) gpusim::unmap_memory(reinterpret_cast<uint64_t>(t.data_ptr()));
#endif
  }
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;
  operator const Device&() const { return device_; }

 private:
  void* allocate(size_t bytes) {
    const int64_t size[1] = {static_cast<int64_t>(bytes)};
    workspaces_.push_back(torch::stable::new_empty(like_, {size, 1}, torch::headeronly::ScalarType::Byte));
    void* data = workspaces_.back().data_ptr();
#if defined(EVA02_SIMULATOR)
    const auto address = reinterpret_cast<uint64_t>(data);
    gpusim::map_memory(address, bytes, "workspace");
    gpusim::mark_unwritten(address, bytes, false);
#endif
    return data;
  }

  const Tensor& like_;
  Device device_{};
  std::vector<Tensor> workspaces_;
#if !defined(EVA02_SIMULATOR)
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

inline Target target_of(const Tensor& like) { return Target(like); }

}  // namespace eva02
