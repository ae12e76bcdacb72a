// What a launcher sees of the world, for the target that is being built: EVA02_LAUNCHER(name, Params) declares one.
// Nothing here, nor in any launcher or kernel, knows torch; only the *_registration.cpp files do.
#pragma once

#if defined(EVA02_CUDA)
#include "common/cuda.h"
#else
#include "common/cpu.h"
#endif
