// Loads, stores, atomics, asynchronous copies and ldmatrix, with the checks on every byte and what they count.
// Source: PTX ISA 8.8, sections 5 (state spaces), 8 (memory consistency) and 9.7.9 (data movement).
#include <algorithm>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

constexpr u8 kWhole = 0xff;

struct Addresses {
  u64 lane[kLanes];
};

std::string hex(u64 v) {
  char text[32];
  snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

// Where an instruction finds one of its addresses.
struct AddressOperand {
  Reg base;
  bool wide;
  i64 offset;
};

AddressOperand first_address(const Op& op, int at) { return {op.regs[at], op.wide_address, op.imm}; }

void addresses_of(Warp& w, const Op& op, const AddressOperand& from, u32 mask, Addresses& out) {
  w.require_valid(op, from.base, mask, from.wide ? 0xff : 0x0f, "an address");
  if (from.wide) {
    const u64* a = reinterpret_cast<const u64*>(w.file + from.base.value);
    for (int l = 0; l < kLanes; ++l) out.lane[l] = a[l] + static_cast<u64>(from.offset);
  } else {
    const u32* a = reinterpret_cast<const u32*>(w.file + from.base.value);
    for (int l = 0; l < kLanes; ++l) out.lane[l] = static_cast<u32>(a[l] + static_cast<u32>(from.offset));
  }
}

// The lanes whose addresses are of shared or local memory itself; a generic address there is a fault.
u32 own_addresses(Warp& w, const Op& op, u32 mask, Addresses& a) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1) || a.lane[l] >> kWindowShift == 0) continue;
    w.fault(op, l, "out of bounds",
            "out of bounds: the generic address " + hex(a.lane[l]) + " where one of shared or local memory is expected",
            a.lane[l]);
    mask &= ~(1u << l);
    a.lane[l] = 0;
  }
  return mask;
}

// f(lanes, their space) for each state space that the addresses are in; offsets within it replace generic addresses.
template <class F>
void for_each_space(Warp& w, const Op& op, Space space, u32 mask, Addresses& a, F f) {
  if (space != Space::kGeneric) {
    if (space == Space::kShared || space == Space::kLocal) mask = own_addresses(w, op, mask, a);
    if (space == Space::kParam)
      for (u64& address : a.lane) address &= (1ull << kWindowShift) - 1;
    return mask ? f(mask, space) : void();
  }
  static constexpr Space spaces[] = {Space::kGlobal, Space::kShared, Space::kLocal, Space::kParam};
  u32 in[4] = {};
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const u64 window = a.lane[l] >> kWindowShift;
    if (window >= 4) {
      w.fault(op, l, "out of bounds", "out of bounds access at " + hex(a.lane[l]) + " (no memory there)", a.lane[l]);
      continue;
    }
    in[window] |= 1u << l;
    a.lane[l] &= (1ull << kWindowShift) - 1;
  }
  for (int i = 0; i < 4; ++i)
    if (in[i]) f(in[i], spaces[i]);
}

// The region that holds [address, address + bytes), or nullptr after a fault.
Region* checked(Warp& w, const Op& op, int lane, u64 address, u32 bytes, u32 align, const char* verb) {
  Region* r = w.cta->launch.region_of(address);
  const u64 offset = r ? address - r->base : 0;
  auto at = [&] {
    if (r == nullptr) return std::string("no tensor there");
    const i64 o = static_cast<i64>(offset);
    return "byte " + std::to_string(o) + " of " + r->name + ", which has " + std::to_string(r->size);
  };
  if (address % align != 0) {
    w.fault(op, lane, "misaligned",
            std::string("misaligned ") + verb + " of " + std::to_string(bytes) + " bytes at " + hex(address) + " (" +
                at() + ")",
            address, r);
    return nullptr;
  }
  bool inside = r != nullptr && offset < r->size && offset + bytes <= r->size;
  if (inside && !r->views.empty())
    inside = std::any_of(r->views.begin(), r->views.end(),
                         [&](const auto& v) { return offset >= v.first && offset + bytes <= v.second; });
  if (inside && r->heap != nullptr) inside = r->heap->holds(offset, bytes);
  if (!inside) {
    w.fault(op, lane, "out of bounds",
            std::string("out of bounds ") + verb + " of " + std::to_string(bytes) + " bytes at " + hex(address) + " (" +
                at() + ")",
            address, r);
    return nullptr;
  }
  return r;
}

bool checked_shared(Warp& w, const Op& op, int lane, u64 offset, u32 bytes, u32 align, const char* verb) {
  const u64 size = w.cta->shared.size();
  if (offset % align != 0) {
    w.fault(op, lane, "misaligned",
            std::string("misaligned ") + verb + " of " + std::to_string(bytes) + " bytes at shared byte " +
                std::to_string(offset),
            offset);
    return false;
  }
  if (offset >= size || offset + bytes > size) {
    w.fault(op, lane, "out of bounds",
            std::string("out of bounds ") + verb + " of " + std::to_string(bytes) + " bytes at shared byte " +
                std::to_string(offset) + " of " + std::to_string(size),
            offset);
    return false;
  }
  return true;
}

// Whether aligned accesses of 1 to 16 bytes, a power of two, are inside shared memory in all lanes.
bool all_in_shared(const Cta& cta, const Addresses& a, u32 mask, u32 bytes) {
  if (bytes > 16 || !std::has_single_bit(bytes)) return false;
  u64 any = 0, highest = 0;
  for (int l = 0; l < kLanes; ++l) {
    const u64 at = mask >> l & 1 ? a.lane[l] : 0;
    any |= at;
    highest = std::max(highest, at);
  }
  return any % bytes == 0 && highest + bytes <= cta.shared.size();
}

void count_sectors(OpCounters& c, const Addresses& a, u32 mask, u32 bytes) {
  u64 seen[2 * kLanes];
  int n = 0;
  u64 last = ~0ull;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    for (u64 s = a.lane[l] / kSector; s <= (a.lane[l] + bytes - 1) / kSector; ++s) {
      if (s == last) continue;
      last = s;
      bool found = false;
      for (int i = n - 1; i >= 0 && !found; --i) found = seen[i] == s;
      if (!found && n < 2 * kLanes) seen[n++] = s;
    }
  }
  c.sectors += static_cast<u64>(n);
}

// Phases of 32, 16 or 8 lanes; each costs the most distinct words that one bank serves.
void count_wavefronts(OpCounters& c, const u64* offsets, u32 mask, u32 bytes) {
  const int lanes = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += lanes) {
    const u32 phase = lanes == 32 ? mask : mask >> first & ((1u << lanes) - 1);
    if (phase == 0) continue;
    c.ideal_wavefronts += 1;
    if (bytes <= 16 && std::has_single_bit(bytes)) {  // as a rule no bank has two words to serve
      const int shift = std::max(2, std::countr_zero(bytes));
      u64 served[kLanes];
      u32 taken = 0;
      bool alone = true;
      for (u32 left = phase; left; left &= left - 1) {
        const u64 at = offsets[first + std::countr_zero(left)] >> shift;
        const u32 banks = static_cast<u32>(at) & ((128u >> shift) - 1);
        alone = alone && (!(taken >> banks & 1) || served[banks] == at);
        taken |= 1u << banks;
        served[banks] = at;
      }
      if (alone) {
        c.wavefronts += 1;
        continue;
      }
    }
    u32 words[kLanes][kLanes];
    u8 count[kLanes] = {};
    u32 most = 1;
    for (int l = 0; l < lanes; ++l) {
      if (!(phase >> l & 1)) continue;
      for (u64 word = offsets[first + l] / 4; word <= (offsets[first + l] + bytes - 1) / 4; ++word) {
        const u32 bank = word & 31;
        bool found = false;
        for (int i = 0; i < count[bank] && !found; ++i) found = words[bank][i] == word;
        if (!found && count[bank] < kLanes) {
          words[bank][count[bank]++] = static_cast<u32>(word);
          most = std::max<u32>(most, count[bank]);
        }
      }
    }
    c.wavefronts += most;
  }
}

void count_access(OpCounters& c, Space space, const Addresses& a, u32 mask, u32 bytes) {
  if (space != Space::kShared && space != Space::kGlobal) return;
  c.bytes += static_cast<u64>(std::popcount(mask)) * bytes;
  if (space == Space::kShared)
    count_wavefronts(c, a.lane, mask, bytes);
  else
    count_sectors(c, a, mask, bytes);
}

template <class T>
T read_as(const u8* bytes) {
  T v;
  memcpy(&v, bytes, sizeof(T));
  return v;
}

// Elements of an access in the registers of one lane.
inline void put_element(Warp& w, const Op& op, int reg, int lane, const u8* bytes) {
  if (op.width == 4 && !op.wide) {
    memcpy(&w.reg<u32>(op, reg)[lane], bytes, 4);
    return;
  }
  u64 v;
  switch (op.width) {
    case 1: v = bytes[0]; break;
    case 2: v = read_as<u16>(bytes); break;
    case 4: v = read_as<u32>(bytes); break;
    default: v = read_as<u64>(bytes);
  }
  if (op.sign && op.width < 8) {
    const int shift = 64 - 8 * op.width;
    v = static_cast<u64>(static_cast<i64>(v << shift) >> shift);
  }
  if (op.wide)
    w.reg<u64>(op, reg)[lane] = v;
  else
    w.reg<u32>(op, reg)[lane] = static_cast<u32>(v);
}

// Validity of loaded registers: `valid[i][l]` are the valid bytes of element i in lane l.
void set_loaded(Warp& w, const Op& op, u32 mask, int reg, const u8* valid, bool all) {
  const Reg& r = op.regs[reg];
  if (all) return w.set_valid(r, mask);
  if (!w.partial[r.id]) {
    w.partial[r.id] = 1;
    w.valid[r.id].fill(kWhole);
  }
  const u8 element = static_cast<u8>((1u << op.width) - 1);
  w.origin[r.id] = op.index + 1;
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) w.valid[r.id][l] = (valid[l] & element) == element ? kWhole : valid[l] & element;
}

// Local memory and parameters belong to a lane alone: their bytes, or nullptr after a fault.
u8* own_bytes(Warp& w, const Op& op, int lane, Space space, u64 offset, u32 bytes, const char* verb) {
  const bool local = space == Space::kLocal;
  Stack& stack = w.stacks[static_cast<size_t>(lane)];
  const u64 size = local ? stack.top : w.cta->launch.params.size();
  const std::string where = (local ? "local byte " : "parameter byte ") + std::to_string(offset);
  if (offset % bytes != 0) {
    w.fault(op, lane, "misaligned",
            std::string("misaligned ") + verb + " of " + std::to_string(bytes) + " bytes at " + where, offset);
    return nullptr;
  }
  if (offset >= size || offset + bytes > size || (local && offset < 16)) {
    w.fault(op, lane, "out of bounds",
            std::string("out of bounds ") + verb + " of " + std::to_string(bytes) + " bytes at " + where + " of " +
                std::to_string(size),
            offset);
    return nullptr;
  }
  return local ? stack.memory.data() + offset : w.cta->launch.params.data() + offset;
}

// Key of a location that releases and acquires meet at.
u64 location(const Warp& w, Space space, u64 address) {
  return space == Space::kShared ? 1ull << 63 | static_cast<u64>(w.cta->linear) << 24 | address : address;
}

u8 valid_bytes(const std::vector<u8>& shadow, u64 offset, u32 bytes) {
  if (shadow.empty()) return kWhole;
  u8 bits = 0;
  for (u32 i = 0; i < bytes; ++i) bits |= static_cast<u8>(shadow[offset + i] != 0) << i;
  return bits;
}

bool all_valid(const u8* shadow, const Addresses& a, u32 mask, u32 bytes) {
  const u64 ones = 0x0101010101010101 >> (64 - 8 * std::min(bytes, 8u));
  u64 both = ones;
  for (u32 left = mask; left; left &= left - 1) {
    const u8* at = shadow + a.lane[std::countr_zero(left)];
    switch (bytes) {
      case 1: both &= *at; break;
      case 2: both &= read_as<u16>(at); break;
      case 4: both &= read_as<u32>(at); break;
      case 8: both &= read_as<u64>(at); break;
      default: both &= read_as<u64>(at) & read_as<u64>(at + 8);
    }
  }
  return both == ones;
}

void load_from(Warp& w, const Op& op, u32 mask, Space space, const Addresses& a) {
  const bool shared = space == Space::kShared;
  const u32 bytes = op.width * op.vector;
  Cta& cta = *w.cta;
  OpCounters& c = (*w.counters)[op.index];
  bool all = true;
  // As a rule all lanes are inside and all they read is valid.
  const bool noted = shared && !op.strong && op.used_bytes == ~0ull && all_in_shared(cta, a, mask, bytes);
  if (noted) {
    cta.read_shared(w, op, mask, a.lane, bytes);
    if (all_valid(cta.shared_valid.data(), a, mask, bytes)) {
      for (u32 left = mask; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        for (int i = 0; i < op.vector; ++i) put_element(w, op, i, l, cta.shared.data() + a.lane[l] + i * op.width);
      }
      count_access(c, space, a, mask, bytes);
      for (int i = 0; i < op.vector; ++i) w.set_valid(op.regs[i], mask);
      return;
    }
  }
  u8 valid[8][kLanes];
  static const std::vector<u8> no_shadow;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (op.strong && (shared || space == Space::kGlobal)) w.observe(op, location(w, space, a.lane[l]));
    const u8* data = nullptr;
    const std::vector<u8>* shadow = nullptr;
    u64 offset = 0;
    // Bytes that the compiler says are not used are not accessed: the load may reach beyond the tensor there.
    const u64 used = op.used_bytes & (bytes >= 64 ? ~0ull : (1ull << bytes) - 1);
    const u32 begin = used ? static_cast<u32>(std::countr_zero(used)) : 0;
    const u32 end = used ? 64 - static_cast<u32>(std::countl_zero(used)) : 0, span = end - begin;
    const auto in_runs = [&](const auto& f) {  // f(first byte, bytes) for each run of used bytes
      for (u32 k = begin; k < end;) {
        u32 n = 0;
        while (k + n < end && used >> (k + n) & 1) ++n;
        if (n) f(k, n);
        k += n + 1;
      }
    };
    u8 raw[64], known[64];
    bool racy = false;
    if (shared) {
      offset = a.lane[l];
      if (!noted && !checked_shared(w, op, l, offset, bytes, bytes, "load")) {
        mask &= ~(1u << l);
        continue;
      }
      data = cta.shared.data() + offset;
      shadow = &cta.shared_valid;
      if (!noted) in_runs([&](u32 k, u32 n) { cta.read_shared(w, op, l, static_cast<u32>(offset) + k, n); });
    } else if (space != Space::kGlobal) {
      offset = a.lane[l];
      data = own_bytes(w, op, l, space, offset, bytes, "load");
      if (data == nullptr) {
        mask &= ~(1u << l);
        continue;
      }
      shadow = space == Space::kLocal ? &w.stacks[static_cast<size_t>(l)].valid : &no_shadow;
    } else if (span > 0) {
      const bool aligned = a.lane[l] % bytes == 0;
      Region* r = aligned && span < bytes ? checked(w, op, l, a.lane[l] + begin, span, 1, "load")
                                          : checked(w, op, l, a.lane[l], bytes, bytes, "load");
      if (r == nullptr) {
        mask &= ~(1u << l);
        continue;
      }
      offset = a.lane[l] - r->base;
      data = r->host + offset;
      shadow = &r->valid;
      in_runs([&](u32 k, u32 n) { racy = !follow_read(w, op, l, *r, offset + k, n) || racy; });
    }
    const u8 element = op.width == 8 ? kWhole : static_cast<u8>((1u << op.width) - 1);
    if (span == bytes && op.used_bytes == ~0ull) {
      if (!racy && (shadow->empty() || memchr(shadow->data() + offset, 0, bytes) == nullptr)) {
        for (int i = 0; i < op.vector; ++i) {
          put_element(w, op, i, l, data + i * op.width);
          valid[i][l] = element;
        }
        continue;
      }
      memcpy(raw, data, bytes);
      if (shadow->empty())
        memset(known, 1, bytes);
      else
        memcpy(known, shadow->data() + offset, bytes);
    } else {
      memset(raw, 0, sizeof(raw));
      memset(known, 0, sizeof(known));
      for (u32 k = begin; k < end; ++k)
        if (used >> k & 1) raw[k] = data[k], known[k] = shadow->empty() ? 1 : (*shadow)[offset + k];
    }
    if (racy) memset(known, 0, bytes);
    for (int i = 0; i < op.vector; ++i) {
      const u32 at = static_cast<u32>(i) * op.width;
      put_element(w, op, i, l, raw + at);
      u8 bits = 0;
      for (u32 k = 0; k < op.width; ++k) bits |= static_cast<u8>((known[at + k] != 0) << k);
      valid[i][l] = bits;
      if (bits != element) {
        all = false;
        if (!racy && cta.launch.options.uninit_at_load && op.used_bytes == ~0ull)
          w.fault(op, l, "uninitialised", "uninitialised bytes are loaded", a.lane[l]);
      }
    }
  }
  count_access(c, space, a, mask, bytes);
  for (int i = 0; i < op.vector; ++i) set_loaded(w, op, mask, i, valid[i], all);
}

void load(Warp& w, const Op& op, u32 mask) {
  Addresses a;
  addresses_of(w, op, first_address(op, op.num_dst), mask, a);
  for_each_space(w, op, op.space, mask, a, [&](u32 lanes, Space space) { load_from(w, op, lanes, space, a); });
}

void store_to(Warp& w, const Op& op, u32 mask, Space space, const Addresses& a) {
  const bool shared = space == Space::kShared;
  const u32 bytes = op.width * op.vector;
  Cta& cta = *w.cta;
  OpCounters& c = (*w.counters)[op.index];
  const u8 element = op.width == 8 ? kWhole : static_cast<u8>((1u << op.width) - 1);
  if (space == Space::kGlobal)
    for (int i = 0; i < op.vector; ++i) w.require_valid(op, op.regs[1 + i], mask, element, "a store to global memory");
  cta.serial += 1;
  // Where lanes meet, the highest wins (the lowest, where numerics are perturbed): in shared memory it comes first and
  // keeps the others out, elsewhere it comes last.
  const bool highest = !(cta.program.perturbation >> (op.index & 31) & 1);
  const auto gather = [&](int l, u8* data) {  // whole registers, each over what is too much of the one before
    for (int i = 0; i < op.vector; ++i) {
      if (op.wide)
        memcpy(data + i * op.width, &w.reg<u64>(op, 1 + i)[l], 8);
      else
        memcpy(data + i * op.width, &w.reg<u32>(op, 1 + i)[l], 4);
    }
  };
  bool partial = false;
  for (int i = 0; i < op.vector; ++i) partial = partial || w.partial[op.regs[1 + i].id];
  if (shared && !op.strong && !partial && all_in_shared(cta, a, mask, bytes)) {
    u8 data[kLanes + 1][16];
    for (u32 left = mask; left; left &= left - 1) gather(std::countr_zero(left), data[std::countr_zero(left)]);
    cta.write_shared(w, op, mask, a.lane, data, bytes, highest);
    return count_access(c, space, a, mask, bytes);
  }
  for (int k = 0; k < kLanes; ++k) {
    const int l = shared == highest ? kLanes - 1 - k : k;
    if (!(mask >> l & 1)) continue;
    u8 data[72], valid[64];
    gather(l, data);
    if (space != Space::kGlobal) {
      const u64 offset = a.lane[l];
      u8* own = shared ? nullptr : own_bytes(w, op, l, space, offset, bytes, "store");
      if (shared ? !checked_shared(w, op, l, offset, bytes, bytes, "store") : own == nullptr) {
        mask &= ~(1u << l);
        continue;
      }
      for (int i = 0; i < op.vector; ++i) {
        const Reg& r = op.regs[1 + i];
        const u8 bits = w.partial[r.id] ? w.valid[r.id][l] : kWhole;
        for (u32 b = 0; b < op.width; ++b) valid[i * op.width + b] = bits >> b & 1;
      }
      if (space == Space::kParam) {
        w.fault(op, l, "out of bounds", "out of bounds: a store to the kernel's parameters", offset);
      } else if (!shared) {
        memcpy(own, data, bytes);
        memcpy(w.stacks[static_cast<size_t>(l)].valid.data() + offset, valid, bytes);
      } else {
        cta.write_shared(w, op, l, static_cast<u32>(offset), data, valid, bytes);
        if (op.strong) w.publish(op, location(w, space, a.lane[l]));
      }
    } else {
      Region* r = checked(w, op, l, a.lane[l], bytes, bytes, "store");
      if (r != nullptr && r->constant) {
        w.fault(op, l, "out of bounds", "out of bounds: a store to constant memory, " + r->name, a.lane[l], r);
        r = nullptr;
      }
      if (r == nullptr) {
        mask &= ~(1u << l);
        continue;
      }
      const u64 offset = a.lane[l] - r->base;
      follow_write(w, op, l, *r, offset, data, bytes);
      memcpy(r->host + offset, data, bytes);
      if (op.strong) w.publish(op, location(w, space, a.lane[l]));
    }
  }
  count_access(c, space, a, mask, bytes);
}

void store(Warp& w, const Op& op, u32 mask) {
  Addresses a;
  addresses_of(w, op, first_address(op, 0), mask, a);
  for_each_space(w, op, op.space, mask, a, [&](u32 lanes, Space space) { store_to(w, op, lanes, space, a); });
}

void load_param(Warp& w, const Op& op, u32 mask) {
  const u8* params = w.cta->launch.params.data() + op.imm;
  for (int i = 0; i < op.vector; ++i) {
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) put_element(w, op, i, l, params + i * op.width);
    w.set_valid(op.regs[i], mask);
  }
}

// ---- atomics
template <class T>
void atomic_in(Warp& w, const Op& op, u32 mask, Space space, const Addresses& a) {
  const Reg* src = op.regs + op.num_dst;
  const bool shared = space == Space::kShared;
  if (!shared && space != Space::kGlobal)
    w.raise(op, std::countr_zero(mask), "unsupported", "unsupported: an atomic operation on local memory");
  for (int i = 1; i < op.num_src; ++i)
    w.require_valid(op, src[i], mask, sizeof(T) == 8 ? kWhole : static_cast<u8>((1u << sizeof(T)) - 1),
                    "an atomic operation");
  const auto apply = reinterpret_cast<T (*)(T, T, T)>(op.apply);
  Cta& cta = *w.cta;
  OpCounters& c = (*w.counters)[op.index];
  const u8 whole = sizeof(T) == 8 ? kWhole : static_cast<u8>((1u << sizeof(T)) - 1);
  const bool overwrites = op.overwrites;  // exchange: the old value is not used
  using Lane = std::conditional_t<sizeof(T) == 8, u64, u32>;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    w.observe(op, location(w, space, a.lane[l]));
    u8* data;
    if (shared) {
      if (!checked_shared(w, op, l, a.lane[l], sizeof(T), sizeof(T), "atomic operation")) continue;
      data = cta.shared.data() + a.lane[l];
      if (cta.launch.options.uninit && !overwrites &&
          (valid_bytes(cta.shared_valid, a.lane[l], sizeof(T)) & whole) != whole)
        w.fault(op, l, "uninitialised", "uninitialised shared memory is updated by an atomic operation", a.lane[l]);
      cta.update_shared(w, op, l, static_cast<u32>(a.lane[l]), sizeof(T));
    } else {
      Region* r = checked(w, op, l, a.lane[l], sizeof(T), sizeof(T), "atomic operation");
      if (r == nullptr) continue;
      if (r->constant) {
        w.fault(op, l, "out of bounds", "out of bounds: an atomic operation on constant memory, " + r->name, a.lane[l],
                r);
        continue;
      }
      const u64 offset = a.lane[l] - r->base;
      data = r->host + offset;
      if (cta.launch.options.uninit && !overwrites && (valid_bytes(r->valid, offset, sizeof(T)) & whole) != whole)
        w.fault(op, l, "uninitialised", "uninitialised memory is updated by an atomic operation, " + r->name, a.lane[l],
                r);
      follow_read(w, op, l, *r, offset, sizeof(T));
      follow_write(w, op, l, *r, offset, nullptr, sizeof(T));
    }
    w.publish(op, location(w, space, a.lane[l]));
    Lane va = 0, vb = 0;
    memcpy(&va, w.file + src[1].value + sizeof(Lane) * l, sizeof(Lane));
    if (op.num_src > 2) memcpy(&vb, w.file + src[2].value + sizeof(Lane) * l, sizeof(Lane));
    T old, ta, tb;
    memcpy(&old, data, sizeof(T));
    memcpy(&ta, &va, sizeof(T));
    memcpy(&tb, &vb, sizeof(T));
    T fresh;
    if constexpr (std::is_same_v<T, float>)  // sums in global memory flush subnormal numbers, in shared memory not
      fresh = shared ? apply(old, ta, tb) : flush(apply(flush(old), flush(ta), tb));
    else
      fresh = apply(old, ta, tb);
    memcpy(data, &fresh, sizeof(T));
    if (op.num_dst) {
      Lane lane = 0;
      memcpy(&lane, &old, sizeof(T));
      memcpy(w.file + op.regs[0].value + sizeof(Lane) * l, &lane, sizeof(Lane));
    }
  }
  if (op.num_dst) w.set_valid(op.regs[0], mask);
  count_access(c, space, a, mask, sizeof(T));
}

template <class T>
void atomic(Warp& w, const Op& op, u32 mask) {
  // regs: [result,] address, a [, b]
  Addresses a;
  addresses_of(w, op, first_address(op, op.num_dst), mask, a);
  for_each_space(w, op, op.space, mask, a, [&](u32 lanes, Space space) { atomic_in<T>(w, op, lanes, space, a); });
}

template <class T, class F>
void set_atomic(Op& op, F) {
  op.exec = &atomic<T>;
  op.apply = reinterpret_cast<void (*)()>(static_cast<T (*)(T, T, T)>([](T old, T a, T b) { return F{}(old, a, b); }));
}

template <class T>
bool integer_atomic(Op& op, const std::string& what) {
  using U = std::make_unsigned_t<T>;
  if (what == "add")
    set_atomic<T>(op, [](T o, T a, T) { return static_cast<T>(static_cast<U>(o) + static_cast<U>(a)); });
  else if (what == "min")
    set_atomic<T>(op, [](T o, T a, T) { return std::min(o, a); });
  else if (what == "max")
    set_atomic<T>(op, [](T o, T a, T) { return std::max(o, a); });
  else if (what == "and")
    set_atomic<T>(op, [](T o, T a, T) { return static_cast<T>(o & a); });
  else if (what == "or")
    set_atomic<T>(op, [](T o, T a, T) { return static_cast<T>(o | a); });
  else if (what == "xor")
    set_atomic<T>(op, [](T o, T a, T) { return static_cast<T>(o ^ a); });
  else if (what == "exch")
    set_atomic<T>(op, [](T, T a, T) { return a; });
  else if (what == "cas")
    set_atomic<T>(op, [](T o, T a, T b) { return o == a ? b : o; });
  else if (what == "inc")
    set_atomic<T>(op,
                  [](T o, T a, T) { return static_cast<U>(o) >= static_cast<U>(a) ? T{0} : static_cast<T>(o + 1); });
  else if (what == "dec")
    set_atomic<T>(
        op, [](T o, T a, T) { return o == 0 || static_cast<U>(o) > static_cast<U>(a) ? a : static_cast<T>(o - 1); });
  else
    return false;
  return true;
}

// The sums of two 16-bit numbers each.
template <class T, class F>
u32 pair_sum(u32 a, u32 b, F round) {
  const auto sum = [&](u32 x, u32 y) {
    return static_cast<u32>(
        round(static_cast<double>(to_float(T{static_cast<u16>(x)})) + to_float(T{static_cast<u16>(y)})));
  };
  return sum(a, b) | sum(a >> 16, b >> 16) << 16;
}

bool set_atomic_of(Op& op, const std::string& what, const std::string& type) {
  if (type == "u32" || type == "b32") return integer_atomic<u32>(op, what);
  if (type == "s32") return integer_atomic<i32>(op, what);
  if (type == "u64" || type == "b64") return integer_atomic<u64>(op, what);
  if (type == "s64") return integer_atomic<i64>(op, what);
  if (type == "b16" && (what == "cas" || what == "exch")) return integer_atomic<u16>(op, what);
  if (what != "add") return false;
  if (type == "f32")
    set_atomic<float>(op, [](float o, float a, float) { return canonical(o + a); });
  else if (type == "f64")
    set_atomic<double>(op, [](double o, double a, double) { return canonical(o + a); });
  else if (type == "f16")
    set_atomic<u16>(
        op, [](u16 o, u16 a, u16) { return f16_bits(static_cast<double>(to_float(f16{o})) + to_float(f16{a})); });
  else if (type == "bf16")
    set_atomic<u16>(
        op, [](u16 o, u16 a, u16) { return bf16_bits(static_cast<double>(to_float(bf16{o})) + to_float(bf16{a})); });
  else if (type == "f16x2")
    set_atomic<u32>(op, [](u32 o, u32 a, u32) { return pair_sum<f16>(o, a, [](double v) { return f16_bits(v); }); });
  else if (type == "bf16x2")
    set_atomic<u32>(op, [](u32 o, u32 a, u32) { return pair_sum<bf16>(o, a, [](double v) { return bf16_bits(v); }); });
  else
    return false;
  return true;
}

// ---- asynchronous copies: read at issue, written when the issuer waits
void async_copy(Warp& w, const Op& op, u32 mask) {
  // regs: shared address, global address [, bytes to read]
  Addresses to, from;
  addresses_of(w, op, {op.regs[0], op.wide_address, op.imm}, mask, to);
  addresses_of(w, op, {op.regs[1], op.wide_address2, op.imm2}, mask, from);
  mask = own_addresses(w, op, mask, to);
  const u32 bytes = op.width;
  u32 reading = 0;
  Cta& cta = *w.cta;
  if (op.num_src > 2) w.require_valid(op, op.regs[2], mask, op.saturate ? 1 : 0x0f, "an asynchronous copy's size");
  OpCounters& c = (*w.counters)[op.index];
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (!checked_shared(w, op, l, to.lane[l], bytes, bytes, "asynchronous copy")) continue;
    u32 size = bytes;
    if (op.num_src > 2 && op.saturate)  // a predicate: nothing is read, zeros are written
      size = *w.reg<u32>(op, 2) >> l & 1 ? 0 : bytes;
    else if (op.num_src > 2)
      size = std::min(w.reg<u32>(op, 2)[l], bytes);
    PendingCopy copy{.shared = static_cast<u32>(to.lane[l]),
                     .bytes = static_cast<u8>(bytes),
                     .lane = static_cast<u8>(l),
                     .group = w.copy_groups[l],
                     .op = op.index,
                     .data = {},
                     .valid = {}};
    copy.valid.fill(1);
    if (size > 0) {
      Region* r = checked(w, op, l, from.lane[l], size, bytes, "asynchronous copy");
      if (r == nullptr) continue;
      const u64 offset = from.lane[l] - r->base;
      follow_read(w, op, l, *r, offset, size);
      memcpy(copy.data.data(), r->host + offset, size);
      if (!r->valid.empty()) memcpy(copy.valid.data(), r->valid.data() + offset, size);
      reading |= 1u << l;
      c.bytes += size;
    }
    cta.start_copy(w, op, l, copy.shared, bytes);
    w.copies.push_back(copy);
  }
  count_sectors(c, from, reading, bytes);
}

void commit_group(Warp& w, const Op&, u32 mask) {
  for (int l = 0; l < kLanes; ++l) w.copy_groups[l] += mask >> l & 1;
}

// ---- ldmatrix
void load_matrix(Warp& w, const Op& op, u32) {
  const int count = op.vector;
  Addresses a;
  const u32 used = count == 4 ? kAllLanes : (1u << (8 * count)) - 1;
  addresses_of(w, op, first_address(op, op.num_dst), used, a);
  if (own_addresses(w, op, used, a) != used) return;
  Cta& cta = *w.cta;
  OpCounters& c = (*w.counters)[op.index];
  if (all_in_shared(cta, a, used, 16)) {
    cta.read_shared(w, op, used, a.lane, 16);
  } else {
    for (int l = 0; l < 8 * count; ++l) {
      if (!checked_shared(w, op, l, a.lane[l], 16, 16, "ldmatrix")) return;
      cta.read_shared(w, op, l, static_cast<u32>(a.lane[l]), 16);
    }
  }
  for (int m = 0; m < count; ++m) {
    c.ideal_wavefronts += 1;
    u64 rows[kLanes] = {};
    for (int i = 0; i < 8; ++i) rows[i] = a.lane[8 * m + i];
    OpCounters one;
    count_wavefronts(one, rows, 0xff, 16);
    c.wavefronts += one.wavefronts;
    c.bytes += 128;
    u16 elements[8][8], turned[8][8];
    u8 known[8][16];
    for (int i = 0; i < 8; ++i) {
      memcpy(elements[i], cta.shared.data() + rows[i], 16);
      memcpy(known[i], cta.shared_valid.data() + rows[i], 16);
    }
    for (int i = 0; i < 8 && op.transposed; ++i)
      for (int j = 0; j < 8; ++j) turned[j][i] = elements[i][j];
    memcpy(w.reg<u32>(op, m), op.transposed ? turned : elements, sizeof(elements));
    const bool all = memchr(known, 0, sizeof(known)) == nullptr;
    u8 valid[kLanes] = {};
    for (int l = 0; l < kLanes && !all; ++l)
      for (int h = 0; h < 2; ++h) {
        const int row = op.transposed ? 2 * (l % 4) + h : l / 4, column = op.transposed ? l / 4 : 2 * (l % 4) + h;
        for (int b = 0; b < 2; ++b) valid[l] |= static_cast<u8>((known[row][2 * column + b] != 0) << (2 * h + b));
      }
    set_loaded(w, op, kAllLanes, m, valid, all);
  }
}

// ---- wmma.load and wmma.store: matrix.cpp says which elements a lane has
struct Fragment {
  u16 line = 0;             // elements of a row, of a column where the memory is by columns
  u8 count = 0, bits = 0;   // elements of a lane, their bits
  u8 registers = 0;         // with copies
  bool by_columns = false;  // of an accumulator: a lane's elements are in different columns
  u8 columns = 0;           // of an accumulator
};

// One access of a part of a fragment in each lane: what it reads, or where `data` goes; false where it is a fault.
bool read_part(Warp& w, const Op& op, int l, Space space, u64 address, u32 bytes, u8* data, u8* known) {
  if (space == Space::kShared) {
    if (!checked_shared(w, op, l, address, bytes, 1, "load")) return false;
    w.cta->read_shared(w, op, l, static_cast<u32>(address), bytes);
    memcpy(data, w.cta->shared.data() + address, bytes);
    memcpy(known, w.cta->shared_valid.data() + address, bytes);
    return true;
  }
  Region* r = checked(w, op, l, address, bytes, 1, "load");
  if (r == nullptr) return false;
  const bool racy = !follow_read(w, op, l, *r, address - r->base, bytes);
  memcpy(data, r->host + (address - r->base), bytes);
  for (u32 b = 0; b < bytes; ++b) known[b] = !racy && (r->valid.empty() || r->valid[address - r->base + b]);
  return true;
}

void write_part(Warp& w, const Op& op, int l, Space space, u64 address, u32 bytes, const u8* data, const u8* known) {
  if (space == Space::kShared) {
    if (checked_shared(w, op, l, address, bytes, 1, "store"))
      w.cta->write_shared(w, op, l, static_cast<u32>(address), data, known, bytes);
    return;
  }
  Region* r = checked(w, op, l, address, bytes, 1, "store");
  if (r == nullptr) return;
  if (r->constant)
    return w.fault(op, l, "out of bounds", "out of bounds: a store to constant memory, " + r->name, address, r);
  follow_write(w, op, l, *r, address - r->base, data, bytes);
  memcpy(r->host + (address - r->base), data, bytes);
}

// f(addresses of the lanes, their space, bytes, where in a lane's data) for each access that a fragment takes: one, or
// one for each element. regs: [results,] address, stride [, sources]
template <class F>
void for_each_part(Warp& w, const Op& op, F f) {
  const auto part = std::bit_cast<Fragment>(op.imm2);
  Addresses base;
  addresses_of(w, op, first_address(op, op.num_dst), kAllLanes, base);
  const Reg& strides = op.regs[op.num_dst + 1];
  w.require_valid(op, strides, kAllLanes, 0x0f, "a stride");
  const u32* stride = reinterpret_cast<const u32*>(w.file + strides.value);
  for (int l = 1; l < kLanes; ++l)
    if (base.lane[l] != base.lane[0] || stride[l] != stride[0])
      w.raise(op, l, "unsupported", "unsupported: wmma with different addresses or strides in the lanes of a warp");
  const u64 whole = part.registers * static_cast<u64>(op.width), step = static_cast<u64>(stride[0]) * part.bits / 8;
  // Rows begin where a fragment could; CUDA C++ asks no more than 16 bytes of the distance between them.
  if (base.lane[0] % whole != 0 || step % std::min<u64>(whole, 16) != 0)
    w.raise(op, 0, "misaligned",
            "misaligned matrix: at " + hex(base.lane[0]) + ", rows of " + std::to_string(step) +
                " bytes, fragments of " + std::to_string(whole),
            base.lane[0]);
  const int accesses = part.by_columns ? part.count : 1;
  const u32 bytes = static_cast<u32>(part.count / accesses * part.bits / 8);
  for (int i = 0; i < accesses; ++i) {
    Addresses a;
    for (int l = 0; l < kLanes; ++l) {
      const u64 first = static_cast<u64>(l * part.count + i);
      const u64 line = part.by_columns ? first % part.columns : first / part.line;
      const u64 at = part.by_columns ? first / part.columns : first % part.line;
      a.lane[l] = base.lane[0] + line * step + at * part.bits / 8;
    }
    for_each_space(w, op, op.space, kAllLanes, a, [&](u32, Space space) {
      if (space != Space::kShared && space != Space::kGlobal)
        w.raise(op, 0, "unsupported", "unsupported: wmma on local memory or parameters");
      count_access((*w.counters)[op.index], space, a, kAllLanes, bytes);
      f(a, space, bytes, static_cast<u32>(i) * bytes);
    });
  }
}

void load_fragment(Warp& w, const Op& op, u32) {
  u8 data[kLanes][64] = {}, known[kLanes][64] = {};
  u32 held = 0;
  for_each_part(w, op, [&](const Addresses& a, Space space, u32 bytes, u32 at) {
    for (int l = 0; l < kLanes; ++l) read_part(w, op, l, space, a.lane[l], bytes, data[l] + at, known[l] + at);
    held = at + bytes;
  });
  for (int r = 0; r < op.num_dst; ++r) {
    const u32 at = static_cast<u32>(r) * op.width % held;  // float16 has copies
    bool all = true;
    u8 valid[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      put_element(w, op, r, l, data[l] + at);
      valid[l] = 0;
      for (u32 b = 0; b < op.width; ++b) valid[l] |= static_cast<u8>((known[l][at + b] != 0) << b);
      all = all && valid[l] == static_cast<u8>((1u << op.width) - 1);
    }
    set_loaded(w, op, kAllLanes, r, valid, all);
  }
}

void store_fragment(Warp& w, const Op& op, u32) {
  u8 data[kLanes][64], known[kLanes][64];
  const int first = 2, count = op.num_src - first;
  for (int l = 0; l < kLanes; ++l)
    for (int r = 0; r < count; ++r) {
      const Reg& from = op.regs[first + r];
      const u8 bits = w.partial[from.id] ? w.valid[from.id][l] : kWhole;
      memcpy(data[l] + r * op.width, w.file + from.value + op.width * l, op.width);
      for (u32 b = 0; b < op.width; ++b) known[l][r * op.width + static_cast<int>(b)] = bits >> b & 1;
    }
  w.cta->serial += 1;
  for_each_part(w, op, [&](const Addresses& a, Space space, u32 bytes, u32 at) {
    if (space == Space::kGlobal)
      for (int r = 0; r < count; ++r)
        w.require_valid(op, op.regs[first + r], kAllLanes, static_cast<u8>((1u << op.width) - 1),
                        "a store to global memory");
    for (int l = kLanes - 1; l >= 0; --l) write_part(w, op, l, space, a.lane[l], bytes, data[l] + at, known[l] + at);
  });
}

}  // namespace

Space space_of(const Instruction& in) {
  for (const auto& m : in.modifiers) {
    if (m == "global" || m == "const") return Space::kGlobal;
    if (m == "shared" || m == "shared::cta") return Space::kShared;
    if (m.rfind("param", 0) == 0) return Space::kParam;
    if (m == "local") return Space::kLocal;
  }
  return Space::kGeneric;
}

namespace {

void decode_access(Decoder& d, const Instruction& in, Op& op, bool is_load) {
  const std::string type = in.last();
  const int bytes = type_bytes(type);
  if (bytes <= 0 || bytes > 8) Decoder::fail("access of type ." + type);
  op.width = static_cast<u8>(bytes);
  op.vector = in.has("v8") ? 8 : in.has("v4") ? 4 : in.has("v2") ? 2 : 1;
  op.space = space_of(in);
  op.sign = type[0] == 's';
  op.read_only = in.has("nc");
  set_order(in, op);
  if (op.strong && (op.space == Space::kGlobal || op.space == Space::kGeneric)) d.program().synchronises_ctas = true;
  const size_t data = is_load ? 0 : 1, where = is_load ? 1 : 0;
  const size_t expected = in.has("L2::cache_hint") ? 3 : 2;
  d.expect_operands(in, expected);
  const Operand& values = in.operands[data];
  std::vector<Operand> list = values.kind == Operand::kVector ? values.list : std::vector<Operand>{values};
  if (list.size() != op.vector)
    Decoder::fail("a vector of " + std::to_string(list.size()) + " for .v" + std::to_string(op.vector));
  std::vector<Reg> regs;
  bool first = true;
  for (const auto& o : list) {
    const bool named = o.kind == Operand::kName && o.name != "_" && d.is_register(o.name);
    const bool wide = named ? d.is_wide(o.name) : bytes == 8;
    if (first) op.wide = wide;
    if (wide != op.wide) Decoder::fail("registers of different widths in one vector");
    first = false;
    regs.push_back(is_load ? d.result(o, type, Decoder::Wider::kAny) : d.source(o, type, Decoder::Wider::kAny));
  }
  const Operand& place = in.operands[where];
  const bool formal = d.is_entry() && d.program().param_offsets.count(place.name) > 0;
  if (op.space == Space::kParam && place.kind == Operand::kAddress && formal) {
    if (!is_load) Decoder::fail("st.param to a kernel's parameter");
    const u64 room = d.program().param_bytes, need = static_cast<u64>(bytes) * op.vector;
    const u64 at = d.program().param_offsets.at(place.name) + static_cast<u64>(place.offset);
    if (at > room || room - at < need) Decoder::fail("ld.param beyond the parameters");
    op.imm = static_cast<i64>(at);
    d.set(op, regs, {});
    op.exec = &load_param;
    op.rule = Rule::kOwn;
    return;
  }
  // Parameters of functions and of calls lie in the frame.
  if (op.space == Space::kParam) op.space = d.code().places.count(place.name) ? Space::kLocal : Space::kParam;
  const Reg base = d.address_base(in.operands[where], op.wide_address);
  op.imm = in.operands[where].offset;
  if (is_load) {
    d.set(op, regs, {base});
    op.exec = &load;
  } else {
    std::vector<Reg> src = {base};
    src.insert(src.end(), regs.begin(), regs.end());
    d.set(op, {}, src);
    op.exec = &store;
  }
  op.rule = Rule::kOwn;
}

void decode_atomic(Decoder& d, const Instruction& in, Op& op, bool has_result) {
  static const std::vector<std::string> names = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
  std::string what;
  for (const auto& n : names)
    if (in.has(n.c_str())) what = n;
  const std::string type = in.last();
  if (what.empty() || !set_atomic_of(op, what, type)) Decoder::fail("atomic ." + what + " of type ." + type);
  op.space = space_of(in);
  op.width = static_cast<u8>(type_bytes(type));
  op.overwrites = what == "exch";
  set_order(in, op);
  op.strong = true;
  if (op.space != Space::kShared) d.program().synchronises_ctas = true;
  const size_t at = has_result ? 1 : 0;
  d.expect_operands(in, at + (what == "cas" ? 3 : 2));
  std::vector<Reg> src = {d.address_base(in.operands[at], op.wide_address)};
  op.imm = in.operands[at].offset;
  for (size_t i = at + 1; i < in.operands.size(); ++i) src.push_back(d.source(in.operands[i], type));
  std::vector<Reg> dst;
  if (has_result) dst.push_back(d.result(in.operands[0], type));
  d.set(op, dst, src);
  op.rule = Rule::kOwn;
}

void decode_async(Decoder& d, const Instruction& in, Op& op) {
  op.rule = Rule::kOwn;
  if (in.has("commit_group")) {
    op.exec = &commit_group;
    d.set(op, {}, {});
    return;
  }
  if (in.has("wait_group") || in.has("wait_all")) {
    if (in.has("wait_group")) {
      d.expect_operands(in, 1);
      op.imm = static_cast<i64>(in.operands[0].bits);
    } else {
      op.imm = -1;
    }
    op.exec = [](Warp& w, const Op& o, u32 mask) { w.wait_copies(mask, static_cast<u32>(o.imm)); };
    d.set(op, {}, {});
    return;
  }
  if (in.has("bulk")) Decoder::fail("cp.async.bulk");
  if (in.operands.size() < 3 || in.operands.size() > 4)
    Decoder::fail("cp.async with " + std::to_string(in.operands.size()) + " operands");
  const u64 bytes = in.operands[2].bits;
  if (bytes != 4 && bytes != 8 && bytes != 16) Decoder::fail("cp.async of other than 4, 8 or 16 bytes");
  op.width = static_cast<u8>(bytes);
  std::vector<Reg> src = {d.address_base(in.operands[0], op.wide_address),
                          d.address_base(in.operands[1], op.wide_address2)};
  if (in.operands.size() == 4) {
    const Operand& o = in.operands[3];
    op.saturate = o.kind == Operand::kName && d.is_register(o.name) && d.type_of(o.name) == "pred";
    src.push_back(op.saturate ? d.predicate(o) : d.source(o, "u32"));
  }
  op.imm = in.operands[0].offset;
  op.imm2 = in.operands[1].offset;
  d.set(op, {}, src);
  op.exec = &async_copy;
}

// wmma.load.{a|b|c}.sync.aligned.layout.shape[.space].type registers, [address] [, stride]; wmma.store.d likewise.
void decode_fragment(Decoder& d, const Instruction& in, Op& op) {
  const bool is_load = in.has("load");
  const std::string type = in.last();
  int m = 0, n = 0, k = 0;
  for (const auto& modifier : in.modifiers)
    if (sscanf(modifier.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) break;
  const bool columns = in.has("col");
  if (!in.has("sync") || !in.has("aligned") || columns == in.has("row") || k == 0 || m * n * k > 1 << 14)
    Decoder::fail("wmma without a shape, an order, .sync or .aligned");
  const std::map<std::string, u8> sizes = {{"f16", 16}, {"bf16", 16}, {"tf32", 32}, {"f32", 32},
                                           {"s32", 32}, {"f64", 64},  {"s8", 8},    {"u8", 8},
                                           {"s4", 4},   {"u4", 4},    {"b1", 1}};
  if (!sizes.count(type)) Decoder::fail("wmma of type ." + type);
  Fragment part;
  part.bits = sizes.at(type);
  const bool of_a = in.has("a"), of_b = in.has("b");
  const int rows = of_b ? k : m, columns_of = of_a ? k : n;
  part.line = static_cast<u16>(columns ? rows : columns_of);
  part.count = static_cast<u8>(rows * columns_of / kLanes);
  part.by_columns = columns && !of_a && !of_b;
  part.columns = static_cast<u8>(columns_of);
  if (part.bits < 8 && columns != of_b) Decoder::fail("wmma: of small elements, A is by rows and B by columns");
  op.width = part.bits == 64 ? 8 : 4;
  op.wide = part.bits == 64;
  const bool copies = type == "f16" && (of_a || of_b);
  part.registers = static_cast<u8>(copies ? 8 : part.count * part.bits / (8 * op.width));
  op.imm2 = std::bit_cast<i64>(part);
  const Operand& place = in.operands.at(is_load ? 1 : 0);
  const Operand& values = in.operands.at(is_load ? 0 : 1);
  const auto list = values.kind == Operand::kVector ? values.list : std::vector<Operand>{values};
  if (list.size() != part.registers)
    Decoder::fail("wmma with " + std::to_string(list.size()) + " registers, expected " +
                  std::to_string(part.registers));
  if (in.operands.size() > 3) Decoder::fail("wmma with more than a stride");
  std::vector<Reg> dst, src = {d.address_base(place, op.wide_address)};
  op.imm = place.offset;
  src.push_back(in.operands.size() == 3 ? d.source(in.operands[2], "u32") : d.constant(part.line, false));
  for (const auto& o : list)
    (is_load ? dst : src)
        .push_back(is_load ? d.result(o, op.wide ? "b64" : "b32") : d.source(o, op.wide ? "b64" : "b32"));
  d.set(op, dst, src);
  op.space = space_of(in);
  op.exec = is_load ? &load_fragment : &store_fragment;
  op.flow = Flow::kMeet;
  op.aligned = true;
  op.rule = Rule::kOwn;
}

}  // namespace

bool decode_memory(Decoder& d, const Instruction& in, Op& op) {
  const std::string& o = in.opcode;
  if (o == "ld" || o == "ldu") {
    decode_access(d, in, op, true);
  } else if (o == "st") {
    decode_access(d, in, op, false);
  } else if (o == "atom") {
    decode_atomic(d, in, op, true);
  } else if (o == "red") {
    decode_atomic(d, in, op, false);
  } else if (o == "cp") {
    if (!in.has("async") || in.has("mbarrier")) return false;
    decode_async(d, in, op);
  } else if (o == "ldmatrix") {
    op.vector = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
    if (!in.has("m8n8") || in.last() != "b16") return false;
    op.transposed = in.has("trans");
    op.space = Space::kShared;
    op.width = 4;  // of what a lane gets
    d.expect_operands(in, 2);
    const Operand& to = in.operands[0];
    std::vector<Operand> list = to.kind == Operand::kVector ? to.list : std::vector<Operand>{to};
    if (list.size() != op.vector) Decoder::fail("ldmatrix with " + std::to_string(list.size()) + " results");
    std::vector<Reg> dst;
    for (const auto& r : list) dst.push_back(d.result(r, "b32"));
    const Reg base = d.address_base(in.operands[1], op.wide_address);
    op.imm = in.operands[1].offset;
    d.set(op, dst, {base});
    op.exec = &load_matrix;
    op.flow = Flow::kMeet;
    op.aligned = true;
    op.rule = Rule::kOwn;
  } else if (o == "wmma") {
    if (in.has("mma")) return false;
    decode_fragment(d, in, op);
  } else if (o == "prefetch" || o == "prefetchu" || o == "discard" || o == "applypriority") {
    d.set(op, {}, {});
    op.exec = [](Warp&, const Op&, u32) {};
    op.rule = Rule::kOwn;
  } else if (o == "createpolicy") {
    d.set(op, {d.result(in.operands.at(0), "b64")}, {});
    op.exec = [](Warp& w, const Op& p, u32 mask) { w.set_valid(p.regs[0], mask); };
    op.rule = Rule::kOwn;
  } else {
    return false;
  }
  return true;
}

}  // namespace gpusim
