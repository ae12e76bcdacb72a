#pragma once

#include <cstddef>
#include <cstdint>

namespace eva02 {

enum class DType : int { f32, bf16, f16 };

}  // namespace eva02
