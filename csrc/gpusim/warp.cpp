// What lanes of a warp do together: shuffles, votes, matches, reductions. Source: PTX ISA 8.8, sections 9.7.9 (shfl)
// and 9.7.13 (vote, match, redux).
#include <algorithm>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

// The cells of one operand, each lane's from the operation that the lane stands at.
template <class T>
void gather(Warp& w, const Op& op, int operand, u32 mask, T* out) {
  if (w.meeting == nullptr) {
    memcpy(out, w.reg<T>(op, operand), sizeof(T) * kLanes);
    return;
  }
  for (int l = 0; l < kLanes; ++l) out[l] = mask >> l & 1 ? w.reg<T>(*w.meeting[l], operand)[l] : T{0};
}

template <class T>
void scatter(Warp& w, const Op& op, u32 mask, const T* values) {
  for_each_op(w, op, mask, [&](const Op& o, u32 m) {
    T* d = w.reg<T>(o, 0);
    for (int l = 0; l < kLanes; ++l)
      if (m >> l & 1) d[l] = values[l];
    w.set_valid(o.regs[0], m);
  });
}
void scatter_predicate(Warp& w, const Op& op, int operand, u32 mask, u32 bits) {
  for_each_op(w, op, mask, [&](const Op& o, u32 m) {
    u32& p = *w.reg<u32>(o, operand);
    p = (p & ~m) | (bits & m);
    w.set_valid(o.regs[operand], m);
  });
}

void require(Warp& w, const Op& op, int operand, u32 mask, u8 bytes, const char* what) {
  for_each_op(w, op, mask, [&](const Op& o, u32 m) { w.require_valid(o, o.regs[operand], m, bytes, what); });
}

enum ShuffleMode : i64 { kUp, kDown, kBfly, kIdx };

void shuffle(Warp& w, const Op& op, u32 mask) {
  // regs: d [, p], a, b, c, membermask; imm: mode
  const int first = op.num_dst;
  u32 a[kLanes], b[kLanes], c[kLanes], values[kLanes], inside = 0;
  gather(w, op, first, mask, a), gather(w, op, first + 1, mask, b), gather(w, op, first + 2, mask, c);
  require(w, op, first + 1, mask, 0x0f, "a shuffle's lane");
  u8 valid[kLanes], got[kLanes];
  u32 origin = 0;
  for_each_op(w, op, mask, [&](const Op& o, u32 m) {
    const Reg& r = o.regs[first];
    if (w.partial[r.id]) origin = w.origin[r.id];
    for (int l = 0; l < kLanes; ++l)
      if (m >> l & 1) valid[l] = w.partial[r.id] ? w.valid[r.id][l] : 0xff;
  });
  bool all = true;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const u32 clamp = c[l] & 31, segment = c[l] >> 8 & 31, lane = static_cast<u32>(l), n = b[l] & 31;
    const u32 most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    i32 j = l;
    bool in = false;
    switch (op.imm) {
      case kUp: j = l - static_cast<i32>(n), in = j >= static_cast<i32>(most); break;
      case kDown: j = l + static_cast<i32>(n), in = j <= static_cast<i32>(most); break;
      case kBfly: j = static_cast<i32>(lane ^ n), in = j <= static_cast<i32>(most); break;
      default: j = static_cast<i32>(least | (n & ~segment)), in = j <= static_cast<i32>(most); break;
    }
    if (!in) j = l;
    inside |= static_cast<u32>(in) << l;
    const bool present = mask >> (j & 31) & 1;  // of a lane that is not here, the result is undefined
    values[l] = present ? a[j & 31] : 0;
    got[l] = present ? valid[j & 31] : 0;
    all = all && got[l] == 0xff;
  }
  scatter(w, op, mask, values);
  if (!all) {
    for_each_op(w, op, mask, [&](const Op& o, u32 m) {
      const Reg& r = o.regs[0];
      if (!w.partial[r.id]) w.valid[r.id].fill(0xff), w.partial[r.id] = 1;
      for (int l = 0; l < kLanes; ++l)
        if (m >> l & 1) w.valid[r.id][l] = got[l];
      w.origin[r.id] = origin ? origin : o.index + 1;
    });
  }
  if (op.num_dst > 1) scatter_predicate(w, op, 1, mask, inside);
}

enum VoteMode : i64 { kAllOf, kAnyOf, kUni, kBallot };

void vote(Warp& w, const Op& op, u32 mask) {
  // regs: d, predicate, membermask; imm: mode, bit 2: of the predicate's complement
  require(w, op, 1, mask, 1, "a vote");
  u32 p = 0;
  for_each_op(w, op, mask, [&](const Op& o, u32 m) { p |= (*w.reg<u32>(o, 1) ^ (o.imm & 4 ? kAllLanes : 0)) & m; });
  const i64 mode = op.imm & 3;
  if (mode == kBallot) {
    u32 values[kLanes];
    std::fill(values, values + kLanes, p);
    return scatter(w, op, mask, values);
  }
  const bool yes = mode == kAllOf ? p == mask : mode == kAnyOf ? p != 0 : p == 0 || p == mask;
  scatter_predicate(w, op, 0, mask, yes ? kAllLanes : 0);
}

template <class T>
void match(Warp& w, const Op& op, u32 mask) {
  // regs: d [, p], a, membermask; imm: 1 for all
  const int first = op.num_dst;
  require(w, op, first, mask, sizeof(T) == 8 ? 0xff : 0x0f, "a match");
  T a[kLanes];
  gather(w, op, first, mask, a);
  u32 values[kLanes], equal = kAllLanes;
  for (int l = 0; l < kLanes; ++l) {
    values[l] = 0;
    for (int k = 0; k < kLanes; ++k)
      if (mask >> l & mask >> k & 1 && a[l] == a[k]) values[l] |= 1u << k;
    if (mask >> l & 1 && values[l] != mask) equal = 0;
  }
  if (op.imm)
    for (u32& v : values) v = equal ? mask : 0;
  scatter(w, op, mask, values);
  if (op.num_dst > 1) scatter_predicate(w, op, 1, mask, equal);
}

template <class T>
void redux(Warp& w, const Op& op, u32 mask) {
  require(w, op, 1, mask, 0x0f, "a warp reduction");
  T a[kLanes];
  gather(w, op, 1, mask, a);
  bool first = true;
  T r = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first)
      r = a[l];
    else
      switch (op.imm) {
        case 0: r = static_cast<T>(static_cast<u32>(r) + static_cast<u32>(a[l])); break;
        case 1: r = std::min(r, a[l]); break;
        case 2: r = std::max(r, a[l]); break;
        case 3: r &= a[l]; break;
        case 4: r |= a[l]; break;
        default: r ^= a[l]; break;
      }
    first = false;
  }
  T values[kLanes];
  std::fill(values, values + kLanes, r);
  scatter(w, op, mask, values);
}

}  // namespace

bool decode_warp(Decoder& d, const Instruction& in, Op& op) {
  const std::string& o = in.opcode;
  op.rule = Rule::kOwn;
  // Lanes may come to the same kind of operation at different places.
  const auto meets = [&](const std::string& what) {
    op.flow = Flow::kMeet;
    op.meeting = d.meeting(what);
    return true;
  };
  if (o == "shfl") {
    if (!in.has("sync")) return false;
    d.expect_operands(in, 5);
    std::vector<Reg> dst;
    const Operand& to = in.operands[0];
    if (to.kind == Operand::kPair)
      dst = {d.result(to.list[0], "b32"), d.predicate_or_sink(to.list[1])};
    else
      dst = {d.result(to, "b32")};
    op.imm = in.has("up") ? kUp : in.has("down") ? kDown : in.has("bfly") ? kBfly : kIdx;
    std::vector<Reg> src;
    for (size_t i = 1; i < 5; ++i) src.push_back(d.source(in.operands[i], "b32"));
    d.set(op, dst, src);
    op.exec = &shuffle;
    return meets("shfl." + std::to_string(op.imm) + "." + std::to_string(dst.size()));
  }
  if (o == "vote") {
    if (!in.has("sync")) return false;
    d.expect_operands(in, 3);
    op.imm = in.has("all") ? kAllOf : in.has("any") ? kAnyOf : in.has("uni") ? kUni : kBallot;
    const bool ballot = op.imm == kBallot;
    if (in.operands[1].negated) op.imm |= 4;
    d.set(op, {ballot ? d.result(in.operands[0], "b32") : d.predicate(in.operands[0])},
          {d.predicate(in.operands[1], true), d.source(in.operands[2], "b32")});
    op.exec = &vote;
    return meets("vote." + std::to_string(op.imm & 3));
  }
  if (o == "activemask") {
    d.expect_operands(in, 1);
    d.set(op, {d.result(in.operands[0], "b32")}, {});
    op.exec = [](Warp& w, const Op& p, u32 mask) {
      u32* r = w.reg<u32>(p, 0);
      for (int l = 0; l < kLanes; ++l)
        if (mask >> l & 1) r[l] = mask;
      w.set_valid(p.regs[0], mask);
    };
    return true;
  }
  if (o == "redux") {
    d.expect_operands(in, 3);
    const std::vector<std::string> names = {"add", "min", "max", "and", "or", "xor"};
    op.imm = -1;
    for (size_t i = 0; i < names.size(); ++i)
      if (in.has(names[i].c_str())) op.imm = static_cast<i64>(i);
    const std::string type = in.last();
    if (op.imm < 0 || type_bytes(type) != 4 || type == "f32") return false;
    d.set(op, {d.result(in.operands[0], type)}, {d.source(in.operands[1], type), d.source(in.operands[2], "b32")});
    op.exec = type == "s32" ? &redux<i32> : &redux<u32>;
    return meets("redux." + std::to_string(op.imm) + type);
  }
  if (o == "match") {
    if (!in.has("sync")) return false;
    d.expect_operands(in, 3);
    const bool all = in.has("all"), wide = in.last() == "b64";
    if (!wide && in.last() != "b32") return false;
    const Operand& to = in.operands[0];
    std::vector<Reg> dst;
    if (to.kind == Operand::kPair)
      dst = {d.result(to.list[0], "b32"), d.predicate_or_sink(to.list[1])};
    else
      dst = {d.result(to, "b32")};
    if (!all && dst.size() > 1) return false;
    op.imm = all;
    d.set(op, dst, {d.source(in.operands[1], in.last()), d.source(in.operands[2], "b32")});
    op.exec = wide ? &match<u64> : &match<u32>;
    return meets("match." + std::to_string(op.imm));
  }
  if (o == "griddepcontrol") {
    d.set(op, {}, {});
    op.exec = [](Warp&, const Op&, u32) {};
    return true;
  }
  if (o == "trap" || o == "brkpt") {
    d.set(op, {}, {});
    op.exec = [](Warp& w, const Op& p, u32 mask) {
      w.raise(p, std::countr_zero(mask), "trap", "trap: the kernel stopped itself");
    };
    return true;
  }
  return false;
}

}  // namespace gpusim
