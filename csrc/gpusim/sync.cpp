// Order: who wrote and read each byte last, what happens before what, and the instructions that make order: fences,
// barriers, asynchronous copies' barriers. Source: PTX ISA 8.8, sections 8 (memory consistency), 9.7.13.1-4 (bar,
// membar, fence) and 9.7.13.15 (mbarrier).
//
// Not found: a plain write to bytes of a tensor that several warps of the same CTA read before, unordered (the last
// reader alone is kept).
#include <algorithm>
#include <utility>

#include "gpusim/machine.h"

namespace gpusim {

void Warp::wait_copies(u32 mask, u32 keep) {
  size_t left = 0;
  for (const PendingCopy& copy : copies) {
    const u32 committed = copy_groups[copy.lane];
    const bool all = keep == ~0u;
    // Groups that are committed and older than the `keep` newest ones are complete.
    const bool done = mask >> copy.lane & 1 && (all || (copy.group < committed && committed - copy.group > keep));
    if (done)
      cta->end_copy(*this, copy);
    else
      copies[left++] = copy;
  }
  copies.resize(left);
}

namespace {

u32 warp_of(u32 stamp) { return stamp >> 5 & 63; }
u32 time_of(u32 stamp) { return stamp >> 12; }

// Does what the stamp tells of happen before `w` now, in lane `lane`?
[[gnu::always_inline]] inline bool before(const Warp& w, int lane, u32 stamp) {
  const u32 other = warp_of(stamp);
  if (other != static_cast<u32>(w.index)) return time_of(stamp) < w.clock[other];
  const bool own_lane = !(stamp & kSeveral) && (stamp & 31) == static_cast<u32>(lane);
  return own_lane || time_of(stamp) < w.converged;
}

std::string who(u32 stamp) {
  return "warp " + std::to_string(warp_of(stamp)) + (stamp & kSeveral ? "" : " lane " + std::to_string(stamp & 31));
}

void race(Warp& w, const Op& op, int lane, u32 byte, const std::string& what, u32 other_op) {
  w.fault(op, lane, "race", "race: shared byte " + std::to_string(byte) + " " + what, byte, nullptr, other_op);
}

}  // namespace

// ---- shared memory
void Readers::start(size_t number_of_warps) {
  warps = number_of_warps;
  times.assign(warps, 0);  // set 0 has no members
  grown.clear();
  last = {};
}

u32 Readers::add(u32 set, u32 warp, u32 time) {
  Step& step = last[warp];
  const u64 key = static_cast<u64>(set) << 32 | static_cast<u64>(warp) << 26 | (time + 1);
  if (step.key == key) return step.to;
  const auto [at, fresh] = grown.try_emplace(key, static_cast<u32>(times.size() / warps));
  if (fresh) {
    times.resize(times.size() + warps);
    std::copy_n(times.begin() + static_cast<std::ptrdiff_t>(set * warps), warps,
                times.end() - static_cast<std::ptrdiff_t>(warps));
    times[times.size() - warps + warp] = time + 1;
  }
  step = {key, at->second};
  return step.to;
}

constexpr u32 part_bytes(u32 whole) { return whole == 16 ? 4 : whole / 2; }

template <u32 kBytes>
History* Cta::parts_of(u32 offset) {
  constexpr u32 kPart = part_bytes(kBytes);
  std::vector<History>& all = kPart == 4 ? words : kPart == 2 ? halves : bytes;
  if (all.empty()) all.resize(units.size() * 16 / kPart);
  return &all[offset / kBytes * (kBytes / kPart)];
}

template <u32 kBytes>
History* Cta::split(History& whole, u32 offset) {
  History* parts = parts_of<kBytes>(offset);
  if (!whole.split) {
    std::fill_n(parts, kBytes / part_bytes(kBytes), whole);
    whole.split = true;
  }
  return parts;
}

// Whether all that this history tells happens before whatever is to come: it may as well tell nothing.
template <u32 kBytes>
bool Cta::is_settled(const History& h, u32 offset) {
  if constexpr (kBytes > 1) {
    if (h.split) {
      constexpr u32 kPart = part_bytes(kBytes);
      const History* parts = parts_of<kBytes>(offset);
      for (u32 i = 0; i < kBytes / kPart; ++i)
        if (!is_settled<kPart>(parts[i], offset + i * kPart)) return false;
      return true;
    }
  }
  const auto passed = [&](u32 stamp) { return stamp == 0 || time_of(stamp) < settled[warp_of(stamp)]; };
  if (h.in_flight || !passed(h.writer) || !passed(h.reader)) return false;
  for (size_t i = 0; i < warps.size() && h.others; ++i)
    if (readers.times[h.others * warps.size() + i] > settled[i]) return false;
  return true;
}

template <u32 kBytes, class F>
bool Cta::for_each_part(History& whole, u32 offset, u32 end, F f) {
  constexpr u32 kPart = part_bytes(kBytes), kParts = kBytes / kPart;
  History* parts = split<kBytes>(whole, offset);
  const bool of_all = end - offset == kBytes;
  while (offset < end) {
    History& h = parts[offset / kPart % kParts];
    const u32 next = std::min(end, (offset / kPart + 1) * kPart);
    if constexpr (kPart > 1) {
      if (h.split && next - offset == kPart && is_settled<kPart>(h, offset)) h = {};
      if (h.split || next - offset < kPart) {
        if (!for_each_part<kPart>(h, offset, next, f)) return false;
        offset = next;
        continue;
      }
    }
    if (!f(h, offset, kPart)) return false;
    offset = next;
  }
  // Parts that a write has made alike are one again.
  const History& first = parts[0];
  if (of_all && first.reader == 0 && !first.split &&
      std::all_of(parts + 1, parts + kParts, [&](const History& h) { return h == first; }))
    whole = first;
  return true;
}

template <class F>
void Cta::for_each_history(u32 offset, u32 count, F f) {
  for (const u32 end = offset + count; offset < end;) {
    History& h = units[offset / 16];
    const u32 next = std::min(end, (offset / 16 + 1) * 16);
    const bool whole = next - offset == 16;
    if (h.split && whole && is_settled<16>(h, offset)) h = {};
    if (!h.split && whole ? !f(h, offset, 16u) : !for_each_part<16>(h, offset, next, f)) return;
    offset = next;
  }
}

// The histories of an access, two of 8 bytes; nullptr where they are split further.
template <u32 kBytes>
History* Cta::histories_of(u32 offset) {
  History& unit = units[offset / 16];
  if constexpr (kBytes == 16) return unit.split ? nullptr : &unit;
  History* word = split<16>(unit, offset) + offset / 4 % 4;
  if constexpr (kBytes == 8) return word[0].split || word[1].split ? nullptr : word;
  if constexpr (kBytes == 4) return word->split ? nullptr : word;
  History* half = split<4>(*word, offset) + offset / 2 % 2;
  if constexpr (kBytes == 2) return half->split ? nullptr : half;
  return split<2>(*half, offset) + offset % 2;
}

// What a read leaves in a history; false where it races with what is there.
inline bool Cta::note_read(const Warp& w, const Op& op, int lane, History& h) {
  if (h.in_flight) return false;
  if (h.writer != 0 && !before(w, lane, h.writer) && !(op.strong && program.ops[h.writer_op].strong)) return false;
  const u32 me = stamp_of(w.time(), static_cast<u32>(w.index), static_cast<u32>(lane)), old = h.reader;
  if (old == me) return true;
  if (old != 0 && warp_of(old) == static_cast<u32>(w.index)) {
    h.reader = time_of(old) == w.time() ? old | kSeveral : me;
    h.reader_op = op.index;
  } else if (old == 0 || before(w, lane, old)) {
    h.reader = me;
    h.reader_op = op.index;
  } else {
    h.others = readers.add(h.others, static_cast<u32>(w.index), w.time());
    h.plain |= !op.strong;
  }
  return true;
}

void Cta::read_shared(Warp& w, const Op& op, int lane, u32 offset, u32 count) {
  if (!launch.options.races) return;
  for_each_history(offset, count, [&](History& h, u32 first, u32) {
    if (note_read(w, op, lane, h)) return true;
    race(w, op, lane, first,
         h.in_flight ? "is read while an asynchronous copy to it is in flight"
                     : "was written by " + who(h.writer) + " and is read with no barrier between",
         h.writer_op);
    return false;
  });
}

template <u32 kBytes>
void Cta::read_lanes(Warp& w, const Op& op, u32 mask, const u64* offsets) {
  if (!launch.options.races) return;
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    const u32 offset = static_cast<u32>(offsets[lane]);
    History* h = histories_of<kBytes>(offset);
    if (h == nullptr || !note_read(w, op, lane, h[0]) || (kBytes == 8 && !note_read(w, op, lane, h[1])))
      read_shared(w, op, lane, offset, kBytes);
  }
}

// Marks what a lane writes and gives its histories; nullptr, with nothing done, where there is more to be said of it.
template <u32 kBytes>
History* Cta::note_write(const Warp& w, const Op& op, int lane, u32 offset) {
  History* h = launch.options.races ? histories_of<kBytes>(offset) : nullptr;
  if (h == nullptr) return nullptr;
  constexpr u32 kCount = kBytes == 8 ? 2 : 1;
  for (u32 i = 0; i < kCount; ++i)
    if (h[i].serial == serial || h[i].in_flight || h[i].others || (h[i].writer && !before(w, lane, h[i].writer)) ||
        (h[i].reader && !before(w, lane, h[i].reader)))
      return nullptr;
  for (u32 i = 0; i < kCount; ++i) {
    h[i].reader = 0;
    h[i].writer = stamp_of(w.time(), static_cast<u32>(w.index), static_cast<u32>(lane));
    h[i].writer_op = op.index;
    h[i].serial = serial;
  }
  return h;
}

template <u32 kBytes>
void Cta::write_lanes(Warp& w, const Op& op, u32 mask, const u64* offsets, const u8 (*data)[16], bool highest) {
  u8 valid[kBytes];
  memset(valid, 1, kBytes);
  while (mask) {
    const int lane = highest ? 31 - std::countl_zero(mask) : std::countr_zero(mask);
    mask &= ~(1u << lane);
    const u32 offset = static_cast<u32>(offsets[lane]);
    if (note_write<kBytes>(w, op, lane, offset) == nullptr) {
      write_shared(w, op, lane, offset, data[lane], valid, kBytes);
      continue;
    }
    memcpy(&shared[offset], data[lane], kBytes);
    memcpy(&shared_valid[offset], valid, kBytes);
  }
}

void Cta::read_shared(Warp& w, const Op& op, u32 mask, const u64* offsets, u32 count) {
  switch (count) {
    case 1: return read_lanes<1>(w, op, mask, offsets);
    case 2: return read_lanes<2>(w, op, mask, offsets);
    case 4: return read_lanes<4>(w, op, mask, offsets);
    case 8: return read_lanes<8>(w, op, mask, offsets);
    default: return read_lanes<16>(w, op, mask, offsets);
  }
}

void Cta::write_shared(Warp& w, const Op& op, u32 mask, const u64* offsets, const u8 (*data)[16], u32 count,
                       bool highest) {
  switch (count) {
    case 1: return write_lanes<1>(w, op, mask, offsets, data, highest);
    case 2: return write_lanes<2>(w, op, mask, offsets, data, highest);
    case 4: return write_lanes<4>(w, op, mask, offsets, data, highest);
    case 8: return write_lanes<8>(w, op, mask, offsets, data, highest);
    default: return write_lanes<16>(w, op, mask, offsets, data, highest);
  }
}

bool Cta::change(Warp& w, const Op& op, int lane, History& h, u32 first, bool writers_agree, const char* verb) {
  if (h.in_flight) {
    race(w, op, lane, first, std::string("is ") + verb + " while an asynchronous copy to it is in flight", h.writer_op);
    return false;
  }
  const auto unordered = [&](const char* did, u32 stamp, u32 other_op) {
    race(w, op, lane, first,
         std::string("was ") + did + " by " + who(stamp) + " and is " + verb + " with no barrier between", other_op);
    return false;
  };
  if (h.writer != 0 && !writers_agree && !before(w, lane, h.writer)) return unordered("written", h.writer, h.writer_op);
  const auto both_strong = [&](u32 other) { return op.strong && program.ops[other].strong; };
  if (h.reader != 0 && !before(w, lane, h.reader) && !both_strong(h.reader_op))
    return unordered("read", h.reader, h.reader_op);
  if (h.others) {
    const u32* times = &readers.times[h.others * warps.size()];
    for (u32 i = 0; i < warps.size() && (h.plain || !op.strong); ++i) {
      const u32 stamp = stamp_of(times[i] - 1, i, 0) | kSeveral;
      if (times[i] != 0 && !before(w, lane, stamp)) return unordered("read", stamp, ~0u);
    }
    h.others = 0;
    h.plain = false;
  }
  h.reader = 0;
  h.writer = stamp_of(w.time(), static_cast<u32>(w.index), static_cast<u32>(lane));
  h.writer_op = op.index;
  return true;
}

// A lane's store is whole, whatever is found wrong with it.
void Cta::write_shared(Warp& w, const Op& op, int lane, u32 offset, const u8* data, const u8* valid, u32 count) {
  bool good = launch.options.races;
  for_each_history(offset, count, [&](History& h, u32 first, u32 n) {
    if (h.serial == serial) {  // a higher lane of this instruction won
      (*w.counters)[op.index].collisions += n;
      return true;
    }
    h.serial = serial;
    const u32 at = first - offset;
    if (good) {
      // Warps that hold the same values (Triton's replicated layouts) are no error.
      const bool unordered = h.writer != 0 && !before(w, lane, h.writer);
      const bool equal =
          unordered &&
          ((data != nullptr && memcmp(&shared[first], data + at, n) == 0 && !launch.options.strict_races) ||
           (op.strong && program.ops[h.writer_op].strong));
      if (equal) (*w.counters)[op.index].collisions += n;
      good = change(w, op, lane, h, first, equal, "written");
    }
    if (data != nullptr) memcpy(&shared[first], data + at, n), memcpy(&shared_valid[first], valid + at, n);
    return true;
  });
}

void Cta::update_shared(Warp& w, const Op& op, int lane, u32 offset, u32 count) {
  memset(&shared_valid[offset], 1, count);
  if (!launch.options.races) return;
  for_each_history(offset, count, [&](History& h, u32 first, u32) {
    return change(w, op, lane, h, first, program.ops[h.writer_op].strong, "updated");  // no error between two of them
  });
}

// Nobody may use these bytes from now until the wait, and a barrier for other threads.
void Cta::start_copy(Warp& w, const Op& op, int lane, u32 offset, u32 count) {
  serial += 1;
  if (History* h = count == 16 ? note_write<16>(w, op, lane, offset) : nullptr) {
    h->in_flight = 1;
    return;
  }
  write_shared(w, op, lane, offset, nullptr, nullptr, count);
  for_each_history(offset, count, [](History& h, u32, u32) {
    h.in_flight += 1;
    return true;
  });
}

void Cta::end_copy(Warp& w, const PendingCopy& copy) {
  const u32 stamp = stamp_of(w.time(), static_cast<u32>(w.index), copy.lane);
  if (History* h = copy.bytes == 16 ? histories_of<16>(copy.shared) : nullptr) {
    memcpy(&shared[copy.shared], copy.data.data(), 16);
    memcpy(&shared_valid[copy.shared], copy.valid.data(), 16);
    h->in_flight -= 1;
    h->writer = stamp, h->writer_op = copy.op;
    return;
  }
  memcpy(&shared[copy.shared], copy.data.data(), copy.bytes);
  memcpy(&shared_valid[copy.shared], copy.valid.data(), copy.bytes);
  for_each_history(copy.shared, copy.bytes, [&](History& h, u32, u32) {
    h.in_flight -= 1;
    h.writer = stamp, h.writer_op = copy.op;
    return true;
  });
}

// ---- tensors
namespace {

bool before_in_grid(const Warp& w, int lane, u64 who) {
  if (who == kSeveralCtas) return false;
  const u32 cta = static_cast<u32>(who >> 32) - 1, stamp = static_cast<u32>(who);
  if (cta == w.cta->linear) return (stamp & kSeveralWarps) == kSeveralWarps || before(w, lane, stamp);
  if (w.foreign == nullptr) return false;
  const std::vector<u32>* known = w.foreign->find(cta);
  return known != nullptr && warp_of(stamp) < known->size() && time_of(stamp) < (*known)[warp_of(stamp)];
}

std::string who_in_grid(const Warp& w, u64 who) {
  const u32 cta = static_cast<u32>(who >> 32) - 1;
  if (cta != w.cta->linear) return "CTA " + std::to_string(cta);
  return gpusim::who(static_cast<u32>(who)) + " of the same CTA";
}

u64 stamp_in_grid(const Warp& w, int lane) {
  return static_cast<u64>(w.cta->linear + 1) << 32 |
         stamp_of(w.time(), static_cast<u32>(w.index), static_cast<u32>(lane));
}

}  // namespace

bool follow_read(Warp& w, const Op& op, int lane, Region& r, u64 offset, u32 bytes) {
  const Launch& launch = w.cta->launch;
  Shadow& s = w.cta->worker.shadow(r);
  const auto touch = [&](u8 bits) {
    for (u64 b = offset; b < offset + bytes; ++b) s.touched[b] |= bits;
  };
  if (!s.followed) return touch(1), true;
  const u64 me = stamp_in_grid(w, lane);
  const auto reader_after = [&](u64 old) -> u64 {
    if (old == 0 || before_in_grid(w, lane, old)) return me;
    if (old >> 32 != me >> 32) return kSeveralCtas;
    if (warp_of(static_cast<u32>(old)) == static_cast<u32>(w.index)) return old | kSeveral;
    return (me & ~0xffffffffull) | kSeveralWarps;
  };
  if (bytes == 16 && offset % 16 == 0) {
    Shadow::Read& whole = s.reads[offset / 16];
    u64 used[2];
    memcpy(used, &s.touched[offset], 16);
    if (whole.reader != 0 || (used[0] | used[1]) == 0) {
      touch(1 | kReadFirst);
      if (whole.reader != me && whole.reader != kSeveralCtas) whole = {reader_after(whole.reader), op.index};
      return true;
    }
  }
  touch(1);
  s.divide(offset, bytes);
  for (u64 b = offset; b < offset + bytes; ++b) {
    const u64 wrote = s.writer[b];
    if (wrote == 0) s.touched[b] |= kReadFirst;
    if (wrote != 0) {
      const bool strong = op.strong && launch.program.ops[s.writer_op[b]].strong;
      if (op.read_only || (!strong && !before_in_grid(w, lane, wrote))) {
        const std::string what = op.read_only
                                     ? "race: a read-only (.nc) load of bytes that this launch wrote, byte " +
                                           std::to_string(b) + " of " + r.name
                                     : "race: byte " + std::to_string(b) + " of " + r.name + " was written by " +
                                           who_in_grid(w, wrote) + " and is read by CTA " +
                                           std::to_string(w.cta->linear) + " with no order between";
        const bool told_at_use = launch.options.uninit && op.num_dst > 0 && op.apply == nullptr;
        if (op.read_only || wrote >> 32 != me >> 32 || !told_at_use) {
          w.fault(op, lane, "race", what, r.base + b, &r, s.writer_op[b]);
          return true;
        }
        Fault f = w.fault_at(op, lane, "race", what, r.base + b, &r);
        f.other_op = s.writer_op[b];
        w.racy_loads.insert_or_assign(op.index, f);
        return false;
      }
    }
    u64& old = s.reader[b];
    if (old == me || old == kSeveralCtas) continue;
    old = reader_after(old);
    s.reader_op[b] = op.index;
  }
  return true;
}

void follow_write(Warp& w, const Op& op, int lane, Region& r, u64 offset, const u8* data, u32 bytes) {
  const Launch& launch = w.cta->launch;
  Shadow& s = w.cta->worker.shadow(r);
  for (u64 b = offset; b < offset + bytes; ++b) s.touched[b] |= 2;
  if (!r.valid.empty())
    for (u64 b = offset; b < offset + bytes; ++b) r.valid[b] = 1;
  if (!s.followed) return;
  s.divide(offset, bytes);
  const u64 me = stamp_in_grid(w, lane);
  for (u64 b = offset; b < offset + bytes; ++b) {
    const auto strong = [&](u32 other) { return op.strong && launch.program.ops[other].strong; };
    // Who else read it can be told apart only where CTAs have no order at all.
    const u64 read_by = s.reader[b] == kSeveralCtas && launch.program.synchronises_ctas ? 0 : s.reader[b];
    const u64 wrote = s.writer[b];
    // Lanes of one instruction that meet are counted by the caller; between them one wins.
    const bool same_store = wrote >> 5 == me >> 5 && s.writer_op[b] == op.index;
    const bool written = wrote != 0 && !same_store && !before_in_grid(w, lane, wrote) && !strong(s.writer_op[b]);
    const bool read = read_by != 0 && !before_in_grid(w, lane, read_by) && !strong(s.reader_op[b]);
    if (same_store && wrote != me && op.apply == nullptr) (*w.counters)[op.index].collisions += 1;
    // Equal values are an update that was lost where the bytes were read before.
    const bool update = wrote >> 32 != me >> 32 && s.touched[b] & kReadFirst && !launch.program.synchronises_ctas;
    if (written && !update && data != nullptr && r.host[b] == data[b - offset] && !launch.options.strict_races) {
      (*w.counters)[op.index].collisions += 1;
    } else if (written || read) {
      w.fault(op, lane, "race",
              "race: byte " + std::to_string(b) + " of " + r.name + " was " + (written ? "written" : "read") + " by " +
                  (!written && read_by == kSeveralCtas ? "other CTAs" : who_in_grid(w, written ? wrote : read_by)) +
                  " and is written by CTA " + std::to_string(w.cta->linear) + " with no order between",
              r.base + b, &r, written ? s.writer_op[b] : s.reader_op[b]);
      return;
    }
    s.writer[b] = me;
    s.writer_op[b] = op.index;
    s.reader[b] = 0;
    if (!s.value.empty() && data != nullptr) s.value[b] = data[b - offset];
  }
}

// ---- what is known of other CTAs
const std::vector<u32>* Knowledge::find(u32 cta) const {
  const u32 chunk = cta / kChunk;
  return chunk < chunks_.size() && chunks_[chunk] ? (*chunks_[chunk])[cta % kChunk].get() : nullptr;
}

namespace {

// The later times of both; one of them itself, where it has them all.
Knowledge::Times later(const Knowledge::Times& a, const Knowledge::Times& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  const auto covers = [](const std::vector<u32>& x, const std::vector<u32>& y) {
    if (x.size() < y.size()) return false;
    for (size_t i = 0; i < y.size(); ++i)
      if (x[i] < y[i]) return false;
    return true;
  };
  if (covers(*a, *b)) return a;
  if (covers(*b, *a)) return b;
  auto out = std::make_shared<std::vector<u32>>(*a);
  out->resize(std::max(a->size(), b->size()));
  for (size_t i = 0; i < b->size(); ++i) (*out)[i] = std::max((*out)[i], (*b)[i]);
  return out;
}

}  // namespace

void Knowledge::add(u32 cta, const Times& times) {
  const u32 chunk = cta / kChunk;
  if (chunk >= chunks_.size()) chunks_.resize(chunk + 1);
  auto copy = chunks_[chunk] ? std::make_shared<Chunk>(*chunks_[chunk]) : std::make_shared<Chunk>();
  Times& mine = (*copy)[cta % kChunk];
  mine = later(mine, times);
  chunks_[chunk] = std::move(copy);
}

void Knowledge::add(const Knowledge& more) {
  chunks_.resize(std::max(chunks_.size(), more.chunks_.size()));
  for (size_t i = 0; i < more.chunks_.size(); ++i) {
    const auto &mine = chunks_[i], &other = more.chunks_[i];
    if (other == nullptr || mine == other) continue;
    if (mine == nullptr) {
      chunks_[i] = other;
      continue;
    }
    Chunk joined;
    for (u32 k = 0; k < kChunk; ++k) joined[k] = later((*mine)[k], (*other)[k]);
    if (joined == *mine) continue;
    chunks_[i] = joined == *other ? other : std::make_shared<const Chunk>(joined);
  }
}

Known join(const Known& a, const Known& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  auto out = std::make_shared<Knowledge>(*a);
  out->add(*b);
  return out;
}

void Warp::tick(const Op& op) {
  if (time() >= kMaxTime) raise(op, 0, "unsupported", "unsupported: more than a million barriers and releases");
  clock[static_cast<size_t>(index)] += 1;
}

Known Warp::snapshot() const {
  auto out = foreign ? std::make_shared<Knowledge>(*foreign) : std::make_shared<Knowledge>();
  // What this warp did until now is in it: later operations carry a later time.
  auto own = std::make_shared<std::vector<u32>>(clock);
  if (const std::vector<u32>* known = out->find(cta->linear))
    for (size_t i = 0; i < std::min(own->size(), known->size()); ++i) (*own)[i] = std::max((*own)[i], (*known)[i]);
  (*own)[static_cast<size_t>(index)] += 1;
  out->add(cta->linear, own);
  return out;
}

void Warp::learn(const Known& what) {
  if (what == nullptr) return;
  if (const std::vector<u32>* own = what->find(cta->linear)) learn(*own);
  foreign = join(foreign, what);
}

void Warp::learn(const std::vector<u32>& times) {
  for (size_t i = 0; i < times.size(); ++i)
    (static_cast<int>(i) == index ? converged : clock[i]) =
        std::max(static_cast<int>(i) == index ? converged : clock[i], times[i]);
}

void Warp::fence(const Op& op) {
  learn(seen);
  seen = nullptr;
  if (op.releases == Scope::kNone) return;
  fenced_cta = snapshot();
  if (op.releases == Scope::kGpu) fenced = fenced_cta;
  tick(op);
}

// A strong write: what it releases, or what the last fence did, can be learned from the location.
void Warp::publish(const Op& op, u64 location) {
  Known within = fenced_cta, beyond = fenced;
  if (op.releases != Scope::kNone) {
    within = snapshot();
    if (op.releases == Scope::kGpu) beyond = within;
    tick(op);
  }
  Release& at = cta->worker.releases[location];
  // A read-modify-write continues what earlier writes released.
  if (op.apply == nullptr) at = Release{};
  at.within = at.cta == cta->linear ? join(at.within, within) : within;
  at.beyond = join(at.beyond, beyond);
  at.cta = cta->linear;
}

void Warp::observe(const Op& op, u64 location) {
  const auto it = cta->worker.releases.find(location);
  if (it == cta->worker.releases.end()) return;
  const Release& at = it->second;
  const Known found = at.cta == cta->linear ? join(at.within, at.beyond) : at.beyond;
  if (op.acquires == Scope::kGpu || (op.acquires == Scope::kCta && at.cta == cta->linear))
    learn(found);
  else
    seen = join(seen, found);
}

void set_order(const Instruction& in, Op& op) {
  const Scope scope = in.has("cta") ? Scope::kCta : Scope::kGpu;
  const bool both = in.has("acq_rel") || in.has("sc");
  if (in.has("acquire") || both) op.acquires = scope;
  if (in.has("release") || both) op.releases = scope;
  op.strong = both || in.has("acquire") || in.has("release") || in.has("relaxed") || in.has("volatile");
}

// ---- mbarrier: 64 bits in shared memory. Phase in bit 63, expected arrivals from bit 32, pending ones below.
namespace {

constexpr u64 kCount = (1ull << 20) - 1;
u64 pending_of(u64 v) { return v & kCount; }
u64 expected_of(u64 v) { return v >> 32 & kCount; }
u64 mbarrier(u64 phase, u64 expected, u64 pending) { return phase << 63 | expected << 32 | pending; }

// The barrier at a lane's address, or nullptr after a fault.
u64* barrier_at(Warp& w, const Op& op, int lane, u32& offset) {
  const Reg& r = op.regs[op.num_dst];
  const u64 address = (op.wide_address ? reinterpret_cast<u64*>(w.file + r.value)[lane]
                                       : reinterpret_cast<u32*>(w.file + r.value)[lane]) +
                      static_cast<u64>(op.imm);
  const u64 at = (op.wide_address ? address : static_cast<u32>(address)) & (kSharedWindow - 1);
  if (at % 8 != 0) {
    w.fault(op, lane, "misaligned", "misaligned mbarrier at shared byte " + std::to_string(at), at);
    return nullptr;
  }
  if (at + 8 > w.cta->shared.size()) {
    w.fault(op, lane, "out of bounds",
            "out of bounds: an mbarrier at shared byte " + std::to_string(at) + " of " +
                std::to_string(w.cta->shared.size()),
            at);
    return nullptr;
  }
  offset = static_cast<u32>(at);
  return reinterpret_cast<u64*>(w.cta->shared.data() + at);
}

bool initialised(Warp& w, const Op& op, int lane, u32 offset) {
  if (!w.cta->launch.options.uninit) return true;
  for (u32 b = offset; b < offset + 8; ++b)
    if (!w.cta->shared_valid[b]) {
      w.fault(op, lane, "uninitialised", "uninitialised mbarrier at shared byte " + std::to_string(offset), offset);
      return false;
    }
  return true;
}

void arrive_at(Warp& w, const Op& op, int lane, u64* barrier, u32 offset, u64 count, bool drop) {
  const u64 v = *barrier;
  u64 expected = expected_of(v), pending = pending_of(v);
  if (count > pending) {
    w.fault(op, lane, "barrier",
            "barrier: " + std::to_string(count) + " arrivals at an mbarrier that waits for " + std::to_string(pending),
            offset);
    return;
  }
  if (drop) expected -= count;
  pending -= count;
  Phase& phase = w.cta->phases[offset];
  phase.arriving.resize(w.clock.size());
  for (size_t i = 0; i < w.clock.size(); ++i) phase.arriving[i] = std::max(phase.arriving[i], w.clock[i]);
  phase.arriving[static_cast<size_t>(w.index)] = w.time() + 1;
  w.tick(op);
  u64 parity = v >> 63;
  if (pending == 0) {
    parity ^= 1, pending = expected;
    phase.complete = std::exchange(phase.arriving, {});
  }
  *barrier = mbarrier(parity, expected, pending);
}

enum MbarrierAction : i64 { kInit, kInvalidate, kArrive, kArriveDrop, kTest, kTestParity, kCopiesArrive, kCopiesCount };

template <MbarrierAction kAction>
void on_mbarrier(Warp& w, const Op& op, u32 mask) {
  // regs: [result,] address [, count or state or parity]
  Cta& cta = *w.cta;
  w.require_valid(op, op.regs[op.num_dst], mask, op.wide_address ? 0xff : 0x0f, "an address");
  const int last = op.num_dst + 1;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    u32 offset = 0;
    u64* barrier = barrier_at(w, op, l, offset);
    if (barrier == nullptr) continue;
    if (kAction == kInit) {
      const u64 count = w.reg<u32>(op, last)[l];
      if (count == 0 || count > kCount)
        w.raise(op, l, "barrier", "barrier: an mbarrier of " + std::to_string(count) + " arrivals", offset);
      const u64 fresh = mbarrier(0, count, count);
      const u8 valid[8] = {1, 1, 1, 1, 1, 1, 1, 1};
      cta.serial += 1;
      cta.write_shared(w, op, l, offset, reinterpret_cast<const u8*>(&fresh), valid, 8);
      cta.phases.erase(offset);
      continue;
    }
    if (!initialised(w, op, l, offset)) continue;
    if (kAction == kTest || kAction == kTestParity) {
      cta.read_shared(w, op, l, offset, 8);
      const u64 phase = *barrier >> 63;
      const u64 asked = kAction == kTest ? w.reg<u64>(op, last)[l] >> 63 : w.reg<u32>(op, last)[l] & 1;
      const bool complete = phase != asked;
      u32& p = *w.reg<u32>(op, 0);
      p = complete ? p | 1u << l : p & ~(1u << l);
      const auto known = cta.phases.find(offset);
      if (complete && known != cta.phases.end()) w.learn(known->second.complete);
      continue;
    }
    cta.update_shared(w, op, l, offset, 8);
    if (kAction == kInvalidate) {
      for (u32 b = offset; b < offset + 8; ++b) cta.shared_valid[b] = 0;
      cta.phases.erase(offset);
      continue;
    }
    if (kAction == kCopiesArrive || kAction == kCopiesCount) {
      // The copies end before the arrival that they make; without .noinc it is one more than the barrier counted on.
      w.wait_copies(1u << l, ~0u);
      if (kAction == kCopiesCount) {
        arrive_at(w, op, l, barrier, offset, 1, false);
      } else {
        Phase& phase = cta.phases[offset];
        phase.arriving.resize(w.clock.size());
        phase.arriving[static_cast<size_t>(w.index)] = w.time() + 1;
        w.tick(op);
      }
      continue;
    }
    const u64 old = *barrier;
    const u64 count = op.num_src > 1 ? w.reg<u32>(op, last)[l] : 1;
    arrive_at(w, op, l, barrier, offset, count, kAction == kArriveDrop);
    if (op.num_dst) w.reg<u64>(op, 0)[l] = old;
  }
  if (op.num_dst) w.set_valid(op.regs[0], mask);
}

bool decode_mbarrier(Decoder& d, const Instruction& in, Op& op) {
  for (const auto& m : in.modifiers)
    if (m == "expect_tx" || m == "complete_tx" || m == "cluster" || m == "shared::cluster" || m == "noComplete")
      Decoder::fail("mbarrier." + m);
  const std::string& action = in.modifiers.at(0);
  const bool parity = in.has("parity");
  op.strong = true;
  const auto address = [&](size_t i) {
    const Reg base = d.address_base(in.operands.at(i), op.wide_address);
    op.imm = in.operands[i].offset;
    return base;
  };
  if (action == "init") {
    d.expect_operands(in, 2);
    d.set(op, {}, {address(0), d.source(in.operands[1], "u32")});
    op.exec = &on_mbarrier<kInit>;
    op.strong = false;
  } else if (action == "inval") {
    d.expect_operands(in, 1);
    d.set(op, {}, {address(0)});
    op.exec = &on_mbarrier<kInvalidate>;
  } else if (action == "arrive" || action == "arrive_drop") {
    if (in.operands.size() < 2 || in.operands.size() > 3) return false;
    std::vector<Reg> src = {address(1)};
    if (in.operands.size() == 3) src.push_back(d.source(in.operands[2], "u32"));
    d.set(op, {d.result(in.operands[0], "b64")}, src);
    op.exec = action == "arrive" ? &on_mbarrier<kArrive> : &on_mbarrier<kArriveDrop>;
  } else if (action == "test_wait" || action == "try_wait") {
    if (in.operands.size() < 3 || in.operands.size() > 4) return false;
    d.set(op, {d.predicate(in.operands[0])}, {address(1), d.source(in.operands[2], parity ? "u32" : "b64")});
    op.exec = parity ? &on_mbarrier<kTestParity> : &on_mbarrier<kTest>;
  } else {
    return false;
  }
  return true;
}

}  // namespace

bool decode_sync(Decoder& d, const Instruction& in, Op& op) {
  const std::string& o = in.opcode;
  op.rule = Rule::kOwn;
  if (o == "cp" && in.has("mbarrier")) {
    d.expect_operands(in, 1);
    const Reg base = d.address_base(in.operands[0], op.wide_address);
    op.imm = in.operands[0].offset;
    op.strong = true;
    d.set(op, {}, {base});
    op.exec = in.has("noinc") ? &on_mbarrier<kCopiesCount> : &on_mbarrier<kCopiesArrive>;
    return true;
  }
  if (o == "mbarrier") return decode_mbarrier(d, in, op);
  if (o == "bar" || o == "barrier") {
    if (in.has("warp")) {
      d.expect_operands(in, 1);
      d.set(op, {}, {d.source(in.operands[0], "b32")});
      op.flow = Flow::kMeet;
      op.meeting = d.meeting("bar.warp.sync");
      op.exec = [](Warp& w, const Op& p, u32) {
        w.tick(p);
        w.converged = w.time();
      };
      return true;
    }
    op.flow = Flow::kBarrier;
    op.aligned = o == "bar" || in.has("aligned");
    if (!op.aligned) op.meeting = d.meeting(in.has("arrive") ? "barrier.arrive" : "barrier.sync");
    std::vector<Reg> dst, src;
    size_t first = 0, last = in.operands.size();
    if (in.has("red")) {
      const bool popc = in.has("popc");
      op.votes = true, op.aligned = true, op.meeting = 0;
      op.imm = popc ? 0 : in.has("and") ? 1 : in.has("or") ? 2 : -1;
      if (op.imm < 0 || in.operands.size() < 3 || in.operands.size() > 4) return false;
      dst.push_back(popc ? d.result(in.operands[0], "u32") : d.predicate(in.operands[0]));
      first = 1, last -= 1;
    } else if (in.has("arrive")) {
      op.arrives = true;
      if (in.operands.size() != 2) return false;
    } else if (!in.has("sync") || in.operands.empty() || in.operands.size() > 2) {
      return false;
    }
    for (size_t i = first; i < last; ++i) src.push_back(d.source(in.operands[i], "u32"));
    if (op.votes) {
      src.push_back(d.predicate(in.operands[last], true));
      if (in.operands[last].negated) op.imm |= 4;
    }
    d.set(op, dst, src);
    return true;
  }
  if (o == "fence" || o == "membar") {
    for (const auto& m : in.modifiers)
      if (m == "proxy" || m == "mbarrier_init" || m == "cluster") Decoder::fail("fence." + m);
    set_order(in, op);
    if (o == "membar" || op.releases == Scope::kNone)
      op.releases = op.acquires = in.has("cta") ? Scope::kCta : Scope::kGpu;
    d.set(op, {}, {});
    op.exec = [](Warp& w, const Op& p, u32) { w.fence(p); };
    return true;
  }
  if (o == "nanosleep") {
    d.set(op, {}, {});
    op.exec = [](Warp&, const Op&, u32) {};
    op.flow = Flow::kYield;
    return true;
  }
  return false;
}

}  // namespace gpusim
