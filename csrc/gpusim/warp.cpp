// What lanes of a warp do together: shuffles, votes, barriers and matrix products. Source: PTX ISA 8.8, sections 9.7.9
// (shfl), 9.7.13 (barriers, vote, match, redux) and 9.7.14 (fragments of mma).
#include <algorithm>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

// Every live lane that the mask names must be here: a rendezvous of lanes that are at different places is not modelled.
u32 members(Warp& w, const Op& op, u32 mask, u32 named) {
  if (named & ~mask & w.live)
    w.raise(op, std::countr_zero(named & ~mask & w.live), "unsupported",
            "unsupported: a .sync operation whose lanes arrive from different places");
  if (mask & ~named)
    w.raise(op, std::countr_zero(mask & ~named), "barrier", "barrier divergence: a lane that the mask does not name");
  return named & w.live;
}

u32 member_mask(Warp& w, const Op& op, int source, u32 mask) {
  const Reg& r = op.regs[source];
  w.require_valid(op, r, mask, 0x0f, "a member mask");
  return reinterpret_cast<u32*>(w.file + r.value)[std::countr_zero(mask)];
}

enum ShuffleMode : i64 { kUp, kDown, kBfly, kIdx };

void shuffle(Warp& w, const Op& op, u32 mask) {
  // regs: d [, p], a, b, c, membermask; imm: mode
  const int first = op.num_dst;
  const u32 here = members(w, op, mask, member_mask(w, op, first + 3, mask));
  const u32 *a = w.reg<u32>(op, first), *b = w.reg<u32>(op, first + 1), *c = w.reg<u32>(op, first + 2);
  w.require_valid(op, op.regs[first + 1], mask, 0x0f, "a shuffle's lane");
  u32 values[kLanes], inside = 0, from_valid = kAllLanes;
  u8 bytes[kLanes];
  const Reg& ra = op.regs[first];
  for (int l = 0; l < kLanes; ++l) {
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
    values[l] = a[j & 31];
    inside |= static_cast<u32>(in) << l;
    bytes[l] = here >> (j & 31) & 1 ? (w.partial[ra.id] ? w.valid[ra.id][j & 31] : 0xff) : 0;
    if (mask >> l & 1 && bytes[l] != 0xff) from_valid &= ~(1u << l);
  }
  u32* d = w.reg<u32>(op, 0);
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) d[l] = values[l];
  w.set_valid(op.regs[0], mask);
  if (from_valid != kAllLanes) {
    const Reg& r = op.regs[0];
    if (!w.partial[r.id]) w.valid[r.id].fill(0xff), w.partial[r.id] = 1;
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) w.valid[r.id][l] = bytes[l];
    w.origin[r.id] = w.partial[ra.id] ? w.origin[ra.id] : op.index + 1;
  }
  if (op.num_dst > 1) {
    u32& p = *w.reg<u32>(op, 1);
    p = (p & ~mask) | (inside & mask);
    w.set_valid(op.regs[1], mask);
  }
}

enum VoteMode : i64 { kAllOf, kAnyOf, kUni, kBallot };

void vote(Warp& w, const Op& op, u32 mask) {
  // regs: d, predicate, membermask; imm: mode, bit 2: of the predicate's complement
  const u32 here = members(w, op, mask, member_mask(w, op, 2, mask));
  w.require_valid(op, op.regs[1], here, 1, "a vote");
  const u32 p = (*w.reg<u32>(op, 1) ^ (op.imm & 4 ? kAllLanes : 0)) & here;
  const i64 mode = op.imm & 3;
  if (mode == kBallot) {
    u32* d = w.reg<u32>(op, 0);
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) d[l] = p;
  } else {
    const bool yes = mode == kAllOf ? p == here : mode == kAnyOf ? p != 0 : p == 0 || p == here;
    u32& d = *w.reg<u32>(op, 0);
    d = yes ? d | mask : d & ~mask;
  }
  w.set_valid(op.regs[0], mask);
}

template <class T>
void redux(Warp& w, const Op& op, u32 mask) {
  const u32 here = members(w, op, mask, member_mask(w, op, 2, mask));
  w.require_valid(op, op.regs[1], here, 0x0f, "a warp reduction");
  const T* a = w.reg<T>(op, 1);
  bool first = true;
  T r = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(here >> l & 1)) continue;
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
  T* d = w.reg<T>(op, 0);
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) d[l] = r;
  w.set_valid(op.regs[0], mask);
}

// ---- matrix products: fragments are gathered into plain matrices, products are exact, sums are float64, rounded once
struct Shape {
  int m, n, k;
};

// Row and column of element e of register r of a fragment, in lane (g = lane / 4, t = lane % 4). `per` elements a
// register; tables of PTX ISA 9.7.14.5.
inline void place_a(int per, int r, int e, int g, int t, int& row, int& column) {
  row = g + 8 * (r & 1);
  column = t * per + e + 4 * per * (r >> 1);
}
inline void place_b(int per, int r, int e, int g, int t, int& row, int& column) {
  row = t * per + e + 4 * per * r;
  column = g;
}

template <class In>
double element(const u32* reg, int lane, int e);
template <>
double element<f16>(const u32* reg, int lane, int e) {
  return to_float(f16{static_cast<u16>(reg[lane] >> (16 * e))});
}
template <>
double element<bf16>(const u32* reg, int lane, int e) {
  return to_float(bf16{static_cast<u16>(reg[lane] >> (16 * e))});
}
template <>
double element<float>(const u32* reg, int lane, int) {
  return bits_as<float>(reg[lane] & ~0x1fffu);
}  // tf32
template <>
double element<i8>(const u32* reg, int lane, int e) {
  return static_cast<i8>(reg[lane] >> (8 * e));
}
template <>
double element<u8>(const u32* reg, int lane, int e) {
  return static_cast<u8>(reg[lane] >> (8 * e));
}

// An element of the product is valid where its row of A, its column of B and its own addend are.
void mma_validity(Warp& w, const Op& op, int num_a, int num_b, int rows) {
  const auto partial = [&](int i) { return w.partial[op.regs[i].id] != 0; };
  bool any = false;
  u32 origin = 0;
  for (int i = op.num_dst; i < op.num_dst + op.num_src; ++i)
    if (partial(i)) any = true, origin = w.origin[op.regs[i].id];
  if (!any) {
    for (int e = 0; e < op.num_dst; ++e) w.set_valid(op.regs[e], kAllLanes);
    return;
  }
  u32 bad_rows = 0, bad_columns = 0;
  const auto bad = [&](int i, int l) { return partial(i) && w.valid[op.regs[i].id][l] != 0xff; };
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < num_a; ++r)
      if (bad(op.num_dst + r, l)) bad_rows |= 1u << (l / 4 + (rows == 16 ? 8 * (r & 1) : 0));
    for (int r = 0; r < num_b; ++r)
      if (bad(op.num_dst + num_a + r, l)) bad_columns |= 1u << (l / 4);
  }
  const int c0 = op.num_dst + num_a + num_b;
  const bool packed = op.num_dst == 2 && rows == 16;  // two f16 results a register
  u8 valid[4][kLanes];
  for (int e = 0; e < op.num_dst; ++e)
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + (rows == 16 ? 8 * (packed ? e : e >> 1) : 0), column = 2 * (l % 4);
      const u32 columns = packed ? 3u << column : 1u << (column + (e & 1));
      valid[e][l] = !(bad_rows >> row & 1) && !(bad_columns & columns) && !bad(c0 + e, l) ? 0xff : 0;
    }
  for (int e = 0; e < op.num_dst; ++e) {
    const Reg& r = op.regs[e];
    w.partial[r.id] = 1;
    memcpy(w.valid[r.id].data(), valid[e], kLanes);
    w.origin[r.id] = origin;
  }
}

template <class A, class B, class Acc>
void mma(Warp& w, const Op& op, u32 mask) {
  if (mask != kAllLanes)
    w.raise(op, std::countr_zero(~mask), "barrier", "barrier divergence: mma without all lanes of the warp");
  constexpr int per = std::is_same_v<A, float> ? 1 : sizeof(A) == 2 ? 2 : 4;
  const int k = static_cast<int>(op.imm), num_d = op.num_dst;
  const int num_a = k / (4 * per) * 2, num_b = k / (4 * per);
  double a[16][64], b[64][8], sum[16][8];
  for (int r = 0; r < num_a; ++r) {
    const u32* reg = w.reg<u32>(op, num_d + r);
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < per; ++e) {
        int row, column;
        place_a(per, r, e, l / 4, l % 4, row, column);
        a[row][column] = element<A>(reg, l, e);
      }
  }
  for (int r = 0; r < num_b; ++r) {
    const u32* reg = w.reg<u32>(op, num_d + num_a + r);
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < per; ++e) {
        int row, column;
        place_b(per, r, e, l / 4, l % 4, row, column);
        b[row][column] = element<B>(reg, l, e);
      }
  }
  const int c0 = num_d + num_a + num_b;
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 4; ++e) {
      double v;
      if constexpr (std::is_same_v<Acc, f16>) {
        v = to_float(f16{static_cast<u16>(w.reg<u32>(op, c0 + e / 2)[l] >> (16 * (e & 1)))});
      } else {
        v = static_cast<double>(w.reg<Acc>(op, c0 + e)[l]);
      }
      sum[l / 4 + 8 * (e >> 1)][2 * (l % 4) + (e & 1)] = v;
    }
  for (int i = 0; i < 16; ++i)
    for (int p = 0; p < k; ++p)
      for (int j = 0; j < 8; ++j) sum[i][j] += a[i][p] * b[p][j];
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 4; ++e) {
      const double v = sum[l / 4 + 8 * (e >> 1)][2 * (l % 4) + (e & 1)];
      if constexpr (std::is_same_v<Acc, f16>) {
        u32& d = w.reg<u32>(op, e / 2)[l];
        const int shift = 16 * (e & 1);
        d = (d & ~(0xffffu << shift)) | static_cast<u32>(f16_bits(v)) << shift;
      } else if constexpr (std::is_same_v<Acc, float>) {
        w.reg<float>(op, e)[l] = canonical(static_cast<float>(v));
      } else {
        w.reg<i32>(op, e)[l] = op.saturate ? saturate<i32>(v, Round::kNearest) : static_cast<i32>(static_cast<i64>(v));
      }
    }
  mma_validity(w, op, num_a, num_b, 16);
}

void mma_f64(Warp& w, const Op& op, u32 mask) {  // m8n8k4
  if (mask != kAllLanes)
    w.raise(op, std::countr_zero(~mask), "barrier", "barrier divergence: mma without all lanes of the warp");
  const double *a = w.reg<double>(op, 2), *b = w.reg<double>(op, 3);
  double d[2][kLanes];
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 2; ++e) {
      double s = w.reg<double>(op, 4 + e)[l];
      for (int k = 0; k < 4; ++k) s = std::fma(a[4 * (l / 4) + k], b[4 * (2 * (l % 4) + e) + k], s);
      d[e][l] = canonical(s);
    }
  for (int e = 0; e < 2; ++e) memcpy(w.reg<double>(op, e), d[e], sizeof(d[e]));
  mma_validity(w, op, 1, 1, 8);
}

bool decode_mma(Decoder& d, const Instruction& in, Op& op) {
  if (in.modifiers.size() < 8 || !in.has("sync") || !in.has("aligned")) return false;
  std::vector<std::string> types;
  for (const auto& m : in.modifiers)
    if (type_bytes(m) > 0 || m == "tf32" || m == "s4" || m == "u4" || m == "b1") types.push_back(m);
  if (types.size() != 4 || !in.has("row") || !in.has("col")) return false;
  std::string shape;
  for (const auto& m : in.modifiers)
    if (m[0] == 'm' && m.find('n') != std::string::npos && m.find('k') != std::string::npos) shape = m;
  const std::string &td = types[0], &ta = types[1], &tb = types[2], &tc = types[3];
  if (in.modifiers.at(0) == "sp" || in.has("sp::ordered_metadata") || td != tc) return false;
  std::string element = "b32", acc = "b32";
  if (shape == "m8n8k4" && ta == "f64") {
    op.exec = &mma_f64;
    element = acc = "f64";
  } else {
    if (shape.rfind("m16n8k", 0) != 0) return false;
    const int k = std::stoi(shape.substr(6));
    op.imm = k;
    op.saturate = in.has("satfinite");
    if (ta == "bf16" && tb == "bf16" && td == "f32" && (k == 8 || k == 16)) op.exec = &mma<bf16, bf16, float>;
    if (ta == "f16" && tb == "f16" && td == "f32" && (k == 8 || k == 16)) op.exec = &mma<f16, f16, float>;
    if (ta == "f16" && tb == "f16" && td == "f16" && (k == 8 || k == 16)) op.exec = &mma<f16, f16, f16>;
    if (ta == "tf32" && tb == "tf32" && td == "f32" && (k == 4 || k == 8)) op.exec = &mma<float, float, float>;
    if (td == "s32" && (k == 16 || k == 32)) {
      if (ta == "s8" && tb == "s8") op.exec = &mma<i8, i8, i32>;
      if (ta == "u8" && tb == "u8") op.exec = &mma<u8, u8, i32>;
      if (ta == "s8" && tb == "u8") op.exec = &mma<i8, u8, i32>;
      if (ta == "u8" && tb == "s8") op.exec = &mma<u8, i8, i32>;
    }
    if (ta == "tf32" && k == 4) op.exec = nullptr;  // two registers of A, one of B: not in the table above
  }
  if (op.exec == nullptr) return false;
  d.expect_operands(in, 4);
  std::vector<Reg> dst, src;
  auto list = [](const Operand& o) { return o.kind == Operand::kVector ? o.list : std::vector<Operand>{o}; };
  for (const auto& o : list(in.operands[0])) dst.push_back(d.result(o, acc));
  const int per = ta == "tf32" ? 1 : ta == "f16" || ta == "bf16" ? 2 : 4;
  const size_t num_a = acc == "f64" ? 1 : static_cast<size_t>(op.imm) / (4 * per) * 2;
  const size_t num_b = acc == "f64" ? 1 : static_cast<size_t>(op.imm) / (4 * per);
  const size_t num_d = acc == "f64" || td == "f16" ? 2 : 4;
  const size_t lengths[] = {num_d, num_a, num_b, num_d};
  for (size_t i = 0; i < 4; ++i)
    if (list(in.operands[i]).size() != lengths[i])
      Decoder::fail("mma with " + std::to_string(list(in.operands[i]).size()) + " registers for operand " +
                    std::to_string(i));
  for (size_t i = 1; i < 4; ++i)
    for (const auto& o : list(in.operands[i])) src.push_back(d.source(o, i == 3 ? acc : element));
  d.set(op, dst, src);
  return true;
}

void nothing(Warp&, const Op&, u32) {}

}  // namespace

bool decode_warp(Decoder& d, const Instruction& in, Op& op) {
  const std::string& o = in.opcode;
  op.rule = Rule::kOwn;
  if (o == "shfl") {
    if (!in.has("sync")) return false;
    d.expect_operands(in, 5);
    std::vector<Reg> dst;
    const Operand& to = in.operands[0];
    if (to.kind == Operand::kPair)
      dst = {d.result(to.list[0], "b32"), to.list[1].name == "_" ? d.sink(false) : d.predicate(to.list[1])};
    else
      dst = {d.result(to, "b32")};
    op.imm = in.has("up") ? kUp : in.has("down") ? kDown : in.has("bfly") ? kBfly : kIdx;
    std::vector<Reg> src;
    for (size_t i = 1; i < 5; ++i) src.push_back(d.source(in.operands[i], "b32"));
    d.set(op, dst, src);
    op.exec = &shuffle;
    return true;
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
    return true;
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
    return true;
  }
  if (o == "bar" || o == "barrier") {
    if (in.has("warp")) {
      d.expect_operands(in, 1);
      d.set(op, {}, {d.source(in.operands[0], "b32")});
      op.exec = [](Warp& w, const Op& p, u32 mask) {
        members(w, p, mask, member_mask(w, p, 0, mask));
        if (w.clock[w.index] >= kMaxTime) w.raise(p, 0, "unsupported", "unsupported: more than a million barriers");
        w.clock[w.index] += 1;
      };
      return true;
    }
    if (!in.has("sync") || in.operands.empty() || in.operands.size() > 2) return false;
    op.flow = Flow::kBarrier;
    std::vector<Reg> src;
    for (const auto& operand : in.operands) src.push_back(d.source(operand, "u32"));
    d.set(op, {}, src);
    return true;
  }
  if (o == "fence" || o == "membar" || o == "nanosleep" || o == "griddepcontrol") {
    d.set(op, {}, {});
    op.exec = &nothing;
    return true;
  }
  if (o == "trap" || o == "brkpt") {
    d.set(op, {}, {});
    op.exec = [](Warp& w, const Op& p, u32 mask) {
      w.raise(p, std::countr_zero(mask), "trap", "trap: the kernel stopped itself");
    };
    return true;
  }
  return o == "mma" && decode_mma(d, in, op);
}

}  // namespace gpusim
