// What the CUDA runtime's stand-in lets a test say of the host's memory and learn of launches: runtime.cpp has it, and
// seam.cpp gives it names that a library exports.
#pragma once

#include <cstdint>

namespace gpusim {

// Each gives nullptr, or what is wrong with its arguments.
const char* begin_recording(const char* options);
const char* map_memory(uint64_t address, uint64_t bytes, const char* name);
const char* mark_unwritten(uint64_t address, uint64_t bytes, bool required);
const char* allow_view(uint64_t address, uint64_t bytes);
const char* unmap_memory(uint64_t address);

const char* end_recording();  // JSON, which lives until the next call

}  // namespace gpusim
