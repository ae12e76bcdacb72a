// What a CPU launcher sees of the world: threads, and the instruction sets it was built for.
#pragma once

#include "common/dtype.h"

namespace eva02 {

// Storage types of the two 16-bit formats. Arithmetic is always float32 (common/vec.h converts).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Calls fn(ctx, begin, end) over disjoint ranges that cover [begin, end), on at most num_threads threads.
// A range holds at least `grain` iterations. Must not be nested.
struct Runtime {
  int num_threads;
  void (*parallel)(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx);

  template <class F>
  void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) const {
    if (end <= begin) return;
    parallel(
        begin, end, grain, [](int64_t b, int64_t e, void* ctx) { (*static_cast<const F*>(ctx))(b, e); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// Memory for the duration of a call, on a cache line; throws std::bad_alloc, which ends the process inside a parallel
// region. What is freed is kept for later calls, of any thread, but for small pieces.
void* allocate_workspace(size_t bytes);
void free_workspace(void* p);
void release_workspaces();                 // gives back what is kept
size_t keep_workspaces(size_t bytes);      // at most so many from now on; returns the limit until now
bool fill_workspaces_with_nan(bool fill);  // for tests: each workspace, as it is handed out; returns whether it was so

enum class Isa : int { baseline, avx2, avx512 };

// The best instruction set that this CPU has and this library was built for, or the one forced by set_cpu_isa.
Isa cpu_isa();
bool cpu_has(Isa isa);
void set_cpu_isa(Isa isa);

}  // namespace eva02

// Declares launcher `name(const Params&, const Runtime&)`: one definition per instruction set (the same source built
// several times, in namespace eva02::EVA02_ISA) and one entry, eva02::name, that picks at run time.
#if defined(__x86_64__)
#define EVA02_LAUNCHER(name, Params)                               \
  namespace eva02::baseline {                                      \
  void name(const Params&, const Runtime&);                        \
  }                                                                \
  namespace eva02::avx2 {                                          \
  void name(const Params&, const Runtime&);                        \
  }                                                                \
  namespace eva02::avx512 {                                        \
  void name(const Params&, const Runtime&);                        \
  }                                                                \
  namespace eva02 {                                                \
  inline void name(const Params& params, const Runtime& runtime) { \
    switch (cpu_isa()) {                                           \
      case Isa::avx512: return avx512::name(params, runtime);      \
      case Isa::avx2: return avx2::name(params, runtime);          \
      case Isa::baseline: return baseline::name(params, runtime);  \
    }                                                              \
  }                                                                \
  }
#else
#define EVA02_LAUNCHER(name, Params)                                                                         \
  namespace eva02::baseline {                                                                                \
  void name(const Params&, const Runtime&);                                                                  \
  }                                                                                                          \
  namespace eva02 {                                                                                          \
  inline void name(const Params& params, const Runtime& runtime) { return baseline::name(params, runtime); } \
  }
#endif
