// Matrix products of a warp: fragments are gathered into plain matrices, products are exact, sums are
// float64 and rounded once. Source: PTX ISA 8.8, section 9.7.14 (fragments).
//
// Perturbed, sums are taken in groups of four products in an order of their own and truncated to float32 after each, as
// tensor cores may.
#include <algorithm>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

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
void mma(Warp& w, const Op& op, u32) {
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
  if (std::is_same_v<Acc, i32> || w.cta->program.perturbation == 0) {
    for (int i = 0; i < 16; ++i)
      for (int p = 0; p < k; ++p)
        for (int j = 0; j < 8; ++j) sum[i][j] += a[i][p] * b[p][j];
  } else {
    const int turn = static_cast<int>(w.cta->program.perturbation % static_cast<u64>(k));
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j)
        for (int p = 0; p < k; p += 4) {
          for (int q = p; q < p + 4; ++q) sum[i][j] += a[i][(q + turn) % k] * b[(q + turn) % k][j];
          sum[i][j] = round_to(sum[i][j], 23, -126, std::numeric_limits<float>::max(), Round::kZero);
        }
  }
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

void mma_f64(Warp& w, const Op& op, u32) {  // m8n8k4
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

// m8n8k16 of 8-bit integers, one register of A and of B a lane
template <class A, class B>
void mma_bytes(Warp& w, const Op& op, u32) {
  const u32 *a = w.reg<u32>(op, 2), *b = w.reg<u32>(op, 3);
  i32 d[2][kLanes];
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 2; ++e) {
      double s = w.reg<i32>(op, 4 + e)[l];
      for (int k = 0; k < 16; ++k)
        s += element<A>(a, 4 * (l / 4) + k / 4, k % 4) * element<B>(b, 4 * (2 * (l % 4) + e) + k / 4, k % 4);
      d[e][l] = op.saturate ? saturate<i32>(s, Round::kNearest) : static_cast<i32>(static_cast<i64>(s));
    }
  for (int e = 0; e < 2; ++e) memcpy(w.reg<i32>(op, e), d[e], sizeof(d[e]));
  mma_validity(w, op, 1, 1, 8);
}

// m8n8k4 of float16, four products at once: each by four lanes and the four that stand sixteen behind them.
// imm: 1 for A by columns, 2 for B by rows
void mma_quads(Warp& w, const Op& op, u32) {
  const auto half = [&](int operand, int lane, int e) {
    return static_cast<double>(
        to_float(f16{static_cast<u16>(w.reg<u32>(op, operand + e / 2)[lane] >> (16 * (e & 1)))}));
  };
  const int d0 = op.num_dst, c0 = d0 + 4;
  float d[8][kLanes];
  bool valid = true;
  u32 origin = 0;
  for (int i = d0; i < d0 + op.num_src; ++i)
    if (w.partial[op.regs[i].id]) valid = false, origin = w.origin[op.regs[i].id];
  for (int quad = 0; quad < 4; ++quad) {
    double a[8][4], b[4][8];
    for (int t = 0; t < 8; ++t) {
      const int lane = 4 * quad + t % 4 + (t / 4) * 16, upper = 4 * (t / 4);
      for (int e = 0; e < 4; ++e) {
        (op.imm & 1 ? a[upper + e][t % 4] : a[upper + t % 4][e]) = half(d0, lane, e);
        (op.imm & 2 ? b[t % 4][upper + e] : b[e][upper + t % 4]) = half(d0 + 2, lane, e);
      }
    }
    for (int t = 0; t < 8; ++t) {
      const int lane = 4 * quad + t % 4 + (t / 4) * 16;
      for (int e = 0; e < 8; ++e) {
        const int row = (lane & 1) + (e & 2) + 4 * (t / 4), column = (e & 4) + (lane & 2) + (e & 1);
        double s = w.reg<float>(op, c0 + e)[lane];
        for (int k = 0; k < 4; ++k) s += a[row][k] * b[k][column];
        d[e][lane] = canonical(static_cast<float>(s));
      }
    }
  }
  for (int e = 0; e < 8; ++e) {
    memcpy(w.reg<float>(op, e), d[e], sizeof(d[e]));
    const Reg& r = op.regs[e];
    if (valid)
      w.set_valid(r, kAllLanes);
    else
      w.partial[r.id] = 1, w.valid[r.id].fill(0), w.origin[r.id] = origin;
  }
}

bool decode_mma(Decoder& d, const Instruction& in, Op& op) {
  if (in.modifiers.size() < 8 || !in.has("sync") || !in.has("aligned")) return false;
  std::vector<std::string> types;
  for (const auto& m : in.modifiers)
    if (type_bytes(m) > 0 || m == "tf32" || m == "s4" || m == "u4" || m == "b1") types.push_back(m);
  if (types.size() != 4) return false;
  std::string shape;
  for (const auto& m : in.modifiers)
    if (m[0] == 'm' && m.find('n') != std::string::npos && m.find('k') != std::string::npos) shape = m;
  const std::string &td = types[0], &ta = types[1], &tb = types[2], &tc = types[3];
  if (in.modifiers.at(0) == "sp" || in.has("sp::ordered_metadata") || td != tc) return false;
  std::string element = "b32", acc = "b32";
  size_t num_a = 1, num_b = 1, num_d = 2;
  const bool quads = shape == "m8n8k4" && ta == "f16";
  if (quads) {
    if (tb != "f16" || td != "f32") return false;
    std::vector<std::string> orders;
    for (const auto& m : in.modifiers)
      if (m == "row" || m == "col") orders.push_back(m);
    if (orders.size() != 2) return false;
    op.imm = (orders[0] == "col" ? 1 : 0) | (orders[1] == "row" ? 2 : 0);
    op.exec = &mma_quads;
    acc = "f32", num_a = num_b = 2, num_d = 8;
  } else if (!in.has("row") || !in.has("col")) {
    return false;
  } else if (shape == "m8n8k16" && td == "s32") {
    op.saturate = in.has("satfinite");
    if (ta == "s8" && tb == "s8") op.exec = &mma_bytes<i8, i8>;
    if (ta == "u8" && tb == "u8") op.exec = &mma_bytes<u8, u8>;
    if (ta == "s8" && tb == "u8") op.exec = &mma_bytes<i8, u8>;
    if (ta == "u8" && tb == "s8") op.exec = &mma_bytes<u8, i8>;
  } else if (shape == "m8n8k4" && ta == "f64") {
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
    const int per = ta == "tf32" ? 1 : ta == "f16" || ta == "bf16" ? 2 : 4;
    num_a = static_cast<size_t>(k / (4 * per) * 2), num_b = static_cast<size_t>(k / (4 * per));
    num_d = td == "f16" ? 2 : 4;
  }
  if (op.exec == nullptr) return false;
  d.expect_operands(in, 4);
  std::vector<Reg> dst, src;
  auto list = [](const Operand& o) { return o.kind == Operand::kVector ? o.list : std::vector<Operand>{o}; };
  for (const auto& o : list(in.operands[0])) dst.push_back(d.result(o, acc));
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

}  // namespace

bool decode_matrix(Decoder& d, const Instruction& in, Op& op) {
  op.rule = Rule::kOwn;
  op.flow = Flow::kMeet;
  op.aligned = true;
  return in.opcode == "mma" && decode_mma(d, in, op);
}

}  // namespace gpusim
