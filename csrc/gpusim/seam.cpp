// The names under which a library that was built for the simulator offers its stand-in for the CUDA runtime to
// eva02_kernels.testing.gpusim.Runtime. An object of its own: what comes from the archive is hidden (--exclude-libs).
#include "gpusim/seam.h"

#define EVA02_EXPORTED extern "C" __attribute__((visibility("default")))

// Launches are recorded from here on, with the options of this text (that of EVA02_GPUSIM) and no others.
EVA02_EXPORTED const char* eva02_gpusim_begin(const char* options) { return gpusim::begin_recording(options); }

// Kernels may access these bytes of the host, under this name in messages; they count as written.
EVA02_EXPORTED const char* eva02_gpusim_map(uint64_t address, uint64_t bytes, const char* name) {
  return gpusim::map_memory(address, bytes, name);
}

// These bytes of mapped memory hold nothing yet; the required ones have to be written until the recording ends.
EVA02_EXPORTED const char* eva02_gpusim_unwritten(uint64_t address, uint64_t bytes, int required) {
  return gpusim::mark_unwritten(address, bytes, required != 0);
}

// Of this mapped memory these bytes may be accessed, with those of further calls, and no others.
EVA02_EXPORTED const char* eva02_gpusim_view(uint64_t address, uint64_t bytes) {
  return gpusim::allow_view(address, bytes);
}

EVA02_EXPORTED const char* eva02_gpusim_unmap(uint64_t address) { return gpusim::unmap_memory(address); }

// Ends the recording: mapped memory is nobody's again, errors are forgotten, options are the environment's. Gives JSON,
// which lives until the next call: {"launches": [{"kernel", "grid", "block", "shared", "faults", "counters",
// "distinct", "output"}], "unwritten": [{"tensor", "first", "bytes", "of"}]}, with the fields of outcome.h.
EVA02_EXPORTED const char* eva02_gpusim_end() { return gpusim::end_recording(); }
