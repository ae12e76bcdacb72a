// Matrix products of a warp: fragments are gathered into plain matrices, products are exact, sums are float64 and
// rounded once. Source: PTX ISA 8.8, section 9.7.14 (fragments, sparse storage); the order of sparse metadata among
// threads as CUTLASS's host_reorder.h arranges it in memory.
//
// mma      lanes 4 i to 4 i + 3 hold row i of a block of A and column i of one of B, in order, one register a block.
// wmma     fragments are the implementation's own: lane i has the i-th part of the matrix in the order of its memory,
// of
//          an accumulator in the order of its rows.
//
// Perturbed, sums are taken in groups of four products in an order of their own and truncated to float32 after each, as
// tensor cores may.
#include <algorithm>

#include "gpusim/numeric.h"

namespace gpusim {

namespace {

enum class Element : u8 { kF16, kBF16, kTF32, kS8, kU8, kS4, kU4, kB1, kNone };
enum class Sum : u8 { kF32, kF16, kS32 };

// What an operation multiplies; it lies in Op::imm and imm2.
struct Product {
  u16 k = 0;
  u8 m = 16, n = 8;
  Element a = Element::kNone, b = Element::kNone;
  Sum sum = Sum::kF32, addend = Sum::kF32;
  bool fragments = false;  // of wmma
  bool a_columns = false;  // of those: A's are by columns, B's by rows
  bool b_rows = false;
  bool sparse = false, ordered = false;
  bool ands = false;  // of bits: and, otherwise exclusive or
  u8 selector = 0;    // of the threads whose metadata count
  u8 padding = 0;
};

Product product_of(const Op& op) { return std::bit_cast<Product>(std::array{op.imm, op.imm2}); }
void keep(const Product& p, Op& op) {
  const auto words = std::bit_cast<std::array<i64, 2>>(p);
  op.imm = words[0], op.imm2 = words[1];
}

int bits_of(Element e) {
  switch (e) {
    case Element::kF16:
    case Element::kBF16: return 16;
    case Element::kTF32: return 32;
    case Element::kS8:
    case Element::kU8: return 8;
    case Element::kB1: return 1;
    default: return 4;
  }
}
int per_register(Element e) { return 32 / bits_of(e); }
bool is_integer(Element e) { return e >= Element::kS8; }

void unpack(Element kind, const u8* from, int count, double* to) {
  const auto each = [&](auto zero, auto value) {
    for (int i = 0; i < count; ++i) {
      auto bits = zero;
      memcpy(&bits, from + static_cast<size_t>(i) * sizeof(bits), sizeof(bits));
      to[i] = static_cast<double>(value(bits));
    }
  };
  switch (kind) {
    case Element::kF16: return each(u16{0}, [](u16 v) { return to_float(f16{v}); });
    case Element::kBF16: return each(u16{0}, [](u16 v) { return to_float(bf16{v}); });
    case Element::kTF32: return each(u32{0}, [](u32 v) { return bits_as<float>(v & ~0x1fffu); });
    case Element::kS8: return each(u8{0}, [](u8 v) { return static_cast<int>(static_cast<i8>(v)); });
    case Element::kU8: return each(u8{0}, [](u8 v) { return static_cast<int>(v); });
    case Element::kS4:
      for (int i = 0; i < count; ++i) to[i] = static_cast<i8>(static_cast<u8>(from[i / 2] >> 4 * (i & 1) << 4)) >> 4;
      return;
    default:
      for (int i = 0; i < count; ++i) to[i] = from[i / 2] >> 4 * (i & 1) & 15;
  }
}

// sum (m rows of N) += a (m rows of k) b (k rows of N)
template <int N>
void multiply(const Product& p, u64 perturbation, const double* a, const double* b, double* sum) {
  const int k = p.k;
  if (perturbation == 0 || is_integer(p.a)) {
    // Products are exact, so that it is no matter whether they are fused with the sums.
    typedef double Eight __attribute__((vector_size(64)));
    constexpr int kRows = 4, kVectors = N / 8;  // rows at once
    for (int i = 0; i < p.m; i += kRows) {
      Eight rows[kRows][kVectors], line[kVectors];
      memcpy(rows, sum + i * N, sizeof(rows));
      for (int q = 0; q < k; ++q) {
        memcpy(line, b + q * N, sizeof(line));
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) rows[r][v] += a[(i + r) * k + q] * line[v];
      }
      memcpy(sum + i * N, rows, sizeof(rows));
    }
    return;
  }
  const int turn = static_cast<int>(perturbation % static_cast<u64>(k));
  for (int i = 0; i < p.m; ++i)
    for (int j = 0; j < N; ++j)
      for (int first = 0; first < k; first += 4) {
        double& s = sum[i * N + j];
        for (int q = first; q < first + 4; ++q) s += a[i * k + (q + turn) % k] * b[(q + turn) % k * N + j];
        s = round_to(s, 23, -126, std::numeric_limits<float>::max(), Round::kZero);
      }
}

// The same of bits, in words of 32: what is counted are the places where both are set, or where they differ.
void count_bits(const Product& p, const u8* a, const u8* b, double* sum) {
  for (int i = 0; i < p.m; ++i)
    for (int j = 0; j < p.n; ++j)
      for (int q = 0; q < p.k / 32; ++q) {
        u32 x, y;
        memcpy(&x, a + (i * p.k + 32 * q) / 8, 4);
        memcpy(&y, b + (j * p.k + 32 * q) / 8, 4);
        sum[i * p.n + j] += std::popcount(p.ands ? x & y : x ^ y);
      }
}

// Where the elements of sums are, of both kinds: the index of element e of a lane, linear in lanes.
int place_of_sum(const Product& p, int lane, int e) {
  if (p.fragments) return lane * (p.m * p.n / kLanes) + e;
  return 64 * (e >> 1) + 2 * lane + (e & 1);  // column 2 (lane % 4) + e % 2 of row lane / 4 + 8 (e / 2)
}

// Registers of A and of B; those of A without its zeros, where it is sparse. Where wmma has them several times they
// count once.
int registers_of_a(const Product& p) { return p.m * p.k / (p.sparse ? 2 : 1) / kLanes / per_register(p.a); }
int registers_of_b(const Product& p) { return p.n * p.k / kLanes / per_register(p.b); }

// Rows of A, or columns of B, that a register has elements of.
u32 lines_of(const Product& p, bool of_a, int r, int lane) {
  if (!p.fragments) return 1u << (of_a && p.m == 16 ? lane / 4 + 8 * (r & 1) : lane / 4);
  const int lines = of_a ? p.m : p.n, per = per_register(of_a ? p.a : p.b);
  const int first = (lane * (of_a ? registers_of_a(p) : registers_of_b(p)) + r) * per;
  if (of_a ? !p.a_columns : !p.b_rows) return 1u << (first / p.k);
  return (per >= 32 ? ~0u : (1u << per) - 1) << (first % lines);
}

// An element of the product is valid where its row of A, its column of B and its own addend are.
void spread_validity(Warp& w, const Op& op, const Product& p, int a0, int b0, int c0) {
  const auto partial = [&](int i) { return w.partial[op.regs[i].id] != 0; };
  const int num_a = registers_of_a(p), num_b = registers_of_b(p);
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
      if (bad(a0 + r, l)) bad_rows |= lines_of(p, true, r, l);
    for (int r = 0; r < num_b; ++r)
      if (bad(b0 + r, l)) bad_columns |= lines_of(p, false, r, l);
  }
  const int per = p.sum == Sum::kF16 ? 2 : 1;
  u8 valid[8][kLanes];
  for (int d = 0; d < op.num_dst; ++d)
    for (int l = 0; l < kLanes; ++l) {
      bool good = true;
      for (int e = per * d; e < per * (d + 1); ++e) {
        const int at = place_of_sum(p, l, e), addend = c0 + (p.addend == Sum::kF16 ? e / 2 : e);
        good = good && !bad(addend, l) && !(bad_rows >> (at / p.n) & 1) && !(bad_columns >> (at % p.n) & 1);
      }
      valid[d][l] = good ? 0xff : 0;
    }
  for (int d = 0; d < op.num_dst; ++d) {
    const Reg& r = op.regs[d];
    w.partial[r.id] = 1;
    memcpy(w.valid[r.id].data(), valid[d], kLanes);
    w.origin[r.id] = origin;
  }
}

// Lines of `bytes` from registers that hold 16 bytes of a line in four lanes each; A of 16 rows in pairs of registers.
void gather_lines(Warp& w, const Op& op, int first, int count, bool sixteen, u8* to, int bytes) {
  for (int r = 0; r < count; ++r) {
    const u32* reg = w.reg<u32>(op, first + r);
    const int line = sixteen ? 8 * (r & 1) : 0, block = sixteen ? r >> 1 : r;
    for (int g = 0; g < 8; ++g) memcpy(to + (line + g) * bytes + 16 * block, reg + 4 * g, 16);
  }
}

void gather_parts(Warp& w, const Op& op, int first, int count, u8* to) {
  for (int r = 0; r < count; ++r) {
    const u32* reg = w.reg<u32>(op, first + r);
    for (int l = 0; l < kLanes; ++l) memcpy(to + 4 * (l * count + r), reg + l, 4);
  }
}

void transpose(const double* from, int rows, int columns, double* to) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

// The metadata of a row: four bits for each pair of elements (of pairs of elements, where they have four bits) that
// are not zero among four, or for each of two float32.
u64 metadata_of(const Product& p, const u32* e, int row) {
  const u32* group = e + 4 * (row & 7);
  if (bits_of(p.a) >= 16) {  // half a word of each thread is of a row: of 16 columns, of 8 with float32
    const int threads = p.k * bits_of(p.a) / 256, shift = row < 8 ? 0 : 16;
    const u64 low = group[threads * p.selector] >> shift & 0xffff;
    return threads == 1 ? low : low | static_cast<u64>(group[threads * p.selector + 1] >> shift & 0xffff) << 16;
  }
  const int first = 2 * p.selector + (row < 8 ? 0 : 1);
  const bool two = p.k * bits_of(p.a) == 512;
  return group[first] | (two ? static_cast<u64>(group[first + 2]) << 32 : 0);
}

void expand(Warp& w, const Op& op, const Product& p, const double* packed, const u32* e, double* a) {
  std::fill_n(a, p.m * p.k, 0.0);
  const int width = bits_of(p.a) == 4 ? 2 : 1;  // elements that an index moves together
  for (int i = 0; i < p.m; ++i) {
    const u64 indices = metadata_of(p, e, i);
    const double* from = packed + i * p.k / 2;
    for (int at = 0; at < p.k / 2;) {
      const int chunk = at / (p.a == Element::kTF32 ? 1 : 2 * width);
      const int code = static_cast<int>(indices >> (4 * chunk) & 15);
      const bool known = p.a == Element::kTF32 ? code == 0b1110 || code == 0b0100
                                               : (code & 3) < code >> 2 || (!p.ordered && (code & 3) != code >> 2);
      if (!known)
        w.raise(op, 4 * (i & 7), "unsupported",
                "unsupported: sparse metadata " + std::to_string(code) + " of row " + std::to_string(i) +
                    ": it names no two elements");
      if (p.a == Element::kTF32) {
        a[i * p.k + 2 * chunk + (code == 0b1110)] = from[at++];
        continue;
      }
      for (const int index : {code & 3, code >> 2})
        for (int q = 0; q < width; ++q) a[i * p.k + (4 * chunk + index) * width + q] = from[at++];
    }
  }
}

void read_sums(Warp& w, const Op& op, const Product& p, int c0, double* sum) {
  const int count = p.m * p.n / kLanes;
  const auto each = [&](auto value) {
    for (int e = 0; e < count; ++e) {
      const u32* c = w.reg<u32>(op, c0 + (p.addend == Sum::kF16 ? e / 2 : e));
      double* to = sum + place_of_sum(p, 0, e);
      const int step = place_of_sum(p, 1, e) - place_of_sum(p, 0, e);
      for (int l = 0; l < kLanes; ++l) to[l * step] = value(c[l], e);
    }
  };
  switch (p.addend) {
    case Sum::kF32: return each([](u32 c, int) { return bits_as<float>(c); });
    case Sum::kS32: return each([](u32 c, int) { return static_cast<i32>(c); });
    default: return each([](u32 c, int e) { return to_float(f16{static_cast<u16>(c >> (16 * (e & 1)))}); });
  }
}

void write_sums(Warp& w, const Op& op, const Product& p, const double* sum) {
  const int count = p.m * p.n / kLanes;
  const auto each = [&](auto bits) {
    for (int e = 0; e < count; ++e) {
      u32* d = w.reg<u32>(op, p.sum == Sum::kF16 ? e / 2 : e);
      const double* from = sum + place_of_sum(p, 0, e);
      const int step = place_of_sum(p, 1, e) - place_of_sum(p, 0, e);
      for (int l = 0; l < kLanes; ++l) d[l] = bits(from[l * step], d[l], e);
    }
  };
  switch (p.sum) {
    case Sum::kF32:
      return each([](double v, u32, int) {
        const float rounded = static_cast<float>(v);
        return rounded == rounded ? bits_as<u32>(rounded) : kNan32;
      });
    case Sum::kS32:
      if (op.saturate)
        return each([](double v, u32, int) { return static_cast<u32>(saturate<i32>(v, Round::kNearest)); });
      return each([](double v, u32, int) { return static_cast<u32>(static_cast<i64>(v)); });
    default:
      return each([](double v, u32 old, int e) {
        const int shift = 16 * (e & 1);
        return (old & ~(0xffffu << shift)) | static_cast<u32>(f16_bits(v)) << shift;
      });
  }
}

// regs: D, A, B, C [, metadata]
void mma(Warp& w, const Op& op, u32) {
  const Product p = product_of(op);
  const int stored = p.sparse ? p.k / 2 : p.k;  // elements of A that a row has
  const int num_a = registers_of_a(p), num_b = registers_of_b(p);
  const int held_a = p.fragments ? op.vector : num_a, held_b = p.fragments ? op.width : num_b;  // copies included
  const int a0 = op.num_dst, b0 = a0 + held_a, c0 = b0 + held_b;
  alignas(64) u8 a_bytes[32 * 32], b_bytes[32 * 32];
  alignas(64) double a[16 * 128], b[128 * 8], sum[32 * 32], other[16 * 128];
  if (p.fragments) {
    gather_parts(w, op, a0, num_a, a_bytes);
    gather_parts(w, op, b0, num_b, b_bytes);
  } else {
    gather_lines(w, op, a0, num_a, p.m == 16, a_bytes, stored * bits_of(p.a) / 8);
    gather_lines(w, op, b0, num_b, false, b_bytes, p.k * bits_of(p.b) / 8);
  }
  read_sums(w, op, p, c0, sum);
  if (p.a == Element::kB1) {
    count_bits(p, a_bytes, b_bytes, sum);
  } else {
    unpack(p.a, a_bytes, p.m * stored, p.sparse || p.a_columns ? other : a);
    if (p.a_columns) transpose(other, p.k, p.m, a);
    if (p.sparse) {
      const Reg& e = op.regs[op.num_dst + op.num_src - 1];
      w.require_valid(op, e, kAllLanes, 0x0f, "sparse metadata");
      expand(w, op, p, other, reinterpret_cast<const u32*>(w.file + e.value), a);
    }
    unpack(p.b, b_bytes, p.n * p.k, p.b_rows ? b : other);
    if (!p.b_rows) transpose(other, p.n, p.k, b);
    const u64 perturbation = w.cta->program.perturbation;
    if (p.n == 8) multiply<8>(p, perturbation, a, b, sum);
    if (p.n == 16) multiply<16>(p, perturbation, a, b, sum);
    if (p.n == 32) multiply<32>(p, perturbation, a, b, sum);
  }
  spread_validity(w, op, p, a0, b0, c0);  // of the sources, which results may overwrite
  write_sums(w, op, p, sum);
}

// m8n8k4 of float64: one element of A and of B a lane. imm: 1 for A by columns, 2 for B by rows (wmma)
void mma_f64(Warp& w, const Op& op, u32) {
  const double *a = w.reg<double>(op, 2), *b = w.reg<double>(op, 3);
  double d[2][kLanes];
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < 2; ++e) {
      const int i = l / 4, j = 2 * (l % 4) + e;
      double s = w.reg<double>(op, 4 + e)[l];
      for (int k = 0; k < 4; ++k)
        s = std::fma(a[op.imm & 1 ? 8 * k + i : 4 * i + k], b[op.imm & 2 ? 8 * k + j : 4 * j + k], s);
      d[e][l] = canonical(s);
    }
  bool valid = true;
  u32 origin = 0;
  for (int i = 2; i < 6; ++i)
    if (w.partial[op.regs[i].id]) valid = false, origin = w.origin[op.regs[i].id];
  for (int e = 0; e < 2; ++e) {
    memcpy(w.reg<double>(op, e), d[e], sizeof(d[e]));
    const Reg& r = op.regs[e];
    if (valid)
      w.set_valid(r, kAllLanes);
    else
      w.partial[r.id] = 1, w.valid[r.id].fill(0), w.origin[r.id] = origin;
  }
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

const std::map<std::string, Element>& elements() {
  static const std::map<std::string, Element> names = {
      {"f16", Element::kF16}, {"bf16", Element::kBF16}, {"tf32", Element::kTF32}, {"s8", Element::kS8},
      {"u8", Element::kU8},   {"s4", Element::kS4},     {"u4", Element::kU4},     {"b1", Element::kB1}};
  return names;
}

// Shape, orders and types of a product, as its modifiers give them.
struct Form {
  int m = 0, n = 0, k = 0;
  std::vector<std::string> orders, types;
};

Form form_of(const Instruction& in) {
  Form f;
  for (const auto& m : in.modifiers) {
    if (m == "row" || m == "col") f.orders.push_back(m);
    if (type_bytes(m) > 0 || m == "tf32" || m == "s4" || m == "u4" || m == "b1") f.types.push_back(m);
    if (m[0] == 'm' && m.find('n') != std::string::npos && m.find('k') != std::string::npos)
      sscanf(m.c_str(), "m%dn%dk%d", &f.m, &f.n, &f.k);
  }
  return f;
}

// D, A, B, C as many registers each as `counts` says; and one more operand, where there is one.
void set_operands(Decoder& d, const Instruction& in, Op& op, const std::array<size_t, 4>& counts,
                  const std::string& element, const std::string& sum) {
  std::vector<Reg> dst, src;
  const auto list = [](const Operand& o) { return o.kind == Operand::kVector ? o.list : std::vector<Operand>{o}; };
  for (size_t i = 0; i < 4; ++i) {
    const auto registers = list(in.operands.at(i));
    if (registers.size() != counts[i])
      Decoder::fail(in.opcode + " with " + std::to_string(registers.size()) + " registers for operand " +
                    std::to_string(i));
    for (const auto& o : registers) {
      if (i == 0)
        dst.push_back(d.result(o, sum));
      else
        src.push_back(d.source(o, i == 3 ? sum : element));
    }
  }
  if (in.operands.size() > 4) src.push_back(d.source(in.operands[4], "b32"));
  d.set(op, dst, src);
}

// What A, B and the sums are of; false for what does not go together.
bool set_types(const Form& f, const Instruction& in, Product& p) {
  const std::string &td = f.types[0], &ta = f.types[1], &tb = f.types[2], &tc = f.types[3];
  const auto a = elements().find(ta), b = elements().find(tb);
  if (a == elements().end() || b == elements().end()) return false;
  p.a = a->second, p.b = b->second;
  const bool integers = is_integer(p.a);
  if (bits_of(p.a) != bits_of(p.b) || (!integers && p.a != p.b)) return false;
  for (const auto& type : {td, tc})
    if (integers ? type != "s32" : type != "f32" && !(type == "f16" && p.a == Element::kF16)) return false;
  p.sum = integers ? Sum::kS32 : td == "f16" ? Sum::kF16 : Sum::kF32;
  p.addend = integers ? Sum::kS32 : tc == "f16" ? Sum::kF16 : Sum::kF32;
  p.ands = in.has("and");
  return (p.a == Element::kB1) == in.has("popc") && (!in.has("popc") || in.has("and") || in.has("xor"));
}

bool decode_mma(Decoder& d, const Instruction& in, Op& op) {
  const Form f = form_of(in);
  if (!in.has("sync") || !in.has("aligned") || f.types.size() != 4 || f.orders.size() != 2) return false;
  Product p;
  p.sparse = in.has("sp") || in.has("sp::ordered_metadata");
  d.expect_operands(in, p.sparse ? 6 : 4);
  if (!p.sparse && f.m == 8 && f.n == 8 && f.k == 4 && f.types[1] == "f16") {
    if (f.types[0] != "f32" || f.types[2] != "f16" || f.types[3] != "f32") return false;
    op.imm = (f.orders[0] == "col" ? 1 : 0) | (f.orders[1] == "row" ? 2 : 0);
    op.exec = &mma_quads;
    set_operands(d, in, op, {8, 2, 2, 8}, "b32", "f32");
    return true;
  }
  if (f.orders[0] != "row" || f.orders[1] != "col" || f.n != 8) return false;
  if (!p.sparse && f.m == 8 && f.k == 4 &&
      std::all_of(f.types.begin(), f.types.end(), [](auto& t) { return t == "f64"; })) {
    op.exec = &mma_f64;
    set_operands(d, in, op, {2, 1, 1, 2}, "f64", "f64");
    return true;
  }
  if (f.types[0] != f.types[3] || !set_types(f, in, p)) return false;
  p.m = static_cast<u8>(f.m), p.k = static_cast<u16>(f.k);
  p.ordered = in.has("sp::ordered_metadata");
  const int block = 4 * per_register(p.a), stored = p.sparse ? f.k / 2 : f.k;
  if (f.m == 16 ? stored != block && stored != 2 * block : f.m != 8 || p.sparse || f.k != block || !is_integer(p.a))
    return false;
  if (p.sparse) {
    if (p.a == Element::kB1 || in.operands[5].kind != Operand::kInt) return false;
    p.selector = static_cast<u8>(in.operands[5].bits);
    // The metadata of a group of four threads are in one, two or all of them.
    const u64 holders = static_cast<u64>(f.k) * bits_of(p.a) / (bits_of(p.a) >= 16 ? 256 : 128);
    if (in.operands[5].bits >= 4 / holders) Decoder::fail("a sparsity selector beyond its threads");
  }
  op.saturate = in.has("satfinite");
  keep(p, op);
  const size_t sums = static_cast<size_t>(f.m / 4 / (p.sum == Sum::kF16 ? 2 : 1));
  set_operands(d, in, op, {sums, static_cast<size_t>(registers_of_a(p)), static_cast<size_t>(registers_of_b(p)), sums},
               "b32", "b32");
  op.exec = &mma;
  return true;
}

// wmma.mma.sync.aligned.alayout.blayout.shape.dtype[.atype.btype].ctype: with one or two types, A and B are f16.
bool decode_wmma(Decoder& d, const Instruction& in, Op& op) {
  Form f = form_of(in);
  if (!in.has("mma") || !in.has("sync") || !in.has("aligned") || f.orders.size() != 2) return false;
  if (f.types.size() == 2) f.types = {f.types[0], "f16", "f16", f.types[1]};
  if (f.types.size() != 4) return false;
  d.expect_operands(in, 4);
  const bool a_columns = f.orders[0] == "col", b_rows = f.orders[1] == "row";
  if (f.m == 8 && f.n == 8 && f.k == 4 &&
      std::all_of(f.types.begin(), f.types.end(), [](auto& t) { return t == "f64"; })) {
    op.imm = (a_columns ? 1 : 0) | (b_rows ? 2 : 0);
    op.exec = &mma_f64;
    set_operands(d, in, op, {2, 1, 1, 2}, "f64", "f64");
    return true;
  }
  const int shape = 10000 * f.m + 100 * f.n + f.k;
  Product p;
  p.fragments = true, p.a_columns = a_columns, p.b_rows = b_rows;
  if (!set_types(f, in, p)) return false;
  const int bits = bits_of(p.a);
  const bool known = bits == 32  ? shape == 161608
                     : bits == 4 ? f.m == 8 && f.n == 8 && f.k == 32
                     : bits == 1 ? f.m == 8 && f.n == 8 && f.k == 128
                                 : shape == 161616 || shape == 83216 || shape == 320816;
  if (!known || (bits < 8 && (a_columns || b_rows))) return false;
  p.m = static_cast<u8>(f.m), p.n = static_cast<u8>(f.n), p.k = static_cast<u16>(f.k);
  op.saturate = in.has("satfinite");
  keep(p, op);
  // Fragments of float16 always have eight registers.
  const size_t num_a = p.a == Element::kF16 ? 8 : static_cast<size_t>(registers_of_a(p));
  const size_t num_b = p.a == Element::kF16 ? 8 : static_cast<size_t>(registers_of_b(p));
  op.vector = static_cast<u8>(num_a), op.width = static_cast<u8>(num_b);
  const size_t sums = static_cast<size_t>(f.m * f.n / kLanes);
  set_operands(d, in, op, {p.sum == Sum::kF16 ? sums / 2 : sums, num_a, num_b, p.addend == Sum::kF16 ? sums / 2 : sums},
               "b32", "b32");
  op.exec = &mma;
  return true;
}

}  // namespace

bool decode_matrix(Decoder& d, const Instruction& in, Op& op) {
  op.rule = Rule::kOwn;
  op.flow = Flow::kMeet;
  op.aligned = true;
  if (in.opcode == "mma") return decode_mma(d, in, op);
  return in.opcode == "wmma" && decode_wmma(d, in, op);
}

}  // namespace gpusim
