// What a launch did, in the form that Python reads: the fields of faults, counters and traffic, whether they go there
// as dictionaries (the core's module) or as text (the CUDA runtime's stand-in).
#pragma once

#include <algorithm>
#include <map>
#include <string_view>
#include <tuple>

#include "gpusim/machine.h"

namespace gpusim {

// put(name, value) for each field of a fault's record.
template <class Put>
void describe(const Program& p, const Fault& f, Put put) {
  const auto instruction = [&](const std::string& prefix, u32 op) {
    const Instruction* in = p.instruction(op);
    put(prefix + "line", in ? in->line : 0);
    put(prefix + "text", in ? in->text : std::string());
    put(prefix + "where", in ? p.where(op) : std::string());
  };
  put("kind", f.kind);
  put("message", std::string(f.what()));
  instruction("", f.op);
  instruction("other_", f.other_op);
  put("cta", f.cta);
  put("thread", f.thread);
  put("address", f.address);
  put("tensor", f.region);
}

// put(line, opcode, text, where, warps, lanes, space, stores?, bytes, sectors, wavefronts, ideal wavefronts,
// collisions) for the operations that were executed: sums over those of one source line with equal opcode, space and
// direction, and the line, text and place of the first of them.
template <class Put>
void describe_counters(const Launch& run, Put put) {
  struct Sum {
    u32 first;
    OpCounters counters;
  };
  std::map<std::tuple<int, int, std::string_view, std::string_view, bool>, Sum> sums;  // by file and line
  for (const Op& op : run.program.ops) {
    const OpCounters& c = run.counters[op.index];
    if (c.warps == 0 || op.source < 0) continue;
    const Instruction& in = *run.program.instruction(op.index);
    const bool stores = in.opcode == "st" || in.opcode == "red" || (in.opcode == "wmma" && in.has("store"));
    const char* space = c.bytes == 0 ? "" : c.ideal_wavefronts ? "shared" : "global";
    const Location at = in.location < 0 ? Location{} : run.program.module.locations[static_cast<size_t>(in.location)];
    sums.try_emplace({at.file, at.line, in.opcode, space, stores}, Sum{op.index, {}}).first->second.counters += c;
  }
  for (const auto& [key, sum] : sums) {
    const auto& [file, line, opcode, space, stores] = key;
    const auto& [first, c] = sum;
    const Instruction& in = *run.program.instruction(first);
    put(in.line, in.opcode, in.text, run.program.where(first), c.warps, c.lanes, std::string(space), stores, c.bytes,
        c.sectors, c.wavefronts, c.ideal_wavefronts, c.collisions);
  }
}

// Distinct bytes and sectors of a region that a launch loaded and stored.
struct Traffic {
  u64 loaded = 0, stored = 0, load_sectors = 0, store_sectors = 0;
};

inline Traffic traffic_of(const Launch& run, size_t region) {
  const Region& r = run.regions[region];
  const std::vector<u8>& touched = run.shadows[region].touched;
  Traffic t;
  for (u64 b = 0; b < touched.size();) {
    const u64 end = std::min(r.size, (((r.base + b) / kSector) + 1) * kSector - r.base);
    u8 any = 0;
    for (; b < end; ++b) {
      t.loaded += touched[b] & 1;
      t.stored += touched[b] >> 1 & 1;
      any |= touched[b];
    }
    t.load_sectors += any & 1;
    t.store_sectors += any >> 1 & 1;
  }
  return t;
}

}  // namespace gpusim
