// How a warp goes through a program: splits, calls, lanes that wait for each other, barriers of the CTA.
// Source: PTX ISA 8.8, sections 3.1 (threads of a warp), 7 (calls, local memory) and 9.7.12 (control flow).
#include <algorithm>

#include "gpusim/machine.h"

namespace gpusim {

namespace {

constexpr u64 kDefaultBudget = 2'000'000'000;
constexpr u32 kPatience = 2000;       // jumps back of a split before another has its turn
constexpr u64 kMaxStack = 512 << 10;  // bytes of local memory of a lane

template <class F>
void for_lanes(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

}  // namespace

// ---- splits
void Warp::reselect() {
  if (splits.empty()) return;
  if (active) splits.push_back({pc, active, depth, false});
  if (std::all_of(splits.begin(), splits.end(), [](const Split& s) { return s.yields; }))
    for (Split& s : splits) s.yields = false;
  const Split* best = nullptr;
  for (const Split& s : splits)
    if (!s.yields && (best == nullptr || s.depth > best->depth || (s.depth == best->depth && s.pc < best->pc)))
      best = &s;
  pc = best->pc, depth = best->depth, active = 0;
  std::erase_if(splits, [&](const Split& s) {  // equal places merge
    const bool same = s.pc == pc && s.depth == depth;
    if (same) active |= s.mask;
    return same;
  });
}

void Warp::yield() {
  spins = 0;
  if (splits.empty()) return;
  splits.push_back({pc, active, depth, true});
  active = 0;
  reselect();
}

void Warp::branch(const Op& op, u32 taken, u32 target) {
  const u32 stays = active & ~taken;
  if (stays == 0) {
    pc = target;
  } else if (taken == 0) {
    pc += 1;
  } else {
    splits.push_back({target, taken, depth, false});
    active = stays;
    pc += 1;
  }
  reselect();
  if (taken && target <= op.index && ++spins > kPatience) yield();
}

void Warp::jump_by_table(const Op& op, u32 mask) {
  const auto& table = cta->program.tables[static_cast<size_t>(op.imm)];
  const u32* index = reg<u32>(op, 0);
  require_valid(op, op.regs[0], mask, 0x0f, "a branch");
  const u32 stays = active & ~mask;
  for_lanes(mask, [&](int l) {
    if (index[l] >= table.size())
      raise(op, l, "out of bounds",
            "out of bounds: target " + std::to_string(index[l]) + " of a branch with " + std::to_string(table.size()));
    splits.push_back({table[index[l]], 1u << l, depth, false});
  });
  active = stays;
  pc += 1;
  reselect();
}

void Warp::exit(u32 mask) {
  live &= ~mask;
  active &= ~mask;
  if (active) pc += 1;
  reselect();
  // Those who wait for the lanes that are gone need not wait any more.
  for (size_t i = 0; i < parked.size(); ++i) {
    const Parked p = parked[i];
    const size_t before = parked.size();
    complete(p.op->meeting, p.named);
    if (parked.size() != before) i = static_cast<size_t>(-1);
  }
}

// ---- calls
void Warp::call(const Op& op, u32 mask) {
  const CallSite& site = cta->program.call_sites[static_cast<size_t>(op.imm)];
  if (site.builtin != Builtin::kNone) {
    for_lanes(mask, [&](int l) {
      switch (site.builtin) {
        case Builtin::kPrint: print(op, l); break;
        case Builtin::kAllocate: allocate(op, l); break;
        case Builtin::kFree: free(op, l); break;
        default: fail_assertion(op, l);
      }
    });
    pc += 1;
    return;
  }
  const u32 stays = active & ~mask;
  if (stays) splits.push_back({pc + 1, stays, depth, false});
  active = 0;
  if (site.code >= 0) {
    enter(op, mask, site.code);
  } else {
    const u64* address = reg<u64>(op, 0);
    require_valid(op, op.regs[0], mask, 0xff, "the address of a call");
    for (u32 left = mask; left;) {
      const int lane = std::countr_zero(left);
      u32 same = 0;
      for_lanes(left, [&](int l) { same |= static_cast<u32>(address[l] == address[lane]) << l; });
      left &= ~same;
      const Module& module = cta->program.module;
      const u64 index = (address[lane] - kCodeWindow) / 16 - 1;
      if (address[lane] <= kCodeWindow || address[lane] % 16 != 0 || index >= module.functions.size() ||
          module.functions[index].entry)
        raise(op, lane, "out of bounds", "out of bounds: a call of an address that is no function", address[lane]);
      const auto& codes = cta->program.codes;
      const auto code = std::find_if(codes.begin(), codes.end(),
                                     [&](const Code& c) { return c.function == &module.functions[index]; });
      if (code == codes.end())
        raise(op, lane, "unsupported",
              "unsupported: a call of " + module.functions[index].name + ", which this kernel's text does not name");
      enter(op, same, static_cast<int>(code - codes.begin()));
    }
  }
  reselect();
}

void Warp::enter(const Op& op, u32 mask, int index) {
  const CallSite& site = cta->program.call_sites[static_cast<size_t>(op.imm)];
  const Code& code = cta->program.codes[static_cast<size_t>(index)];
  if (code.params.size() != site.arguments.size() || (site.result.second != 0) != (code.result.second != 0))
    raise(op, std::countr_zero(mask), "unsupported",
          "unsupported: a call of " + code.function->name + " with other parameters than its own");
  for_lanes(mask, [&](int l) {
    Stack& s = stacks[static_cast<size_t>(l)];
    Frame frame{op.index, s.base, s.top, index, {}};
    if (std::any_of(s.frames.begin(), s.frames.end(), [&](const Frame& f) { return f.code == index; })) {
      for (const auto& [r, bytes] : code.registers) {
        const u32 cell = bytes / 32;  // a predicate is one word for all lanes, kept whole here
        const u8* from = file + r.value + (bytes == 64 ? 0 : cell * static_cast<u32>(l));
        frame.saved.insert(frame.saved.end(), from, from + (bytes == 64 ? 4 : cell));
        frame.saved.push_back(partial[r.id] ? valid[r.id][static_cast<size_t>(l)] : 0xff);
      }
    }
    // A frame takes 16 bytes at least, as a return address does on a GPU.
    const u64 base = (s.top + 31ull) / 16 * 16, top = base + code.frame_bytes;
    s.saved += frame.saved.size();
    if (top + s.saved > kMaxStack)
      raise(op, l, "out of bounds",
            "out of bounds: the stack of a thread, " + std::to_string(top) +
                " bytes of local "
                "memory in " +
                std::to_string(s.frames.size() + 1) + " calls");
    if (s.memory.size() < top) s.memory.resize(top), s.valid.resize(top);
    std::fill(s.valid.begin() + static_cast<std::ptrdiff_t>(base), s.valid.begin() + static_cast<std::ptrdiff_t>(top),
              0);
    for (size_t i = 0; i < site.arguments.size(); ++i) {
      const u64 n = std::min(site.arguments[i].second, code.params[i].second);
      memcpy(&s.memory[base + code.params[i].first], &s.memory[s.base + site.arguments[i].first], n);
      memcpy(&s.valid[base + code.params[i].first], &s.valid[s.base + site.arguments[i].first], n);
    }
    s.frames.push_back(std::move(frame));
    s.base = static_cast<u32>(base), s.top = static_cast<u32>(top);
    for (const auto& [r, offset] : code.addresses) reinterpret_cast<u64*>(file + r.value)[l] = base + offset;
  });
  splits.push_back({code.begin, mask, depth + 1, false});
}

void Warp::leave(u32 mask) {
  if (depth == 0) return exit(mask);
  const u32 stays = active & ~mask;
  if (stays) splits.push_back({pc + 1, stays, depth, false});
  active = 0;
  for_lanes(mask, [&](int l) {
    Stack& s = stacks[static_cast<size_t>(l)];
    const Frame frame = std::move(s.frames.back());
    s.frames.pop_back();
    const Code& code = cta->program.codes[static_cast<size_t>(frame.code)];
    const CallSite& site = cta->program.call_sites[static_cast<size_t>(cta->program.ops[frame.call].imm)];
    const u64 n = std::min(site.result.second, code.result.second);
    memcpy(&s.memory[frame.base + site.result.first], &s.memory[s.base + code.result.first], n);
    memcpy(&s.valid[frame.base + site.result.first], &s.valid[s.base + code.result.first], n);
    s.base = frame.base, s.top = frame.top;
    s.saved -= frame.saved.size();
    size_t at = 0;
    if (!frame.saved.empty()) {
      for (const auto& [r, bytes] : code.registers) {
        const u32 cell = bytes / 32;
        if (bytes == 64) {
          u32 old, bit = 1u << l;
          memcpy(&old, &frame.saved[at], 4);
          u32& now = *reinterpret_cast<u32*>(file + r.value);
          now = (now & ~bit) | (old & bit);
        } else {
          memcpy(file + r.value + cell * static_cast<u32>(l), &frame.saved[at], cell);
        }
        at += bytes == 64 ? 4 : cell;
        const u8 was = frame.saved[at++];
        if (was != 0xff && !partial[r.id]) partial[r.id] = 1, valid[r.id].fill(0xff);
        if (partial[r.id]) valid[r.id][static_cast<size_t>(l)] = was;
      }
    }
    splits.push_back({frame.call + 1, 1u << l, depth - 1, false});
  });
  reselect();
}

// ---- built in functions of CUDA's
namespace {

u64 argument(const Warp& w, const Op& op, int lane, size_t i) {
  const auto& [offset, bytes] = w.cta->program.call_sites[static_cast<size_t>(op.imm)].arguments[i];
  const Stack& s = w.stacks[static_cast<size_t>(lane)];
  u64 v = 0;
  memcpy(&v, s.memory.data() + s.base + offset, std::min<u64>(bytes, 8));
  return v;
}

// Bytes at a generic address, as far as there are any.
std::string bytes_at(Warp& w, int lane, u64 address, u64 count) {
  if (address >> kWindowShift == kLocalWindow >> kWindowShift) {
    const auto& memory = w.stacks[static_cast<size_t>(lane)].memory;
    const u64 at = address & (kLocalWindow - 1);
    return at >= memory.size()
               ? ""
               : std::string(memory.begin() + static_cast<std::ptrdiff_t>(at),
                             memory.begin() + static_cast<std::ptrdiff_t>(std::min<u64>(at + count, memory.size())));
  }
  const Region* r = w.cta->launch.region_of(address);
  if (r == nullptr || address - r->base >= r->size) return "";
  const u64 at = address - r->base;
  return {reinterpret_cast<const char*>(r->host) + at, std::min(count, r->size - at)};
}
std::string text_at(Warp& w, int lane, u64 address) {
  const std::string bytes = bytes_at(w, lane, address, 4096);
  return bytes.substr(0, bytes.find('\0'));
}

}  // namespace

namespace {

void set_result(Warp& w, const Op& op, int lane, u64 value) {
  const auto& [offset, bytes] = w.cta->program.call_sites[static_cast<size_t>(op.imm)].result;
  Stack& s = w.stacks[static_cast<size_t>(lane)];
  memcpy(s.memory.data() + s.base + offset, &value, std::min<u64>(bytes, 8));
  std::fill_n(s.valid.begin() + s.base + static_cast<std::ptrdiff_t>(offset), bytes, u8{1});
}

}  // namespace

// vprintf(format, arguments one behind the other, each at a multiple of its size)
void Warp::print(const Op& op, int lane) {
  const std::string format = text_at(*this, lane, argument(*this, op, lane, 0));
  const u64 values = argument(*this, op, lane, 1);
  std::string out;
  u64 offset = 0;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    // Flags, width, precision, length, conversion; what is none of these is text.
    const size_t length = format.find_first_not_of("-+ #0123456789.*", i + 1);
    const size_t end = length == std::string::npos ? length : format.find_first_not_of("hlzjt", length);
    if (end == std::string::npos || strchr("diouxXfFeEgGaAcsp%", format[end]) == nullptr) {
      out += format[i];
      continue;
    }
    std::string spec = format.substr(i, end - i + 1);
    i = end;
    const char kind = spec.back();
    if (kind == '%') {
      out += '%';
      continue;
    }
    const auto next = [&](u64 bytes) {
      offset = (offset + bytes - 1) / bytes * bytes;
      const std::string raw = bytes_at(*this, lane, values + offset, bytes);
      offset += bytes;
      u64 v = 0;
      memcpy(&v, raw.data(), raw.size());
      return v;
    };
    for (size_t star; (star = spec.find('*')) != std::string::npos;) {  // a width or a precision among the arguments
      const int n = std::clamp(static_cast<i32>(next(4)), -400, 400);
      const bool none = n < 0 && spec[star - 1] == '.';
      if (none)
        spec.erase(star - 1, 2);
      else
        spec.replace(star, 1, std::to_string(n));
    }
    const bool number = strchr("fFeEgGaA", kind) != nullptr, text = kind == 's';
    const bool wide = number || text || kind == 'p' || spec.find_first_of("lzjt") != std::string::npos;
    u64 v = next(wide ? 8 : 4);
    if (!wide && (kind == 'd' || kind == 'i')) v = static_cast<u64>(static_cast<i64>(static_cast<i32>(v)));
    std::erase_if(spec, [](char c) { return strchr("lzjth", c) != nullptr; });
    char buffer[512];
    if (number)
      snprintf(buffer, sizeof(buffer), spec.c_str(), bits_as<double>(v));
    else if (text)
      snprintf(buffer, sizeof(buffer), spec.c_str(), text_at(*this, lane, v).c_str());
    else if (kind == 'c')
      snprintf(buffer, sizeof(buffer), spec.c_str(), static_cast<int>(v));
    else
      snprintf(buffer, sizeof(buffer),
               (spec.substr(0, spec.size() - 1) + (kind == 'p' ? "#llx" : "ll" + std::string(1, kind))).c_str(),
               static_cast<unsigned long long>(v));
    out += buffer;
  }
  cta->worker.output += out;
  set_result(*this, op, lane, 0);
}

// malloc(bytes): 0 where there is no room
void Warp::allocate(const Op& op, int lane) {
  Launch& launch = cta->launch;
  Region& r = *std::find_if(launch.regions.begin(), launch.regions.end(), [](const Region& x) { return x.heap; });
  const u64 bytes = argument(*this, op, lane, 0), offset = r.heap->allocate(bytes);
  if (offset == ~0ull) return set_result(*this, op, lane, 0);
  // Who had these bytes before has no part in them.
  if (r.valid.empty()) r.valid.assign(r.size, 1);
  std::fill_n(r.valid.begin() + static_cast<std::ptrdiff_t>(offset), bytes, 0);
  Shadow& s = cta->worker.shadow(r);
  if (!s.followed) return set_result(*this, op, lane, r.base + offset);
  s.divide(offset, bytes);
  for (auto* history : {&s.writer, &s.reader})
    std::fill_n(history->begin() + static_cast<std::ptrdiff_t>(offset), bytes, 0);
  set_result(*this, op, lane, r.base + offset);
}

// free(pointer)
void Warp::free(const Op& op, int lane) {
  const u64 address = argument(*this, op, lane, 0);
  if (address == 0) return;
  const Region* r = cta->launch.region_of(address);
  if (r == nullptr || r->heap == nullptr || r->heap->blocks.erase(address - r->base) == 0)
    fault(op, lane, "out of bounds",
          "out of bounds: free of a pointer that malloc did not give, or of one freed before", address, r);
}

// __assertfail(message, file, line, function, bytes of a character)
void Warp::fail_assertion(const Op& op, int lane) {
  raise(op, lane, "trap",
        "trap: assertion failed: " + text_at(*this, lane, argument(*this, op, lane, 0)) + ", " +
            text_at(*this, lane, argument(*this, op, lane, 1)) + ":" +
            std::to_string(static_cast<u32>(argument(*this, op, lane, 2))) + ", " +
            text_at(*this, lane, argument(*this, op, lane, 3)));
}

// ---- lanes that meet
// An operation with a member mask: it happens when every live lane that the mask names has come, here or at another
// operation of the same kind with the same mask.
void Warp::meet(const Op& op, u32 mask) {
  const Reg& members = op.regs[op.num_dst + op.num_src - 1];
  const bool all = op.aligned;
  if (!all) require_valid(op, members, mask, 0x0f, "a member mask");
  const u32* masks = reinterpret_cast<const u32*>(file + members.value);
  const u32 here = pc;
  u32 waits = 0;
  for (u32 left = mask; left;) {
    const int first = std::countr_zero(left);
    const u32 named = all ? kAllLanes : masks[first];
    u32 same = 0;
    if (all)
      same = left;
    else
      for_lanes(left, [&](int l) { same |= static_cast<u32>(masks[l] == named) << l; });
    left &= ~same;
    if (same & ~named)
      raise(op, std::countr_zero(same & ~named), "barrier", "barrier divergence: a lane that the mask does not name");
    if ((all ? named & ~same : named & live & ~same) == 0) {
      op.exec(*this, op, same);
    } else {
      if (all && live != kAllLanes)
        raise(op, std::countr_zero(~live), "barrier",
              "barrier divergence: lanes of the warp have ended that this instruction needs");
      parked.push_back({&op, same, named, depth});
      waits |= same;
    }
  }
  active &= ~waits;
  if (active) pc = here + 1;
  if (waits == 0) return;
  for_lanes(waits, [&](int l) {
    for (const Parked& p : parked)
      if (p.mask >> l & 1) return complete(p.op->meeting, p.named);
  });
  if (active == 0) reselect();
}

// Executes what is parked under this number for these lanes, if none is missing.
void Warp::complete(u32 number, u32 named) {
  u32 here = 0, at_barrier = 0;
  const Op* of[kLanes] = {};
  const Op* first = nullptr;
  bool single = true;
  for (const Parked& p : parked) {
    if (p.op->meeting != number || p.named != named) continue;
    here |= p.mask;
    at_barrier |= static_cast<u32>(p.op->flow == Flow::kBarrier);
    single = single && (first == nullptr || first == p.op);
    if (first == nullptr) first = p.op;
    for_lanes(p.mask, [&](int l) { of[l] = p.op; });
  }
  if (first == nullptr) return;
  const u32 need = at_barrier || !first->aligned ? named & live : kAllLanes;
  if (need & ~here) return;
  std::vector<Split> go_on;
  std::erase_if(parked, [&](const Parked& p) {
    const bool goes = p.op->meeting == number && p.named == named;
    if (goes) go_on.push_back({p.op->index + 1, p.mask, p.depth, false});
    return goes;
  });
  if (!single) meeting = of;
  if (at_barrier)
    arrive(*first, here);
  else
    first->exec(*this, *first, here);
  meeting = nullptr;
  splits.insert(splits.end(), go_on.begin(), go_on.end());
  if (active == 0) reselect();
}

void Warp::stuck() {
  const Parked& p = parked.front();
  const u32 need = p.named & live & ~p.mask;
  const int lane = std::countr_zero(p.mask);
  std::string where;
  for (const Parked& other : parked) {
    const Instruction* in = cta->program.instruction(other.op->index);
    if (&other != &p && in != nullptr) where += (where.empty() ? "" : ", ") + std::to_string(in->line);
  }
  raise(*p.op, lane, "barrier",
        "barrier divergence: live lanes of the warp are elsewhere" +
            (need ? ", lane " + std::to_string(std::countr_zero(need)) + " among them" : "") +
            (where.empty() ? "" : "; others wait at PTX line " + where));
}

// ---- barriers of the CTA
// All lanes of the warp are here: it arrives.
void Warp::arrive(const Op& op, u32 mask) {
  for_each_op(*this, op, mask, [&](const Op& o, u32 m) {
    for (int i = o.num_dst; i < o.num_dst + o.num_src; ++i)
      if (!(o.votes && i == o.num_dst + o.num_src - 1)) require_valid(o, o.regs[i], m, 0x0f, "a barrier's operand");
  });
  const int lane = std::countr_zero(mask);
  const u32 all = static_cast<u32>(cta->warps.size()) * kLanes;
  u32 id = 0, expected = 0;
  bool first = true;
  for_each_op(*this, op, mask, [&](const Op& o, u32 m) {
    const bool own_counts = o.num_src - (o.votes ? 1 : 0) > 1;
    for_lanes(m, [&](int l) {
      u32 own_id = reg<u32>(o, o.num_dst)[l], own = own_counts ? reg<u32>(o, o.num_dst + 1)[l] : 0;
      if (own == all) own = 0;  // which is what no number means
      if (first) id = own_id, expected = own, first = false;
      if (own_id != id || own != expected)
        raise(o, l, "barrier", "barrier divergence: lanes of a warp wait at different barriers");
    });
  });
  if (id >= cta->barriers.size()) raise(op, lane, "barrier", "barrier " + std::to_string(id) + " does not exist");
  if (time() >= kMaxTime) raise(op, 0, "unsupported", "unsupported: more than a million barriers and releases");
  // A barrier behind a strong read is taken for an acquire: CUTLASS's locks have no fence there.
  learn(seen);
  seen = nullptr;
  Barrier& b = cta->barriers[id];
  if (expected % kLanes != 0)
    raise(op, lane, "barrier", "barrier of " + std::to_string(expected) + " threads, which is no multiple of 32");
  if (b.members && b.expected != expected)
    raise(op, lane, "barrier", "barrier " + std::to_string(id) + ": warps wait for different numbers of threads");
  b.expected = expected;
  b.arrived += kLanes;
  b.members |= 1ull << index;
  if (op.votes) {
    for_each_op(*this, op, mask, [&](const Op& o, u32 m) {
      const Reg& p = o.regs[o.num_dst + o.num_src - 1];
      require_valid(o, p, m, 1, "a vote");
      const u32 bits = (*reinterpret_cast<u32*>(file + p.value) ^ (o.imm & 4 ? kAllLanes : 0)) & m;
      b.votes += static_cast<u32>(std::popcount(bits));
      b.voters += static_cast<u32>(std::popcount(m));
    });
  }
  if (op.arrives) {
    b.clock.resize(cta->warps.size());
    for (size_t i = 0; i < b.clock.size(); ++i) b.clock[i] = std::max(b.clock[i], clock[i]);
    b.foreign = join(b.foreign, foreign);
    b.clock[static_cast<size_t>(index)] = clock[static_cast<size_t>(index)] += 1;
  } else {
    b.waiting |= 1ull << index;
    barrier = static_cast<int>(id);
    barrier_op = &op;
  }
  if (expected != 0 && b.arrived == expected) cta->release(static_cast<int>(id));  // the next to come begin anew
}

void Warp::run(u64 quantum) {
  const Program& program = cta->program;
  const Op* ops = program.ops.data();
  const u64 budget = cta->launch.options.budget ? cta->launch.options.budget : kDefaultBudget;
  const u64 until = executed + quantum;
  while (live && barrier < 0) {
    if (executed >= until) return;
    if (active == 0) {
      reselect();
      if (active == 0) stuck();
    }
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
    if (op.flow == Flow::kNext) {
      if (mask) {
        propagate(op, mask);  // before the sources may be overwritten
        op.exec(*this, op, mask);
      }
      pc += 1;
      continue;
    }
    if (op.flow == Flow::kBranch) {
      branch(op, mask, op.target);
      continue;
    }
    if (mask == 0) {
      pc += 1;
      continue;
    }
    switch (op.flow) {
      case Flow::kTable: jump_by_table(op, mask); break;
      case Flow::kCall: call(op, mask); break;
      case Flow::kReturn: leave(mask); break;
      case Flow::kExit: exit(mask); break;
      case Flow::kYield:
        op.exec(*this, op, mask);
        pc += 1;
        yield();
        break;
      case Flow::kMeet: meet(op, mask); break;
      default:  // a barrier
        if (mask == live) {
          arrive(op, mask);
          pc += 1;
        } else {
          const u32 left = active & ~mask;
          parked.push_back({&op, mask, kAllLanes, depth});
          active = left;
          pc += 1;
          complete(op.meeting, kAllLanes);
          if (active == 0) reselect();
        }
    }
  }
}

}  // namespace gpusim
