// Validity of registers, faults, CTAs and their schedule, launches.
#include "gpusim/machine.h"

#include <algorithm>
#include <numeric>
#include <thread>

namespace gpusim {

namespace {

constexpr u8 kWhole = 0xff;
// Instructions before another warp has its turn, and before another CTA may: a spinning warp must not starve one.
constexpr u64 kQuantum = 4'000, kShortQuantum = 1'000;

constexpr u32 kMultiprocessors = 108;
constexpr u32 kStackBegin = 16;  // no variable has address 0

// CTAs that an A100 holds at once, as far as threads and shared memory limit it; all of a cooperative launch.
u64 resident_ctas(const Launch& launch) {
  const u64 total = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  if (launch.program.grid_barrier) return total;
  const u64 threads = std::max<u64>(32, (launch.block[0] * launch.block[1] * launch.block[2] + 31ull) / 32 * 32);
  const u64 shared = launch.program.static_shared + launch.dynamic_shared + 1024;
  return kMultiprocessors * std::clamp<u64>(std::min(2048 / threads, 167936 / shared), 1, 32);
}

void finish_vote(Warp& w, const Op& op, const Barrier& b) {
  const int mode = static_cast<int>(op.imm & 3);
  const u32 lanes = w.live;
  if (mode == 0) {
    u32* d = w.reg<u32>(op, 0);
    for (int l = 0; l < kLanes; ++l)
      if (lanes >> l & 1) d[l] = b.votes;
  } else {
    const bool yes = mode == 1 ? b.votes == b.voters : b.votes > 0;
    u32& p = *w.reg<u32>(op, 0);
    p = yes ? p | lanes : p & ~lanes;
  }
  w.set_valid(op.regs[0], lanes);
}

// What two host threads did to the same bytes.
void find_race(Launch& launch, const Region& r, const Shadow& a, const Shadow& b, const std::vector<u32>& turn_of,
               std::vector<std::pair<u32, Fault>>& found) {
  const auto cta_of = [](u64 who) { return static_cast<u32>(who >> 32) - 1; };
  if (b.writer.empty()) return;
  std::map<u32, std::pair<u32, Fault>> earliest;  // by operation
  for (u64 at = 0; at < a.writer.size(); ++at) {
    const bool both = a.writer[at] && b.writer[at];
    if (!both && !(a.writer[at] && b.reader[at]) && !(b.writer[at] && a.reader[at])) continue;
    const bool update = (a.touched[at] | b.touched[at]) & kReadFirst;
    if (both && !update && a.value[at] == b.value[at] && !launch.options.strict_races) {
      const u64 second = std::max(a.writer[at], b.writer[at]);
      launch.counters[second == a.writer[at] ? a.writer_op[at] : b.writer_op[at]].collisions += 1;
      continue;
    }
    const bool a_writes = a.writer[at] != 0;
    const u64 wrote = a_writes ? a.writer[at] : b.writer[at];
    const u32 wrote_op = a_writes ? a.writer_op[at] : b.writer_op[at];
    const Shadow& o = a_writes ? b : a;
    const u64 met = both ? o.writer[at] : o.reader[at];
    const u32 met_op = both ? o.writer_op[at] : o.reader_op[at];
    const u32 writer_cta = cta_of(wrote), other_cta = met == kSeveralCtas ? writer_cta : cta_of(met);
    const bool writer_later = turn_of[writer_cta] > turn_of[other_cta];
    const u32 turn = std::max(turn_of[writer_cta], turn_of[other_cta]);
    const auto known = earliest.find(writer_later ? wrote_op : met_op);
    if (known != earliest.end() && known->second.first <= turn) continue;
    Fault f("race", "race: byte " + std::to_string(at) + " of " + r.name + " was written by CTA " +
                        std::to_string(writer_cta) + " and is " + (both ? "written" : "read") + " by " +
                        (met == kSeveralCtas ? "others" : "CTA " + std::to_string(other_cta)));
    f.op = writer_later ? wrote_op : met_op;
    f.other_op = writer_later ? met_op : wrote_op;
    f.address = r.base + at;
    f.region = r.name;
    const u64 later = writer_later ? wrote : met;
    const u32 cta = std::max(writer_later ? writer_cta : other_cta, 0u), stamp = static_cast<u32>(later);
    const bool several = (stamp & kSeveralWarps) == kSeveralWarps;
    const u32 linear = several ? 0 : (stamp >> 5 & 63) * kLanes + (stamp & 31);
    const auto& [bx, by, bz] = launch.block;
    f.cta = {cta % launch.grid[0], cta / launch.grid[0] % launch.grid[1], cta / (launch.grid[0] * launch.grid[1])};
    f.thread = {linear % bx, linear / bx % by, linear / (bx * by) % bz};
    earliest.insert_or_assign(f.op, std::pair{turn, f});
  }
  for (auto& [op, item] : earliest) found.push_back(item);
}

void add_history(Shadow& all, const Shadow& more) {
  for (u64 at = 0; at < std::min(all.touched.size(), more.touched.size()); ++at) all.touched[at] |= more.touched[at];
  if (more.writer.empty()) return;
  if (all.writer.empty()) {
    all = more;
    return;
  }
  for (u64 at = 0; at < all.writer.size(); ++at) {
    if (more.writer[at]) {
      all.writer[at] = more.writer[at], all.writer_op[at] = more.writer_op[at];
      if (!all.value.empty()) all.value[at] = more.value[at];
    }
    if (more.reader[at]) {
      all.reader[at] = all.reader[at] ? kSeveralCtas : more.reader[at];
      all.reader_op[at] = more.reader_op[at];
    }
  }
}

}  // namespace

OpCounters& OpCounters::operator+=(const OpCounters& o) {
  warps += o.warps, lanes += o.lanes, bytes += o.bytes, sectors += o.sectors;
  wavefronts += o.wavefronts, ideal_wavefronts += o.ideal_wavefronts, collisions += o.collisions;
  return *this;
}

// ---- validity of registers
void Warp::set_valid(const Reg& r, u32 mask) {
  if (mask == kAllLanes) {
    partial[r.id] = 0;
  } else if (partial[r.id]) {
    auto& v = valid[r.id];
    bool all = true;
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) v[l] = kWhole;
      all = all && v[l] == kWhole;
    }
    if (all) partial[r.id] = 0;
  }
}

void Warp::propagate(const Op& op, u32 mask) {
  if (op.rule == Rule::kOwn) return;
  u8 any = 0;
  for (int i = op.num_dst; i < op.num_dst + op.num_src; ++i) any |= partial[op.regs[i].id];
  if (any) return propagate_slowly(op, mask);
  for (int i = 0; i < op.num_dst; ++i)
    if (partial[op.regs[i].id]) set_valid(op.regs[i], mask);
}

void Warp::propagate_slowly(const Op& op, u32 mask) {
  const Reg* src = op.regs + op.num_dst;
  auto bytes_of = [&](int i, int l) -> u8 { return partial[src[i].id] ? valid[src[i].id][l] : kWhole; };
  u32 where = 0;
  for (int i = 0; i < op.num_src; ++i)
    if (partial[src[i].id]) where = origin[src[i].id];
  for (int k = 0; k < op.num_dst; ++k) {
    const Reg& d = op.regs[k];
    u8 fresh[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      u8 all = kWhole;
      for (int i = 0; i < op.num_src; ++i) all &= bytes_of(i, l) == kWhole ? kWhole : 0;
      u8 v = all;
      const u8 a = bytes_of(0, l);
      switch (op.rule) {
        case Rule::kMove: v = a; break;
        case Rule::kPack: {
          v = 0;
          const int piece = static_cast<int>(op.imm);
          const u8 whole = static_cast<u8>((1u << piece) - 1);
          for (int i = 0; i < op.num_src; ++i) v |= static_cast<u8>((bytes_of(i, l) & whole) << (i * piece));
          if (piece * op.num_src < 8) v |= static_cast<u8>(0xff << (piece * op.num_src));
          break;
        }
        case Rule::kUnpack: {
          const int piece = static_cast<int>(op.imm);
          const u8 whole = static_cast<u8>((1u << piece) - 1);
          v = static_cast<u8>((a >> (k * piece)) & whole) == whole ? kWhole : static_cast<u8>(a >> (k * piece) & whole);
          break;
        }
        case Rule::kAnd:
        case Rule::kOr: {
          // A known byte of zeros (ones) decides the result.
          const u8 b = bytes_of(1, l);
          const int width = op.wide ? 8 : 4;
          v = op.wide ? 0 : 0xf0;
          u64 x = 0, y = 0;
          memcpy(&x, file + src[0].value + width * l, static_cast<size_t>(width));
          memcpy(&y, file + src[1].value + width * l, static_cast<size_t>(width));
          const u8 decides = op.rule == Rule::kAnd ? 0x00 : 0xff;
          for (int i = 0; i < width; ++i) {
            const bool va = a >> i & 1, vb = b >> i & 1;
            const bool da = va && static_cast<u8>(x >> (8 * i)) == decides,
                       db = vb && static_cast<u8>(y >> (8 * i)) == decides;
            if ((va && vb) || da || db) v |= static_cast<u8>(1u << i);
          }
          break;
        }
        case Rule::kShl:
        case Rule::kShr: {
          const u32 amount = reinterpret_cast<u32*>(file + src[1].value)[l];
          if (bytes_of(1, l) != kWhole || amount % 8 != 0) break;
          const u32 n = std::min(amount / 8, 8u);
          const u8 own = op.wide ? kWhole : 0x0f;
          if (op.rule == Rule::kShl)
            v = static_cast<u8>((a << n | ((1u << n) - 1)) & own);
          else
            v = static_cast<u8>(((a & own) >> n | (own & ~(own >> n))) & own);
          if (!op.wide) v |= 0xf0;
          break;
        }
        case Rule::kPrmt: {
          if (bytes_of(2, l) != kWhole) break;
          const u32 c = reinterpret_cast<u32*>(file + src[2].value)[l];
          const u8 both = static_cast<u8>((bytes_of(0, l) & 0x0f) | (bytes_of(1, l) & 0x0f) << 4);
          v = 0xf0;
          for (int i = 0; i < 4; ++i) v |= static_cast<u8>((both >> (c >> (4 * i) & 7) & 1) << i);
          break;
        }
        case Rule::kSelect: {
          if (!(bytes_of(2, l) & 1)) {
            v = 0;
            break;
          }
          const u32 p = *reinterpret_cast<u32*>(file + src[2].value);
          v = p >> l & 1 ? bytes_of(0, l) : bytes_of(1, l);
          break;
        }
        case Rule::kExtend: {
          const u8 own = op.imm >= 8 ? kWhole : static_cast<u8>((1u << op.imm) - 1);
          v = (a & own) == own ? kWhole : static_cast<u8>(a & own);
          break;
        }
        default: break;
      }
      fresh[l] = v;
    }
    if (!partial[d.id]) {
      partial[d.id] = 1;
      valid[d.id].fill(kWhole);
    }
    bool all = true;
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) valid[d.id][l] = fresh[l];
      all = all && valid[d.id][l] == kWhole;
    }
    origin[d.id] = where;
    if (all) partial[d.id] = 0;
  }
}

void Warp::require_valid(const Op& op, const Reg& r, u32 mask, u8 bytes, const char* what) {
  if (!partial[r.id] || !cta->launch.options.uninit) return;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1) || (valid[r.id][l] & bytes) == bytes) continue;
    std::string text = std::string("uninitialised data reaches ") + what;
    const u32 from = origin[r.id];
    if (from > 0) text += "; it was read at " + cta->program.where(from - 1);
    const auto racy = racy_loads.find(from - 1);
    if (from > 0 && racy != racy_loads.end())
      tell(racy->second);
    else
      fault(op, l, "uninitialised", text);
    valid[r.id][l] = kWhole;  // told once
  }
}

// ---- faults
void Warp::raise(const Op& op, int lane, const char* kind, const std::string& what, u64 address, const Region* region) {
  throw fault_at(op, lane, kind, what, address, region);
}

Fault Warp::fault_at(const Op& op, int lane, const char* kind, const std::string& what, u64 address,
                     const Region* region) const {
  Fault f(kind, what);
  f.op = op.index;
  f.cta = cta->index;
  const u32 linear = static_cast<u32>(index * kLanes + lane);
  const auto& block = cta->launch.block;
  f.thread = {linear % block[0], linear / block[0] % block[1], linear / (block[0] * block[1])};
  f.address = address;
  if (region) f.region = region->name;
  return f;
}

void Warp::fault(const Op& op, int lane, const char* kind, const std::string& what, u64 address, const Region* region,
                 u32 other_op) {
  Fault f = fault_at(op, lane, kind, what, address, region);
  f.other_op = other_op;
  tell(f);
}

void Warp::tell(const Fault& f) {
  Worker& worker = cta->worker;
  if (!cta->launch.options.collect) throw f;
  for (const Fault& other : worker.faults)
    if (other.op == f.op && other.kind == f.kind) return;  // one for each instruction
  if (worker.faults.size() < 1000) worker.faults.push_back(f), worker.fault_turns.push_back(cta->turn);
}

// ---- CTAs
Cta::Cta(Worker& worker) : worker(worker), launch(worker.launch), program(worker.launch.program) {
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  const size_t count = (threads + kLanes - 1) / kLanes;
  warps.resize(count);
  order.resize(count);
  const size_t bytes = program.static_shared + launch.dynamic_shared;
  shared.resize(bytes);
  shared_valid.resize(bytes);
  units.resize((bytes + 15) / 16);
  for (size_t i = 0; i < count; ++i) {
    Warp& w = warps[i];
    w.cta = this;
    w.index = static_cast<int>(i);
    w.storage.resize(program.registers.size() + 64);
    const auto at = reinterpret_cast<uintptr_t>(w.storage.data());
    w.file = w.storage.data() + (64 - at % 64) % 64;
    w.partial.resize(program.initially_valid.size());
    w.valid.resize(program.initially_valid.size());
    w.origin.resize(program.initially_valid.size());
    w.counters = &worker.counters;
  }
}

void Cta::start(u32 linear_index, u32 at_turn) {
  linear = linear_index;
  turn = at_turn;
  index = {linear % launch.grid[0], linear / launch.grid[0] % launch.grid[1],
           linear / (launch.grid[0] * launch.grid[1])};
  std::fill(shared.begin(), shared.end(), 0);  // so that what is unwritten does not depend on the CTA before
  std::fill(shared_valid.begin(), shared_valid.end(), 0);
  std::fill(units.begin(), units.end(), History{});
  serial = 0;
  readers.start(warps.size());
  settled.assign(warps.size(), 0);
  barriers = {};
  phases.clear();
  std::iota(order.begin(), order.end(), 0);
  random.seed(launch.options.seed * 0x9e3779b97f4a7c15ull + linear);
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  for (Warp& w : warps) {
    memcpy(w.file, launch.registers.data(), launch.registers.size());
    const u32 first = static_cast<u32>(w.index * kLanes), n = std::min<u32>(kLanes, threads - first);
    w.live = w.active = n == kLanes ? kAllLanes : (1u << n) - 1;
    w.pc = 0;
    w.depth = w.spins = 0;
    w.racy_loads.clear();
    w.meeting = nullptr;
    w.splits.clear();
    w.parked.clear();
    w.foreign = w.fenced = w.fenced_cta = w.seen = nullptr;
    if (program.has_frames) {
      const Code& code = program.codes[0];
      for (u32 l = 0; l < kLanes; ++l) {
        Stack& s = w.stacks[l];
        s.frames.clear();
        s.base = kStackBegin, s.top = kStackBegin + static_cast<u32>(code.frame_bytes);
        if (s.memory.size() < s.top) s.memory.resize(s.top), s.valid.resize(s.top);
        std::fill(s.valid.begin(), s.valid.end(), 0);
        std::fill(s.memory.begin(), s.memory.end(), 0);
        s.saved = 0;
        for (const auto& [r, offset] : code.addresses) reinterpret_cast<u64*>(w.file + r.value)[l] = s.base + offset;
      }
    }
    for (size_t r = 0; r < w.partial.size(); ++r) {
      w.partial[r] = !program.initially_valid[r];
      if (w.partial[r]) w.valid[r].fill(0), w.origin[r] = 0;
    }
    w.clock.assign(warps.size(), 0);
    w.clock[w.index] = 1;
    w.converged = 0;
    w.copies.clear();
    w.copy_groups = {};
    w.barrier = -1;
    w.executed = 0;
    for (int s = 0; s < kNumSpecial; ++s) {
      if (!(program.used_special >> s & 1)) continue;
      for (int l = 0; l < kLanes; ++l) {
        const u32 t = first + static_cast<u32>(l);
        const auto& b = launch.block;
        u64 v = 0;
        switch (s) {
          case kTidX: v = t % b[0]; break;
          case kTidY: v = t / b[0] % b[1]; break;
          case kTidZ: v = t / (b[0] * b[1]); break;
          case kNtidX:
          case kNtidY:
          case kNtidZ: v = b[static_cast<size_t>(s - kNtidX)]; break;
          case kCtaidX:
          case kCtaidY:
          case kCtaidZ: v = index[static_cast<size_t>(s - kCtaidX)]; break;
          case kNctaidX:
          case kNctaidY:
          case kNctaidZ: v = launch.grid[static_cast<size_t>(s - kNctaidX)]; break;
          case kLaneId: v = static_cast<u64>(l); break;
          case kWarpId: v = static_cast<u64>(w.index); break;
          case kNWarpId: v = warps.size(); break;
          case kLaneMaskEq: v = 1u << l; break;
          case kLaneMaskLe: v = l == 31 ? kAllLanes : (2u << l) - 1; break;
          case kLaneMaskLt: v = (1u << l) - 1; break;
          case kLaneMaskGe: v = ~((1u << l) - 1); break;
          case kLaneMaskGt: v = l == 31 ? 0 : ~((2u << l) - 1); break;
          case kDynamicShared: v = launch.dynamic_shared; break;
          case kTotalShared: v = shared.size(); break;
          case kNSmId: v = kMultiprocessors; break;
          case kGridBarrier1: v = launch.grid_barrier >> 32; break;
          case kGridBarrier2: v = launch.grid_barrier & 0xffffffffu; break;
          default: v = 0; break;
        }
        if (s == kGridId)
          memcpy(w.file + program.special[static_cast<size_t>(s)].value + 8 * l, &v, 8);
        else
          memcpy(w.file + program.special[static_cast<size_t>(s)].value + 4 * l, &v, 4);
      }
    }
  }
}

u32 Cta::live_threads() const {
  u32 n = 0;
  for (const Warp& w : warps) n += w.live ? kLanes : 0;
  return n;
}

void Cta::release(int id) {
  Barrier& b = barriers[static_cast<size_t>(id)];
  std::vector<u32> joined = b.clock;
  joined.resize(warps.size(), 0);
  Known foreign = b.foreign;
  for (Warp& w : warps) {
    if (!(b.waiting >> w.index & 1)) continue;
    for (size_t i = 0; i < joined.size(); ++i) joined[i] = std::max(joined[i], w.clock[i]);
    foreign = join(foreign, w.foreign);
  }
  // What the members did up to here happens before what they do from now on: their clocks move on, and each of them
  // knows the others' new times.
  for (const Warp& w : warps)
    if (b.waiting >> w.index & 1) joined[static_cast<size_t>(w.index)] = w.clock[static_cast<size_t>(w.index)] + 1;
  for (Warp& w : warps) {
    if (!(b.waiting >> w.index & 1)) continue;
    w.clock = joined;
    w.converged = w.time();
    w.foreign = foreign;
    w.barrier = -1;
    if (w.barrier_op->votes) finish_vote(w, *w.barrier_op, b);
  }
  const bool all =
      std::all_of(warps.begin(), warps.end(), [&](const Warp& w) { return !w.live || b.waiting >> w.index & 1; });
  if (all) settled = joined;
  b = {};
}

bool Cta::run(u64 quantum) {
  if (launch.options.seed != 0) std::shuffle(order.begin(), order.end(), random);
  bool ran = false, alive = false;
  for (int i : order) {
    Warp& w = warps[static_cast<size_t>(i)];
    if (!w.live) continue;
    alive = true;
    if (w.barrier >= 0) continue;
    ran = true;
    w.run(quantum);
  }
  if (!alive) {
    for (const Warp& w : warps) worker.instructions += w.executed;
    return true;
  }
  bool released = false;
  for (size_t id = 0; id < barriers.size(); ++id) {
    const Barrier& b = barriers[id];
    if (b.waiting == 0) continue;
    const u32 expected = b.expected ? b.expected : live_threads();  // exited threads are not waited for
    if (b.arrived >= expected) release(static_cast<int>(id)), released = true;
  }
  if (!ran && !released) {
    std::string waiting;
    Warp* first = nullptr;
    for (Warp& w : warps) {
      if (!w.live) continue;
      const Instruction* at = program.instruction(w.barrier_op->index);
      waiting += (first ? "; " : "") + ("warp " + std::to_string(w.index)) + " at PTX line " +
                 std::to_string(at ? at->line : 0);
      if (first == nullptr) first = &w;
    }
    first->raise(*first->barrier_op, std::countr_zero(first->live), "deadlock",
                 "deadlock: warps wait for each other: " + waiting);
  }
  return false;
}

// ---- launches
Region* Launch::region_of(u64 address) {
  const u64 slot = (address >> kGlobalShift) - 1;
  if (slot < regions.size() && address - regions[slot].base < regions[slot].size) return &regions[slot];
  // Where the host has them, in the order of their addresses.
  const auto above =
      std::upper_bound(regions.begin(), regions.end(), address, [](u64 a, const Region& r) { return a < r.base; });
  return above == regions.begin() ? nullptr : &*(above - 1);
}

u64 Launch::address_of(const std::string& symbol) const {
  const auto shared = program.shared_offsets.find(symbol);
  if (shared != program.shared_offsets.end()) return shared->second;
  for (auto r = regions.rbegin(); r != regions.rend(); ++r)  // variables stand behind tensors, which may have any name
    if (r->name == symbol) return r->base;
  const u64 function = program.module.address_of(symbol);
  return function ? kCodeWindow + function : ~0ull;
}

std::string Launch::resolve_symbols() {
  registers = program.registers;
  for (const Fixup& f : program.fixups) {
    u64 address = address_of(f.symbol);
    if (address == ~0ull) return "unsupported: symbol " + f.symbol;
    address += static_cast<u64>(f.offset);
    for (u32 l = 0; l < kLanes; ++l) memcpy(&registers[f.value + (f.wide ? 8 : 4) * l], &address, f.wide ? 8 : 4);
  }
  for (const Variable& v : relocate ? program.module.variables : std::vector<Variable>{}) {
    const auto region =
        std::find_if(regions.rbegin(), regions.rend(), [&](const Region& r) { return r.name == v.name; });
    if (region == regions.rend() || region->size < v.bytes) continue;
    for (const Relocation& r : v.relocations) {
      u64 address = address_of(r.symbol);
      if (address == ~0ull) continue;  // of a function that this kernel cannot call
      const bool shared = program.shared_offsets.count(r.symbol) > 0;
      address += static_cast<u64>(r.addend) + (shared ? kSharedWindow : 0);
      memcpy(region->host + r.at, &address, 8);
    }
  }
  return "";
}

// CTAs in the order in which they start: shuffled or reversed among those that are resident together, as no GPU starts
// a later one while an earlier one waits for room.
std::vector<u32> Launch::order_of_ctas() const {
  const u64 total = static_cast<u64>(grid[0]) * grid[1] * grid[2];
  std::vector<u32> out(total);
  std::iota(out.begin(), out.end(), 0);
  std::mt19937_64 random(options.seed);
  const u64 wave = program.synchronises_ctas ? resident_ctas(*this) : total;
  for (u64 first = 0; first < total; first += wave) {
    const auto begin = out.begin() + static_cast<std::ptrdiff_t>(first);
    const auto end = out.begin() + static_cast<std::ptrdiff_t>(std::min(total, first + wave));
    if (options.order == "random") std::shuffle(begin, end, random);
    if (options.order == "reverse") std::reverse(begin, end);
  }
  return out;
}

Worker::Worker(Launch& launch) : launch(launch), shadows(launch.regions.size()), counters(launch.program.ops.size()) {}

Shadow& Worker::shadow(const Region& r) {
  Shadow& s = shadows[static_cast<size_t>(&r - launch.regions.data())];
  if (!s.touched.empty()) return s;
  s.touched.assign(r.size, 0);
  s.followed = launch.options.races && !r.constant;
  s.keeps_values = launch.options.threads > 1;
  if (s.followed) s.reads.resize(r.size / 16);
  return s;
}

void Shadow::divide(u64 offset, u64 bytes) {
  if (writer.empty()) {
    const size_t size = touched.size();
    writer.resize(size), reader.resize(size);
    writer_op.resize(size), reader_op.resize(size);
    if (keeps_values) value.resize(size);
  }
  for (u64 unit = offset / 16; unit < std::min<u64>((offset + bytes + 15) / 16, reads.size()); ++unit) {
    Read& whole = reads[unit];
    if (whole.reader == 0) continue;
    std::fill_n(&reader[16 * unit], 16, whole.reader);
    std::fill_n(&reader_op[16 * unit], 16, whole.op);
    whole = {};
  }
}

// Every step-th CTA from `first` on.
void Worker::run(const std::vector<u32>& order, u32 first, u32 step) {
  try {
    if (launch.program.synchronises_ctas) return run_resident(order);
    Cta cta(*this);
    for (u64 i = first; i < order.size(); i += step) {
      turn = static_cast<u32>(i);
      cta.start(order[i], turn);
      try {
        while (!cta.run(kQuantum)) {
        }
      } catch (const Fault& f) {  // the other CTAs go on, whichever thread they are of
        if (!launch.options.collect) throw;
        faults.push_back(f);
        fault_turns.push_back(turn);
      }
    }
  } catch (const Fault& f) {
    faults.push_back(f);
    fault_turns.push_back(turn);
  } catch (const std::exception& error) {  // out of memory, in a thread of the host where nobody else would catch it
    Fault f("unsupported", std::string("unsupported: the simulation failed: ") + error.what());
    f.op = ~0u;
    faults.push_back(f);
    fault_turns.push_back(turn);
  }
}

// CTAs that may wait for each other: as many as a GPU holds take turns.
void Worker::run_resident(const std::vector<u32>& order) {
  std::vector<std::unique_ptr<Cta>> resident, idle;
  const u64 most = resident_ctas(launch);
  size_t next = 0, at = 0;
  while (next < order.size() || !resident.empty()) {
    if (at >= resident.size() && next < order.size() && resident.size() < most) {
      if (idle.empty()) idle.push_back(std::make_unique<Cta>(*this));
      resident.push_back(std::move(idle.back()));
      idle.pop_back();
      resident.back()->start(order[next], static_cast<u32>(next));
      ++next;
    }
    if (at >= resident.size()) at = 0;
    turn = resident[at]->turn;
    bool done = false;
    for (int i = 0; i < 8 && !done; ++i) done = resident[at]->run(kShortQuantum);
    if (done) {
      idle.push_back(std::move(resident[at]));
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(at));
    } else {
      ++at;
    }
  }
}

u64 Heap::allocate(u64 bytes) {
  constexpr u64 kAlign = 16, kApart = 256;
  if (bytes == 0 || bytes > kSize) return ~0ull;
  u64 at = 0;
  for (const auto& [offset, size] : blocks) {
    if (offset >= at + bytes + kApart) break;
    at = (offset + size + kApart + kAlign - 1) / kAlign * kAlign;
  }
  if (at + bytes > kSize) return ~0ull;
  blocks[at] = bytes;
  return at;
}

bool Heap::holds(u64 offset, u64 bytes) const {
  const auto above = blocks.upper_bound(offset);
  return above != blocks.begin() && offset + bytes <= std::prev(above)->first + std::prev(above)->second;
}

void Launch::add_heap() {
  if (!program.has_heap || std::any_of(regions.begin(), regions.end(), [](const Region& r) { return r.heap; })) return;
  heap = std::make_unique<Heap>();
  heap_memory.resize(Heap::kSize);
  Region r;
  r.base = ((regions.empty() ? 0 : regions.back().base >> kGlobalShift) + 1) << kGlobalShift;
  r.size = Heap::kSize;
  r.host = heap_memory.data();
  r.name = "the kernel's heap";
  r.valid.assign(r.size, 0);
  r.heap = heap.get();
  regions.push_back(std::move(r));
}

void Launch::run() {
  counters.assign(program.ops.size(), {});
  add_heap();
  shadows.resize(regions.size());
  const std::string unknown = resolve_symbols();
  if (!unknown.empty()) {
    Fault f("unsupported", unknown);
    f.op = ~0u;
    faults.push_back(f);
    return;
  }
  const std::vector<u32> order = order_of_ctas();
  // What is printed has an order, and so has what is allocated.
  if (program.synchronises_ctas || program.prints || program.has_heap) options.threads = 1;
  options.threads = static_cast<u32>(std::clamp<u64>(order.size(), 1, options.threads));
  std::vector<std::unique_ptr<Worker>> workers;
  for (u32 i = 0; i < options.threads; ++i) workers.push_back(std::make_unique<Worker>(*this));
  std::vector<std::thread> threads;
  for (u32 i = 1; i < options.threads; ++i)
    threads.emplace_back([&, i] { workers[i]->run(order, i, options.threads); });
  workers[0]->run(order, 0, options.threads);
  for (auto& t : threads) t.join();
  merge(workers, order);
  check_outputs();
}

// What the workers found, as if one had done it all: the same for any number of them.
void Launch::merge(std::vector<std::unique_ptr<Worker>>& workers, const std::vector<u32>& order) {
  std::vector<std::pair<u32, Fault>> found;
  for (const auto& w : workers) {
    for (Shadow& s : w->shadows)
      if (s.followed && workers.size() > 1) s.divide(0, s.touched.size());
    for (size_t i = 0; i < counters.size(); ++i) counters[i] += w->counters[i];
    instructions += w->instructions;
    output += w->output;
    for (size_t i = 0; i < w->faults.size(); ++i) found.emplace_back(w->fault_turns[i], w->faults[i]);
    for (size_t i = 0; i < regions.size(); ++i) {
      std::vector<u8>&all = shadows[i].touched, &own = w->shadows[i].touched;
      if (all.empty()) {
        all = own;
      } else {
        for (u64 b = 0; b < own.size(); ++b) all[b] |= own[b];
      }
    }
  }
  std::vector<u32> turn_of(workers.size() > 1 ? order.size() : 0);
  for (size_t i = 0; i < turn_of.size(); ++i) turn_of[order[i]] = static_cast<u32>(i);
  for (size_t w = 1; w < workers.size(); ++w)
    for (size_t i = 0; i < regions.size(); ++i) {
      Shadow& all = workers[0]->shadows[i];
      find_race(*this, regions[i], all, workers[w]->shadows[i], turn_of, found);
      add_history(all, workers[w]->shadows[i]);
    }
  std::stable_sort(found.begin(), found.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
  for (auto& [turn, fault] : found) {
    const bool told = std::any_of(faults.begin(), faults.end(),
                                  [&](const Fault& f) { return f.op == fault.op && f.kind == fault.kind; });
    if (!told) faults.push_back(std::move(fault));
  }
  if (!options.collect && faults.size() > 1) faults.erase(faults.begin() + 1, faults.end());
}

// Fresh outputs must be written completely.
void Launch::check_outputs() {
  for (const Region& r : regions) {
    if (!r.output || !faults.empty()) continue;
    const auto at = std::find(r.valid.begin(), r.valid.end(), 0);
    if (at == r.valid.end()) continue;
    Fault f("uninitialised", "uninitialised output: byte " + std::to_string(at - r.valid.begin()) + " of " + r.name +
                                 " (" + std::to_string(std::count(r.valid.begin(), r.valid.end(), 0)) + " of " +
                                 std::to_string(r.size) + " bytes) is never written");
    f.op = ~0u;
    f.region = r.name;
    faults.push_back(f);
  }
}

}  // namespace gpusim
