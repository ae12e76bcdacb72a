// A stand-in for the CUDA runtime: what nvcc's host code calls, on the simulator. Linked statically and hidden into a
// build of its own (compute_80 PTX alone, not compressed, -cudart none), so that a CUDA library which the process has
// loaded is neither used nor disturbed.
//
// Memory       an allocation begins at a multiple of 4 GiB, at the same address for the host: pointers stored in memory
//              work, and what is beyond its end is nobody's. A test may name memory of the host besides (seam.h).
// Streams      everything is done when a call returns. Events take the host's time: that of the simulation.
// Errors       a fault of a kernel is printed, and the calls after it return cudaErrorLaunchFailure.
// Environment  EVA02_GPUSIM="seed=1,order=reverse,threads=2,races=strict,uninit=load,numerics=perturb,budget=1000000,
//              on_error=exit,report=1,capability=70"; on_error=exit ends the process with status 70 at a fault,
//              on_error=collect goes on after it; report=1 prints what each launch executed, capability is what
//              programs are told that the device has. Between begin and end of a recording (seam.h) its options hold,
//              and faults are kept instead of printed.
// Source       CUDA runtime API, reference manual 13.0; the layout of fat binaries as nvcc 13.0 writes it.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <set>
#include <sstream>
#include <utility>

#include "gpusim/outcome.h"
#include "gpusim/seam.h"

namespace gpusim {

namespace {

constexpr u64 kDeviceMemory = 40ull << 30;

struct Allocation {
  u64 base = 0, size = 0;
  std::string name;
  bool constant = false;
  std::vector<u8> valid;                             // empty: all of it
  bool mapped = false;                               // the host's own memory, which a test named
  std::vector<std::pair<u64, u64>> views, required;  // [begin, end): what may be accessed, what has to be written
};

// The little of JSON that a record needs.
std::string json(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    const bool plain = static_cast<u8>(c) >= 0x20 && c != '"' && c != '\\';
    char code[8];
    if (!plain) snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned>(static_cast<u8>(c)));
    out += plain ? std::string(1, c) : code;
  }
  return out + '"';
}
std::string json(bool value) { return value ? "true" : "false"; }
template <class T>
  requires std::is_integral_v<T>
std::string json(T value) {
  return std::to_string(value);
}
std::string json(const std::array<u32, 3>& v) { return '[' + json(v[0]) + ',' + json(v[1]) + ',' + json(v[2]) + ']'; }

void append(std::string& list, const std::string& item) { list += (list.empty() ? "" : ",") + item; }

std::string json(const Program& p, const Fault& f) {
  std::string fields;
  describe(p, f, [&](const std::string& name, const auto& value) { append(fields, json(name) + ':' + json(value)); });
  return '{' + fields + '}';
}

// A launch that was not run, in the form of a fault.
std::string refusal(const std::string& kind, const std::string& message, int line) {
  return R"({"kind":)" + json(kind) + R"(,"message":)" + json(message) + R"(,"line":)" + json(line) +
         R"(,"text":"","where":"","other_line":0,"other_text":"","other_where":"","cta":[0,0,0],"thread":[0,0,0],)" +
         R"("address":0,"tensor":""})";
}

struct Shape {  // of a launch; zeros where it did not come to one
  std::array<u32, 3> grid{}, block{};
  u64 shared = 0;
};

std::string json_of_launch(const std::string& kernel, const Shape& shape, const std::string& faults,
                           const std::string& counters = "", const std::string& distinct = "",
                           const std::string& output = "") {
  return R"({"kernel":)" + json(kernel) + R"(,"grid":)" + json(shape.grid) + R"(,"block":)" + json(shape.block) +
         R"(,"shared":)" + json(shape.shared) + R"(,"faults":[)" + faults + R"(],"counters":[)" + counters +
         R"(],"distinct":{)" + distinct + R"(},"output":)" + json(output) + '}';
}

std::string json(const Launch& run, const std::string& kernel) {
  std::string faults, counters, distinct;
  for (const Fault& f : run.faults) append(faults, json(run.program, f));
  describe_counters(run, [&](const auto&... fields) {
    std::string values;
    (append(values, json(fields)), ...);
    append(counters, '[' + values + ']');
  });
  for (size_t i = 0; i < run.regions.size(); ++i) {
    if (run.shadows[i].touched.empty()) continue;
    const Traffic t = traffic_of(run, i);
    append(distinct, json(run.regions[i].name) + ":[" + json(t.loaded) + ',' + json(t.stored) + ',' +
                         json(t.load_sectors) + ',' + json(t.store_sectors) + ',' +
                         json(reinterpret_cast<u64>(run.regions[i].host)) + ']');
  }
  return json_of_launch(kernel, {run.grid, run.block, run.dynamic_shared}, faults, counters, distinct, run.output);
}

struct LoadedModule {
  std::string text;
  bool placed = false;
  std::map<std::string, u64> variables;                                      // name -> address, once they have memory
  std::map<std::pair<std::string, u64>, std::unique_ptr<Program>> programs;  // by kernel and perturbation
};

struct Kernel {
  LoadedModule* module;
  std::string name;
  u64 max_dynamic = 49152;  // bytes of dynamic shared memory, with cudaFuncSetAttribute more
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

struct Runtime {
  std::vector<std::unique_ptr<LoadedModule>> modules;
  std::unordered_map<const void*, Kernel> kernels;                                   // by the host's function
  std::unordered_map<const void*, std::pair<LoadedModule*, std::string>> variables;  // by the host's shadow
  std::map<u64, Allocation> memory;
  std::set<u64> slots;       // every 4 GiB that ever were ours
  std::deque<u64> released;  // of them, those free again, the oldest first
  u64 grid_barrier = 0;
  Heap heap;  // of kernels' malloc, which lasts as long as the process
  u64 heap_at = 0;
  std::vector<Configuration> configurations;
  Options options;
  u64 perturbation = 0, allocated = 0, launches = 0;
  u32 next_slot = 1;
  bool exit_at_fault = false, report = false, recording = false;
  std::string recorded;  // launches, as JSON
  cudaError_t last = cudaSuccess, sticky = cudaSuccess;
  std::string fault;
  int device = 0, capability = 80;  // what programs are told; their PTX is that of compute_80

  Runtime() { use_environment(); }

  void use_environment() {
    const char* text = getenv("EVA02_GPUSIM");
    const std::string unknown = configure(text ? text : "");
    if (unknown.empty()) return;
    fprintf(stderr, "gpusim: EVA02_GPUSIM: %s\n", unknown.c_str());
    exit(70);
  }

  // All options from a text; gives what is wrong with it.
  std::string configure(const std::string& text) {
    options = {};
    perturbation = 0, capability = 80;
    exit_at_fault = report = false;
    std::istringstream items(text);
    for (std::string item; std::getline(items, item, ',');) {
      const size_t at = item.find('=');
      const std::string key = item.substr(0, at), value = at == std::string::npos ? "" : item.substr(at + 1);
      const auto number = [&] { return strtoull(value.c_str(), nullptr, 0); };
      if (key == "seed") {
        options.seed = number();
      } else if (key == "order" && (value == "in" || value == "reverse" || value == "random")) {
        options.order = value;
      } else if (key == "threads" && number() >= 1 && number() <= 64) {
        options.threads = static_cast<u32>(number());
      } else if (key == "races" && (value == "0" || value == "1" || value == "strict")) {
        options.races = value != "0", options.strict_races = value == "strict";
      } else if (key == "uninit" && (value == "0" || value == "use" || value == "load")) {
        options.uninit = value != "0", options.uninit_at_load = value == "load";
      } else if (key == "numerics" && (value == "exact" || value == "perturb")) {
        perturbation = value == "perturb" ? 0x9e3779b97f4a7c15ull : 0;
      } else if (key == "budget") {
        options.budget = number();
      } else if (key == "capability" && number() >= 50 && number() < 130) {
        capability = static_cast<int>(number());
      } else if (key == "on_error" && (value == "exit" || value == "return" || value == "collect")) {
        exit_at_fault = value == "exit", options.collect = value == "collect";
      } else if (key == "report") {
        report = value != "0";
      } else {
        return "unknown option " + item;
      }
    }
    if (perturbation) perturbation *= options.seed + 1;
    return "";
  }

  cudaError_t fail(cudaError_t error) { return last = error; }
  cudaError_t done() { return sticky == cudaSuccess ? cudaSuccess : fail(sticky); }

  // Memory that the host and the kernels see at the same address.
  Allocation* allocate(u64 size, const std::string& name, bool written) {
    if (size > kDeviceMemory - std::min(kDeviceMemory, allocated)) return nullptr;
    for (u32 tries = 0; tries < 64; ++tries) {
      u64 base = static_cast<u64>(next_slot++) << kGlobalShift;
      if (base >> 46) {  // none is left that was never used
        if (released.empty() || size > 1ull << kGlobalShift) return nullptr;
        base = released.front();
        released.pop_front();
      }
      void* at = mmap(reinterpret_cast<void*>(base), std::max<u64>(size, 1), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
      if (at == MAP_FAILED) continue;
      Allocation& a = memory[base];
      a = {};
      a.base = base, a.size = size, a.name = name;
      if (!written) a.valid.assign(size, 0);
      allocated += size;
      for (u64 at = base; at < base + std::max<u64>(size, 1); at += 1ull << kGlobalShift)
        slots.insert(at >> kGlobalShift);
      next_slot = std::max(next_slot, static_cast<u32>((base + size) >> kGlobalShift) + 1);
      return &a;
    }
    return nullptr;
  }

  Allocation* find(const void* pointer, u64 bytes) {
    const u64 address = reinterpret_cast<u64>(pointer);
    auto it = memory.upper_bound(address);
    if (it == memory.begin()) return nullptr;
    Allocation& a = std::prev(it)->second;
    return address - a.base <= a.size && bytes <= a.size - (address - a.base) ? &a : nullptr;
  }

  void written(void* pointer, u64 bytes) {
    Allocation* a = find(pointer, bytes);
    if (a == nullptr || a->valid.empty()) return;
    const auto begin = a->valid.begin() + static_cast<std::ptrdiff_t>(reinterpret_cast<u64>(pointer) - a->base);
    std::fill(begin, begin + static_cast<std::ptrdiff_t>(bytes), 1);
  }

  // The decoded kernel; nullptr, and a message, for text that is no PTX.
  Program* program(const Kernel& kernel) {
    auto& p = kernel.module->programs[{kernel.name, perturbation}];
    try {
      if (p == nullptr) p = std::make_unique<Program>(kernel.module->text, kernel.name, perturbation);
    } catch (const PtxError& error) {
      if (recording)
        append(recorded, json_of_launch(kernel.name, {}, refusal("unsupported", error.what(), error.line)));
      else
        fprintf(stderr, "gpusim: %s: PTX line %d: %s\n", kernel.name.c_str(), error.line, error.what());
    }
    return p.get();
  }

  // A module's variables get their memory when it is first needed.
  void place_variables(LoadedModule& module) {
    if (std::exchange(module.placed, true)) return;
    const Module parsed = parse(module.text);
    for (const Variable& v : parsed.variables) {
      if (v.external || (v.space != Variable::kGlobal && v.space != Variable::kConst)) continue;
      Allocation* a = allocate(std::max<u64>(v.bytes, 1), v.name, true);
      if (a == nullptr) continue;
      a->constant = v.space == Variable::kConst;
      if (!v.initial.empty()) memcpy(reinterpret_cast<void*>(a->base), v.initial.data(), v.initial.size());
      module.variables[v.name] = a->base;
    }
    for (const Variable& v : parsed.variables)
      for (const Relocation& r : v.relocations) {
        const auto at = module.variables.find(v.name), to = module.variables.find(r.symbol);
        const u64 function = parsed.address_of(r.symbol);
        if (at == module.variables.end() || (to == module.variables.end() && function == 0)) continue;
        const u64 address =
            (to != module.variables.end() ? to->second : kCodeWindow + function) + static_cast<u64>(r.addend);
        memcpy(reinterpret_cast<u8*>(at->second) + r.at, &address, 8);
      }
  }

  void tell(const Program& p, const Fault& f, const std::string& kernel) {
    std::ostringstream text;
    text << kernel << ": " << f.what();
    if (const Instruction* in = p.instruction(f.op)) {
      const std::string where = p.where(f.op);
      text << (where.empty() ? "" : "\n  at " + where) << "\n  PTX line " << in->line << ": " << in->text << "\n  CTA ("
           << f.cta[0] << ", " << f.cta[1] << ", " << f.cta[2] << "), thread (" << f.thread[0] << ", " << f.thread[1]
           << ", " << f.thread[2] << ")";
    }
    if (const Instruction* in = p.instruction(f.other_op))
      text << "\n  and " << p.where(f.other_op) << "\n  PTX line " << in->line << ": " << in->text;
    fault = text.str();
    if (!recording) fprintf(stderr, "gpusim: %s\n", fault.c_str());
    if (exit_at_fault) {
      fflush(nullptr);
      _exit(70);
    }
    if (!options.collect) sticky = cudaErrorLaunchFailure;
  }

  cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, void** args, size_t shared) {
    if (sticky != cudaSuccess) return fail(sticky);
    const auto refuse = [&](cudaError_t error, const std::string& why) {
      if (recording) append(recorded, json_of_launch(kernel.name, {}, refusal("refused", "refused launch: " + why, 0)));
      return fail(error);
    };
    const u64 threads = static_cast<u64>(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 ||
        static_cast<u64>(grid.x) * grid.y * grid.z >= 1ull << 31)
      return refuse(cudaErrorInvalidConfiguration, "grid " + json(std::array{grid.x, grid.y, grid.z}) + ", block " +
                                                       json(std::array{block.x, block.y, block.z}) +
                                                       " are beyond CUDA's limits or empty");
    Program* p = program(kernel);
    if (p == nullptr) return fail(sticky = cudaErrorInvalidPtx);
    if (p->entry->reqntid && static_cast<u64>(p->entry->reqntid) != threads)
      return refuse(cudaErrorInvalidConfiguration, std::to_string(threads) + " threads a CTA, the kernel requires " +
                                                       std::to_string(p->entry->reqntid));
    if (shared + (kernel.max_dynamic > 49152 ? 0 : p->static_shared) > kernel.max_dynamic)
      return refuse(cudaErrorInvalidValue, std::to_string(shared) + " bytes of dynamic shared memory with " +
                                               std::to_string(p->static_shared) + " static ones; it may have " +
                                               std::to_string(kernel.max_dynamic));
    place_variables(*kernel.module);
    Launch run(*p);
    run.grid = {grid.x, grid.y, grid.z};
    run.block = {block.x, block.y, block.z};
    run.dynamic_shared = shared;
    run.options = options;
    run.params.resize(p->param_bytes);
    for (size_t i = 0; i < p->entry->params.size(); ++i) {
      const Variable& v = p->entry->params[i];
      memcpy(run.params.data() + p->param_offsets.at(v.name), args[i], v.bytes);
    }
    if (p->grid_barrier) {
      Allocation* a = grid_barrier ? &memory.at(grid_barrier) : allocate(64, "grid barrier", true);
      if (a == nullptr) return fail(cudaErrorMemoryAllocation);
      memset(reinterpret_cast<void*>(a->base), 0, 64);
      run.grid_barrier = grid_barrier = a->base;
    }
    if (p->has_heap && heap_at == 0) {
      const Allocation* a = allocate(Heap::kSize, "the kernels' heap", false);
      if (a == nullptr) return fail(cudaErrorMemoryAllocation);
      heap_at = a->base;
    }
    run.relocate = false;  // variables keep what the program wrote
    std::vector<Allocation*> mapped;
    for (auto& [base, a] : memory) {
      Region r;
      r.base = base, r.size = a.size, r.host = reinterpret_cast<u8*>(base), r.constant = a.constant;
      r.name = a.name;
      r.valid = std::move(a.valid);
      r.views = a.views;
      if (base == heap_at) r.heap = &heap;
      // Two modules may have variables of one name.
      const auto own = kernel.module->variables.find(a.name);
      if (own != kernel.module->variables.end() && own->second != base) r.name += " of another module";
      mapped.push_back(&a);
      run.regions.push_back(std::move(r));
    }
    const auto begin = std::chrono::steady_clock::now();
    run.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    for (size_t i = 0; i < mapped.size(); ++i) {
      mapped[i]->valid = std::move(run.regions[i].valid);
      if (std::find(mapped[i]->valid.begin(), mapped[i]->valid.end(), 0) == mapped[i]->valid.end())
        mapped[i]->valid.clear();
    }
    if (recording) append(recorded, json(run, kernel.name));
    if (!recording) fwrite(run.output.data(), 1, run.output.size(), stdout);
    ++launches;
    if (report)
      fprintf(stderr, "gpusim: %s <<<(%u, %u, %u), (%u, %u, %u), %zu>>>: %llu warp instructions in %.2f s\n",
              kernel.name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
              static_cast<unsigned long long>(run.instructions), seconds.count());
    for (const Fault& f : run.faults) tell(*p, f, kernel.name);
    return done();
  }

  bool release(u64 base) {
    const auto it = memory.find(base);
    if (it == memory.end() || it->second.mapped) return false;
    munmap(reinterpret_cast<void*>(base), std::max<u64>(it->second.size, 1));
    allocated -= it->second.size;
    released.push_back(base);
    memory.erase(it);
    return true;
  }

  void* symbol(const void* host) {
    const auto it = variables.find(host);
    if (it == variables.end()) return nullptr;
    try {
      place_variables(*it->second.first);
    } catch (const PtxError& error) {
      fprintf(stderr, "gpusim: PTX line %d: %s\n", error.line, error.what());
      return nullptr;
    }
    const auto at = it->second.first->variables.find(it->second.second);
    return at == it->second.first->variables.end() ? nullptr : reinterpret_cast<void*>(at->second);
  }
};

Runtime& runtime() {
  static Runtime* const one = new Runtime;  // registration runs in constructors, and releases in destructors
  return *one;
}

// Messages and records that C code gets live until the next one.
const char* kept(std::string text) {
  static std::string one;
  one = std::move(text);
  return one.c_str();
}

Allocation* mapped_memory(u64 address, u64 bytes) {
  Allocation* a = runtime().find(reinterpret_cast<void*>(address), bytes);
  return a != nullptr && a->mapped ? a : nullptr;
}

// The PTX of a fat binary: a header of 16 bytes, then entries with a header each (kind 1 is PTX).
std::string ptx_of(const void* wrapper) {
  struct Wrapper {
    u32 magic, version;
    const u8* data;
    const void* file;
  };
  const auto* w = static_cast<const Wrapper*>(wrapper);
  if (w->magic != 0x466243b1) return "";
  const auto read = [](const u8* at, auto& out) { memcpy(&out, at, sizeof(out)); };
  u32 magic;
  u16 header;
  u64 size;
  read(w->data, magic), read(w->data + 6, header), read(w->data + 8, size);
  if (magic != 0xba55ed50) return "";
  for (const u8 *at = w->data + header, *end = at + size; at < end;) {
    u16 kind;
    u32 entry_header;
    u64 bytes;
    read(at, kind), read(at + 4, entry_header), read(at + 8, bytes);
    if (kind == 1) {
      const char* text = reinterpret_cast<const char*>(at + entry_header);
      const std::string ptx(text, strnlen(text, bytes));
      if (ptx.find(".version") != std::string::npos) return ptx;
    }
    at += entry_header + bytes;
  }
  return "";
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  Runtime& r = runtime();
  // A copy of host memory knows nothing of its bounds; one that begins in device memory stays in it.
  for (const void* p : {static_cast<const void*>(to), from})
    if (bytes > 0 && r.slots.count(reinterpret_cast<u64>(p) >> kGlobalShift) && r.find(p, bytes) == nullptr) {
      const Allocation* a = r.find(p, 0);
      fprintf(stderr, "gpusim: a copy of %zu bytes at %p is out of bounds of %s\n", bytes, p,
              a ? a->name.c_str() : "every allocation");
      return r.fail(cudaErrorInvalidValue);
    }
  memmove(to, from, bytes);
  const Allocation* source = r.find(from, bytes);
  Allocation* target = r.find(to, bytes);
  if (source != nullptr && target != nullptr && !source->valid.empty()) {  // what was not written still is not
    if (target->valid.empty()) target->valid.assign(target->size, 1);
    const auto begin = source->valid.begin() + static_cast<std::ptrdiff_t>(reinterpret_cast<u64>(from) - source->base);
    const std::vector<u8> moved(begin, begin + static_cast<std::ptrdiff_t>(bytes));
    std::copy(moved.begin(), moved.end(),
              target->valid.begin() + static_cast<std::ptrdiff_t>(reinterpret_cast<u64>(to) - target->base));
  } else {
    r.written(to, bytes);
  }
  return r.done();
}

cudaError_t fill(void* to, int value, size_t bytes) {
  Runtime& r = runtime();
  if (r.find(to, bytes) == nullptr) return r.fail(cudaErrorInvalidValue);
  memset(to, value, bytes);
  r.written(to, bytes);
  return r.done();
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 166912;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 167936;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMultiProcessorCount: return 108;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrComputeCapabilityMajor: return runtime().capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return runtime().capability % 10;
    case cudaDevAttrL2CacheSize: return 40 << 20;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrTotalConstantMemory: return 65536;
    default: return 0;
  }
}

const Kernel* kernel_of(const void* function) {
  const auto it = runtime().kernels.find(function);
  return it == runtime().kernels.end() ? nullptr : &it->second;
}

}  // namespace

const char* begin_recording(const char* text) {
  Runtime& r = runtime();
  if (r.recording) return "launches are recorded already";
  const std::string wrong = r.configure(text);
  if (!wrong.empty()) {
    r.use_environment();
    return kept(wrong);
  }
  r.recording = true;
  r.last = r.sticky = cudaSuccess;
  return nullptr;
}

const char* map_memory(u64 address, u64 bytes, const char* name) {
  Runtime& r = runtime();
  if (!r.recording) return "memory is mapped while launches are recorded";
  const auto next = r.memory.lower_bound(address);
  const bool before = next != r.memory.begin() && std::prev(next)->second.base + std::prev(next)->second.size > address;
  if (bytes == 0 || before || (next != r.memory.end() && next->first < address + bytes))
    return kept(std::string(name) + (bytes ? ": overlaps what is mapped already" : ": has no bytes"));
  Allocation& a = r.memory[address];
  a.base = address, a.size = bytes, a.name = name, a.mapped = true;
  return nullptr;
}

const char* mark_unwritten(u64 address, u64 bytes, bool required) {
  Allocation* a = mapped_memory(address, bytes);
  if (a == nullptr) return "bytes that are not mapped";
  if (a->valid.empty()) a->valid.assign(a->size, 1);
  const u64 begin = address - a->base;
  std::fill_n(a->valid.begin() + static_cast<std::ptrdiff_t>(begin), bytes, 0);
  if (required) a->required.emplace_back(begin, begin + bytes);
  return nullptr;
}

const char* allow_view(u64 address, u64 bytes) {
  Allocation* a = mapped_memory(address, bytes);
  if (a == nullptr) return "bytes that are not mapped";
  a->views.emplace_back(address - a->base, address - a->base + bytes);
  return nullptr;
}

const char* unmap_memory(u64 address) {
  const auto it = runtime().memory.find(address);
  if (it == runtime().memory.end() || !it->second.mapped) return "no mapped memory begins there";
  runtime().memory.erase(it);
  return nullptr;
}

const char* end_recording() {
  Runtime& r = runtime();
  std::string unwritten;
  for (const auto& [base, a] : r.memory) {
    u64 missing = 0, first = 0;
    for (const auto& [begin, end] : a.required)
      for (u64 b = begin; b < end && !a.valid.empty(); ++b)
        if (!a.valid[b] && missing++ == 0) first = b;
    if (missing)
      append(unwritten, R"({"tensor":)" + json(a.name) + R"(,"first":)" + json(first) + R"(,"bytes":)" + json(missing) +
                            R"(,"of":)" + json(a.size) + '}');
  }
  std::erase_if(r.memory, [](const auto& item) { return item.second.mapped; });
  std::string record = R"({"launches":[)" + std::exchange(r.recorded, "") + R"(],"unwritten":[)" + unwritten + "]}";
  r.recording = false;
  r.last = r.sticky = cudaSuccess;
  r.use_environment();
  return kept(std::move(record));
}

}  // namespace gpusim

using gpusim::runtime;

extern "C" {

// ---- what nvcc's host code calls
void** __cudaRegisterFatBinary(void* wrapper) {
  auto module = std::make_unique<gpusim::LoadedModule>();
  module->text = gpusim::ptx_of(wrapper);
  if (module->text.empty())
    fprintf(stderr, "gpusim: a fat binary without PTX text: build with code=compute_80 and --compress-mode=none\n");
  runtime().modules.push_back(std::move(module));
  return reinterpret_cast<void**>(runtime().modules.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  runtime().kernels[host] = {.module = reinterpret_cast<gpusim::LoadedModule*>(handle), .name = name};
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  runtime().variables[host] = {reinterpret_cast<gpusim::LoadedModule*>(handle), name};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  runtime().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  auto& stack = runtime().configurations;
  if (stack.empty()) return runtime().fail(cudaErrorMissingConfiguration);
  const auto c = stack.back();
  stack.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<void**>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return gpusim::kernel_of(function) ? cudaSuccess : runtime().fail(cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  const gpusim::Kernel* k = gpusim::kernel_of(function);
  return k ? runtime().launch(*k, grid, block, args, shared) : runtime().fail(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, args, shared, stream);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t stream) {
  return __cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) return runtime().fail(cudaErrorNotSupported);
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream);
}

// ---- memory
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  gpusim::Runtime& r = runtime();
  static int count = 0;
  *pointer = nullptr;
  if (bytes == 0) return r.done();
  gpusim::Allocation* a = r.allocate(bytes, "allocation " + std::to_string(++count), false);
  if (a == nullptr) return r.fail(cudaErrorMemoryAllocation);
  *pointer = reinterpret_cast<void*>(a->base);
  return r.done();
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  const cudaError_t e = cudaMalloc(pointer, bytes);
  if (*pointer) runtime().written(*pointer, bytes);  // the host may write it unseen
  return e;
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaMallocManaged(pointer, bytes, 0); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return cudaMallocManaged(pointer, bytes, 0); }
cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr || runtime().release(reinterpret_cast<gpusim::u64>(pointer))) return runtime().done();
  return runtime().fail(cudaErrorInvalidValue);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return gpusim::copy(to, from, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return gpusim::copy(to, from, bytes);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return gpusim::fill(to, value, bytes); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return gpusim::fill(to, value, bytes); }
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  *pointer = runtime().symbol(symbol);
  return *pointer ? cudaSuccess : runtime().fail(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  void* at = runtime().symbol(symbol);
  return at ? gpusim::copy(static_cast<char*>(at) + offset, from, bytes) : runtime().fail(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  void* at = runtime().symbol(symbol);
  return at ? gpusim::copy(to, static_cast<char*>(at) + offset, bytes) : runtime().fail(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = gpusim::kDeviceMemory, *free = *total - std::min<size_t>(*total, runtime().allocated);
  return runtime().done();
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  *out = {};
  out->type = runtime().find(pointer, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  out->devicePointer = out->hostPointer = const_cast<void*>(pointer);
  return runtime().done();
}

// ---- streams and events: all is done when a call returns
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(16);
  return runtime().done();
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return runtime().done(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return runtime().done(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return runtime().done(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return runtime().done(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return runtime().done();
}
cudaError_t cudaDeviceSynchronize() { return runtime().done(); }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new std::chrono::steady_clock::time_point);
  return runtime().done();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<std::chrono::steady_clock::time_point*>(event) = std::chrono::steady_clock::now();
  return runtime().done();
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return runtime().done(); }
cudaError_t cudaEventQuery(cudaEvent_t) { return runtime().done(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const auto at = [](cudaEvent_t e) { return *reinterpret_cast<std::chrono::steady_clock::time_point*>(e); };
  *milliseconds = std::chrono::duration<float, std::milli>(at(end) - at(begin)).count();
  return runtime().done();
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<std::chrono::steady_clock::time_point*>(event);
  return runtime().done();
}

// ---- devices and functions
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return runtime().done();
}
cudaError_t cudaGetDevice(int* device) {
  *device = runtime().device;
  return runtime().done();
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? runtime().done() : runtime().fail(cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device != 0) return runtime().fail(cudaErrorInvalidDevice);
  *value = gpusim::attribute(which);
  return runtime().done();
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return runtime().fail(cudaErrorInvalidDevice);
  *p = {};
  snprintf(p->name, sizeof(p->name), "PTX simulator");
  p->major = runtime().capability / 10, p->minor = runtime().capability % 10, p->warpSize = 32,
  p->multiProcessorCount = 108;
  p->totalGlobalMem = size_t{40} << 30;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 166912, p->sharedMemPerMultiprocessor = 167936;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 40 << 20, p->totalConstMem = 65536;
  return runtime().done();
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  const auto it = runtime().kernels.find(function);
  if (it == runtime().kernels.end()) return runtime().fail(cudaErrorInvalidDeviceFunction);
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const gpusim::Program* p = runtime().program(it->second);
    if (p == nullptr) return runtime().fail(cudaErrorInvalidPtx);
    if (value < 0 || static_cast<gpusim::u64>(value) + p->static_shared > 166912)
      return runtime().fail(cudaErrorInvalidValue);
    it->second.max_dynamic = static_cast<gpusim::u64>(value);
  }
  return runtime().done();
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return runtime().done(); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  const gpusim::Kernel* k = gpusim::kernel_of(function);
  if (k == nullptr) return runtime().fail(cudaErrorInvalidDeviceFunction);
  const gpusim::Program* p = runtime().program(*k);
  if (p == nullptr) return runtime().fail(cudaErrorInvalidPtx);
  *out = {};
  out->sharedSizeBytes = p->static_shared;
  out->maxThreadsPerBlock = 1024, out->ptxVersion = out->binaryVersion = 80;
  out->maxDynamicSharedSizeBytes = 166912;
  return runtime().done();
}
// By threads and shared memory: PTX does not say how many registers a kernel takes.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  const gpusim::Kernel* k = gpusim::kernel_of(function);
  if (k == nullptr || threads < 1 || threads > 1024) return runtime().fail(cudaErrorInvalidValue);
  const gpusim::Program* p = runtime().program(*k);
  if (p == nullptr) return runtime().fail(cudaErrorInvalidPtx);
  const size_t all = (p->static_shared + shared + 127) / 128 * 128 + 1024;
  *blocks =
      static_cast<int>(std::min<size_t>({32, 2048 / (static_cast<size_t>(threads + 31) / 32 * 32), 167936 / all}));
  return runtime().done();
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

// ---- errors
cudaError_t cudaGetLastError() {
  gpusim::Runtime& r = runtime();
  return std::exchange(r.last, r.sticky);
}
cudaError_t cudaPeekAtLastError() { return runtime().last; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidPtx: return "cudaErrorInvalidPtx";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorLaunchFailure && !runtime().fault.empty() ? runtime().fault.c_str()
                                                                     : cudaGetErrorName(error);
}

}  // extern "C"
