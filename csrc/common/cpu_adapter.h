// torch's threads as the CPU launchers take them. No exception leaves a thread: this library's are foreign to torch,
// which could lose one and go on. Included by common/torch_adapter.h.
#pragma once

#define EVA02_TARGET "_cpu"
#define EVA02_KEY CPU

namespace eva02 {

constexpr bool kHostValues = true;

inline Runtime target_of(const Tensor&) {
  return Runtime{static_cast<int>(torch::stable::get_num_threads()),
                 [](int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx) {
                   torch::stable::parallel_for(begin, end, grain,
                                               [&](int64_t b, int64_t e) noexcept { fn(b, e, ctx); });
                 }};
}

}  // namespace eva02
