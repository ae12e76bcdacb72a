// Warps run, CTAs are scheduled, validity and order are followed, faults get their names.
#include "gpusim/machine.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>

namespace gpusim {

namespace {

constexpr u8 kWhole = 0xff;
constexpr u64 kQuantum = 100'000;  // instructions before another warp has its turn: a spinning warp must not starve one
constexpr u64 kDefaultBudget = 2'000'000'000;

}  // namespace

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
    fault(op, l, "uninitialised", text);
    valid[r.id][l] = kWhole;  // told once
  }
}

// ---- faults
void Warp::raise(const Op& op, int lane, const char* kind, const std::string& what, u64 address, const Region* region) {
  Fault f(kind, what);
  f.op = op.index;
  f.cta = cta->index;
  const u32 linear = static_cast<u32>(index * kLanes + lane);
  const auto& block = cta->launch.block;
  f.thread = {linear % block[0], linear / block[0] % block[1], linear / (block[0] * block[1])};
  f.address = address;
  if (region) f.region = region->name;
  throw f;
}

void Warp::fault(const Op& op, int lane, const char* kind, const std::string& what, u64 address, const Region* region,
                 u32 other_op) {
  try {
    raise(op, lane, kind, what, address, region);
  } catch (Fault& f) {
    f.other_op = other_op;
    Launch& launch = cta->launch;
    if (!launch.options.collect) throw;
    for (const Fault& other : launch.faults)
      if (other.op == f.op && other.kind == f.kind) return;  // one for each instruction
    if (launch.faults.size() < 1000) launch.faults.push_back(f);
  }
}

// ---- control
void Warp::reselect() {
  if (splits.empty()) return;
  if (active) splits.push_back({pc, active});
  // Equal places merge; the lowest goes on.
  std::sort(splits.begin(), splits.end(), [](const Split& a, const Split& b) { return a.pc > b.pc; });
  pc = splits.back().pc;
  active = 0;
  while (!splits.empty() && splits.back().pc == pc) {
    active |= splits.back().mask;
    splits.pop_back();
  }
}

void Warp::branch(const Op& op, u32 taken) {
  const u32 stays = active & ~taken;
  if (stays == 0) {
    pc = op.target;
  } else if (taken == 0) {
    pc += 1;
  } else {
    splits.push_back({op.target, taken});
    active = stays;
    pc += 1;
  }
  reselect();
}

void Warp::exit(u32 mask) {
  live &= ~mask;
  active &= ~mask;
  if (active) {
    pc += 1;
  }
  reselect();
}

void Warp::run(u64 quantum) {
  const Program& program = cta->program;
  const Op* ops = program.ops.data();
  const u64 budget = cta->launch.options.budget ? cta->launch.options.budget : kDefaultBudget;
  const u64 until = executed + quantum;
  while (live) {
    if (executed >= until) return;
    const Op& op = ops[pc];
    if (op.leader && !splits.empty()) {
      reselect();
      if (&ops[pc] != &op) continue;
    }
    if (++executed > budget)
      raise(op, std::countr_zero(active), "budget",
            "budget of " + std::to_string(budget) + " instructions a warp is used up");
    u32 mask = active;
    if (op.guarded) {
      require_valid(op, op.guard, active, 1, "a branch or a guard");
      const u32 p = *reinterpret_cast<u32*>(file + op.guard.value);
      mask &= op.guard_negated ? ~p : p;
    }
    OpCounters& c = (*counters)[op.index];
    c.warps += 1;
    c.lanes += static_cast<u64>(std::popcount(mask));
    switch (op.flow) {
      case Flow::kNext:
        if (mask) {
          propagate(op, mask);  // before the sources may be overwritten
          op.exec(*this, op, mask);
        }
        pc += 1;
        break;
      case Flow::kBranch: branch(op, mask); break;
      case Flow::kExit:
        if (mask == 0)
          pc += 1;
        else
          exit(mask);
        break;
      case Flow::kBarrier: {
        if (mask == 0) {
          pc += 1;
          break;
        }
        if (mask != live)
          raise(op, std::countr_zero(mask), "barrier", "barrier divergence: live lanes of the warp are elsewhere");
        for (int i = 0; i < op.num_src; ++i) require_valid(op, op.regs[i], mask, 0x0f, "a barrier's operand");
        const u32 id = reg<u32>(op, 0)[std::countr_zero(mask)];
        if (id >= cta->barriers.size())
          raise(op, std::countr_zero(mask), "barrier", "barrier " + std::to_string(id) + " does not exist");
        if (time() >= kMaxTime) raise(op, 0, "unsupported", "unsupported: more than a million barriers");
        Barrier& b = cta->barriers[id];
        const u32 expected = op.num_src > 1 ? reg<u32>(op, 1)[std::countr_zero(mask)] : 0;
        if (expected % kLanes != 0)
          raise(op, std::countr_zero(mask), "barrier",
                "barrier of " + std::to_string(expected) + " threads, which is no multiple of 32");
        if (b.waiting && b.expected != expected)
          raise(op, std::countr_zero(mask), "barrier",
                "barrier " + std::to_string(id) + ": warps wait for different numbers of threads");
        b.expected = expected;
        b.waiting |= 1ull << index;
        b.arrived += kLanes;
        barrier = static_cast<int>(id);
        pc += 1;
        if (expected != 0 && b.arrived == expected) cta->release(static_cast<int>(id));  // the next to come begin anew
        return;
      }
    }
  }
}

void Warp::wait_copies(u32 mask, u32 keep) {
  std::vector<PendingCopy> left;
  for (const PendingCopy& copy : copies) {
    const u32 committed = copy_groups[copy.lane];
    const bool all = keep == ~0u;
    // Groups that are committed and older than the `keep` newest ones are complete.
    const bool done = mask >> copy.lane & 1 && (all || (copy.group < committed && committed - copy.group > keep));
    if (!done) {
      left.push_back(copy);
      continue;
    }
    for (u32 b = 0; b < copy.bytes; ++b) {
      const u32 at = copy.shared + b;
      cta->in_flight[at] -= 1;
      cta->shared[at] = copy.data[b];
      cta->shared_valid[at] = copy.valid[b];
      cta->writer[at] = stamp_of(time(), static_cast<u32>(index), copy.lane);
      cta->writer_op[at] = copy.op;
    }
  }
  copies = std::move(left);
}

// ---- shared memory: who wrote and read each byte last
namespace {

u32 warp_of(u32 stamp) { return stamp >> 5 & 63; }
u32 time_of(u32 stamp) { return stamp >> 12; }

// Does what the stamp tells of happen before `w` now, in lane `lane`?
bool before(const Warp& w, int lane, u32 stamp) {
  const u32 other = warp_of(stamp);
  const bool own_lane = !(stamp & kSeveral) && (stamp & 31) == static_cast<u32>(lane);
  return (other == static_cast<u32>(w.index) && own_lane) || time_of(stamp) < w.clock[other];
}

std::string who(u32 stamp) {
  return "warp " + std::to_string(warp_of(stamp)) + (stamp & kSeveral ? "" : " lane " + std::to_string(stamp & 31));
}

void race(Warp& w, const Op& op, int lane, u32 byte, const std::string& what, u32 other_op) {
  w.fault(op, lane, "race", "race: shared byte " + std::to_string(byte) + " " + what, byte, nullptr, other_op);
}

}  // namespace

void Cta::read_shared(Warp& w, const Op& op, int lane, u32 offset, u32 bytes) {
  if (!launch.options.races) return;
  const u32 me = stamp_of(w.time(), static_cast<u32>(w.index), static_cast<u32>(lane));
  for (u32 b = offset; b < offset + bytes; ++b) {
    if (in_flight[b])
      return race(w, op, lane, b, "is read while an asynchronous copy to it is in flight", writer_op[b]);
    const u32 wrote = writer[b];
    if (wrote != 0 && !before(w, lane, wrote))
      return race(w, op, lane, b, "was written by " + who(wrote) + " and is read with no barrier between",
                  writer_op[b]);
    const u32 old = reader[b];
    if (old == me) continue;
    if (old != 0 && warp_of(old) == static_cast<u32>(w.index)) {
      reader[b] = time_of(old) == w.time() ? old | kSeveral : me;
      reader_op[b] = op.index;
    } else if (old == 0 || before(w, lane, old)) {
      reader[b] = me;
      reader_op[b] = op.index;
    } else {
      many_readers[b] = 1;
      reader_of_warp[b * warps.size() + static_cast<size_t>(w.index)] = me | kSeveral;
    }
  }
}

bool Cta::change_shared(Warp& w, const Op& op, int lane, u32 b, bool writers_agree, const char* verb) {
  if (in_flight[b]) {
    race(w, op, lane, b, std::string("is ") + verb + " while an asynchronous copy to it is in flight", writer_op[b]);
    return false;
  }
  const auto unordered = [&](const char* did, u32 stamp, u32 other_op) {
    race(w, op, lane, b,
         std::string("was ") + did + " by " + who(stamp) + " and is " + verb + " with no barrier between", other_op);
    return false;
  };
  if (writer[b] != 0 && !writers_agree && !before(w, lane, writer[b]))
    return unordered("written", writer[b], writer_op[b]);
  if (reader[b] != 0 && !before(w, lane, reader[b])) return unordered("read", reader[b], reader_op[b]);
  if (many_readers[b]) {
    for (size_t i = 0; i < warps.size(); ++i) {
      const u32 stamp = std::exchange(reader_of_warp[b * warps.size() + i], 0);
      if (stamp != 0 && !before(w, lane, stamp)) return unordered("read", stamp, ~0u);
    }
    many_readers[b] = 0;
  }
  reader[b] = 0;
  writer[b] = stamp_of(w.time(), static_cast<u32>(w.index), static_cast<u32>(lane));
  writer_op[b] = op.index;
  return true;
}

void Cta::write_shared(Warp& w, const Op& op, int lane, u32 offset, const u8* data, const u8* valid, u32 bytes) {
  u8 old[64];
  bool mine[64];
  for (u32 k = 0; k < bytes; ++k) {  // a lane's store is whole, whatever is found below
    const u32 b = offset + k;
    mine[k] = writer_serial[b] != serial;
    if (!mine[k]) {  // a higher lane of this instruction won
      (*w.counters)[op.index].collisions += 1;
      continue;
    }
    writer_serial[b] = serial;
    old[k] = shared[b];
    if (data != nullptr) shared[b] = data[k], shared_valid[b] = valid[k];
  }
  if (!launch.options.races) return;
  for (u32 k = 0; k < bytes; ++k) {
    if (!mine[k]) continue;
    const u32 b = offset + k;
    // Warps that hold the same values (Triton's replicated layouts) are no error.
    const bool equal = data != nullptr && old[k] == data[k] && !launch.options.strict_races;
    if (equal && writer[b] != 0 && !before(w, lane, writer[b])) (*w.counters)[op.index].collisions += 1;
    if (!change_shared(w, op, lane, b, equal, "written")) return;
  }
}

void Cta::update_shared(Warp& w, const Op& op, int lane, u32 offset, u32 bytes) {
  for (u32 b = offset; b < offset + bytes; ++b) {
    shared_valid[b] = 1;
    const bool atomics = program.ops[writer_op[b]].apply != nullptr;  // no error between two of them
    if (launch.options.races && !change_shared(w, op, lane, b, atomics, "updated")) return;
  }
}

// ---- CTAs
Cta::Cta(Launch& launch) : launch(launch), program(launch.program) {
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  const size_t count = (threads + kLanes - 1) / kLanes;
  warps.resize(count);
  const size_t bytes = program.static_shared + launch.dynamic_shared;
  shared.resize(bytes);
  shared_valid.resize(bytes);
  writer.resize(bytes);
  reader.resize(bytes);
  writer_op.resize(bytes);
  reader_op.resize(bytes);
  writer_serial.resize(bytes);
  in_flight.resize(bytes);
  many_readers.resize(bytes);
  reader_of_warp.resize(bytes * count);
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
    w.counters = &launch.counters;
  }
}

void Cta::start(u32 linear_index) {
  linear = linear_index;
  index = {linear % launch.grid[0], linear / launch.grid[0] % launch.grid[1],
           linear / (launch.grid[0] * launch.grid[1])};
  std::fill(shared_valid.begin(), shared_valid.end(), 0);
  std::fill(writer.begin(), writer.end(), 0);
  std::fill(reader.begin(), reader.end(), 0);
  std::fill(in_flight.begin(), in_flight.end(), 0);
  std::fill(writer_serial.begin(), writer_serial.end(), 0);
  serial = 0;
  std::fill(many_readers.begin(), many_readers.end(), 0);
  std::fill(reader_of_warp.begin(), reader_of_warp.end(), 0);
  barriers = {};
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  for (Warp& w : warps) {
    memcpy(w.file, launch.registers.data(), launch.registers.size());
    const u32 first = static_cast<u32>(w.index * kLanes), n = std::min<u32>(kLanes, threads - first);
    w.live = w.active = n == kLanes ? kAllLanes : (1u << n) - 1;
    w.pc = 0;
    w.splits.clear();
    for (size_t r = 0; r < w.partial.size(); ++r) {
      w.partial[r] = !program.initially_valid[r];
      if (w.partial[r]) w.valid[r].fill(0), w.origin[r] = 0;
    }
    w.clock.assign(warps.size(), 0);
    w.clock[w.index] = 1;
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
          case kNSmId: v = 108; break;
          default: v = 0; break;
        }
        if (s == kClock64 || s == kGridId)
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
  std::vector<u32> joined(warps.size(), 0);
  for (Warp& w : warps)
    if (b.waiting >> w.index & 1)
      for (size_t i = 0; i < joined.size(); ++i) joined[i] = std::max(joined[i], w.clock[i]);
  // What the members did up to here happens before what they do from now on: their clocks move on, and each of them
  // knows the others' new times.
  for (const Warp& w : warps)
    if (b.waiting >> w.index & 1) joined[static_cast<size_t>(w.index)] = w.clock[static_cast<size_t>(w.index)] + 1;
  for (Warp& w : warps) {
    if (!(b.waiting >> w.index & 1)) continue;
    w.clock = joined;
    w.barrier = -1;
  }
  b = {};
}

void Cta::run() {
  std::mt19937_64 random(launch.options.seed * 0x9e3779b97f4a7c15ull + linear);
  std::vector<int> order(warps.size());
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    if (launch.options.seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool ran = false, alive = false;
    for (int i : order) {
      Warp& w = warps[static_cast<size_t>(i)];
      if (!w.live) continue;
      alive = true;
      if (w.barrier >= 0) continue;
      ran = true;
      w.run(kQuantum);
    }
    if (!alive) break;
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
        const Op& at = program.ops[w.pc - 1];
        const int line = at.source < 0 ? 0 : program.function.body[static_cast<size_t>(at.source)].line;
        waiting += (first ? "; " : "") + ("warp " + std::to_string(w.index)) + " at PTX line " + std::to_string(line);
        if (first == nullptr) first = &w;
      }
      first->raise(program.ops[first->pc - 1], std::countr_zero(first->live), "deadlock",
                   "deadlock: warps wait for each other: " + waiting);
    }
  }
  for (const Warp& w : warps) launch.instructions += w.executed;
}

// ---- launches
std::string Launch::resolve_symbols() {
  registers = program.registers;
  for (const Fixup& f : program.fixups) {
    u64 address = 0;
    const auto shared = program.shared_offsets.find(f.symbol);
    const auto region =
        std::find_if(regions.begin(), regions.end(), [&](const Region& r) { return r.name == f.symbol; });
    if (shared != program.shared_offsets.end())
      address = shared->second;
    else if (region != regions.end())
      address = region->base;
    else
      return "unsupported: symbol " + f.symbol;
    address += static_cast<u64>(f.offset);
    for (u32 l = 0; l < kLanes; ++l) memcpy(&registers[f.value + (f.wide ? 8 : 4) * l], &address, f.wide ? 8 : 4);
  }
  return "";
}

void Launch::run() {
  const u64 total = static_cast<u64>(grid[0]) * grid[1] * grid[2];
  counters.assign(program.ops.size(), {});
  std::vector<u32> shuffled;
  if (options.order == "random") {
    shuffled.resize(total);
    std::iota(shuffled.begin(), shuffled.end(), 0);
    std::mt19937_64 random(options.seed);
    std::shuffle(shuffled.begin(), shuffled.end(), random);
  }
  for (Region& r : regions) {
    r.touched.assign(r.size, 0);
    if (options.races && !program.synchronises_ctas && !r.constant) {
      r.writer.assign(r.size, 0);
      r.reader.assign(r.size, 0);
    }
  }
  const std::string unknown = resolve_symbols();
  if (!unknown.empty()) {
    Fault f("unsupported", unknown);
    f.op = ~0u;
    faults.push_back(f);
    return;
  }
  Cta cta(*this);
  try {
    for (u64 i = 0; i < total; ++i) {
      cta.start(!shuffled.empty() ? shuffled[i] : static_cast<u32>(options.order == "reverse" ? total - 1 - i : i));
      cta.run();
    }
  } catch (const Fault& f) {
    faults.push_back(f);
  }
  // Fresh outputs must be written completely.
  for (const Region& r : regions) {
    if (r.valid.empty() || !faults.empty()) continue;
    const auto at = std::find(r.valid.begin(), r.valid.end(), 0);
    if (at != r.valid.end()) {
      Fault f("uninitialised", "uninitialised output: byte " + std::to_string(at - r.valid.begin()) + " of " + r.name +
                                   " (" + std::to_string(std::count(r.valid.begin(), r.valid.end(), 0)) + " of " +
                                   std::to_string(r.size) + " bytes) is never written");
      f.op = ~0u;
      f.region = r.name;
      faults.push_back(f);
    }
  }
}

}  // namespace gpusim
