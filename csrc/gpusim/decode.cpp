// From parsed PTX to operations: registers get places, constants too, blocks are laid out in reverse post-order.
#include <algorithm>
#include <set>

#include "gpusim/machine.h"

namespace gpusim {

namespace {

const std::map<std::string, Special>& special_names() {
  static const std::map<std::string, Special> names = {{"%tid.x", kTidX},
                                                       {"%tid.y", kTidY},
                                                       {"%tid.z", kTidZ},
                                                       {"%ntid.x", kNtidX},
                                                       {"%ntid.y", kNtidY},
                                                       {"%ntid.z", kNtidZ},
                                                       {"%ctaid.x", kCtaidX},
                                                       {"%ctaid.y", kCtaidY},
                                                       {"%ctaid.z", kCtaidZ},
                                                       {"%nctaid.x", kNctaidX},
                                                       {"%nctaid.y", kNctaidY},
                                                       {"%nctaid.z", kNctaidZ},
                                                       {"%laneid", kLaneId},
                                                       {"%warpid", kWarpId},
                                                       {"%nwarpid", kNWarpId},
                                                       {"%lanemask_eq", kLaneMaskEq},
                                                       {"%lanemask_le", kLaneMaskLe},
                                                       {"%lanemask_lt", kLaneMaskLt},
                                                       {"%lanemask_ge", kLaneMaskGe},
                                                       {"%lanemask_gt", kLaneMaskGt},
                                                       {"%dynamic_smem_size", kDynamicShared},
                                                       {"%total_smem_size", kTotalShared},
                                                       {"%smid", kSmId},
                                                       {"%nsmid", kNSmId},
                                                       {"%gridid", kGridId},
                                                       {"%clock", kClock},
                                                       {"%clock64", kClock64}};
  return names;
}

u64 align_up(u64 n, u64 a) { return a <= 1 ? n : (n + a - 1) / a * a; }

float as_float(u64 bits) { return bits_as<float>(static_cast<u32>(bits)); }
double as_double(u64 bits) { return bits_as<double>(bits); }

}  // namespace

Program::Program(const std::string& text, const std::string& entry) : module(parse(text)) {
  const Function* f = module.entry(entry);
  if (f == nullptr) {
    std::string names;
    for (const auto& g : module.functions)
      if (g.entry) names += (names.empty() ? "" : ", ") + g.name;
    throw PtxError(0, "entry_name: expected one of " + (names.empty() ? "none" : names) + "; got " + entry);
  }
  function = *f;
  for (const auto& v : function.params) {
    param_bytes = align_up(param_bytes, v.align);
    param_offsets[v.name] = param_bytes;
    param_bytes += v.bytes;
  }
  auto place = [&](const Variable& v) {
    if (v.space != Variable::kShared) return;
    static_shared = align_up(static_shared, v.align);
    shared_offsets[v.name] = static_shared;
    if (!v.external) static_shared += v.bytes;
    if (static_shared > (1u << 20)) throw PtxError(0, "more than 1 MiB of static shared memory");
  };
  // Dynamic shared memory (extern) begins where static shared memory ends.
  for (const auto& v : module.variables)
    if (!v.external) place(v);
  for (const auto& v : function.variables) place(v);
  for (const auto& v : module.variables)
    if (v.external) place(v);
  Decoder(*this).run();
}

std::string Program::where(u32 op) const {
  const int source = ops[op].source;
  if (source < 0) return "";
  const Instruction& in = function.body[source];
  std::string text;
  int depth = 0;
  for (int at = in.location; at >= 0 && depth < 16; at = module.locations[at].outer, ++depth) {
    const Location& l = module.locations[at];
    const auto file = module.files.find(l.file);
    const std::string name = file == module.files.end() ? "file " + std::to_string(l.file) : file->second;
    text += (depth ? ", called from " : "") + name + ":" + std::to_string(l.line);
  }
  return text;
}

Reg Decoder::allocate(bool wide, bool predicate) {
  const u32 bytes = predicate ? 64 : wide ? 256 : 128;
  const Reg r{static_cast<u32>(p_.registers.size()), static_cast<u32>(p_.initially_valid.size())};
  p_.registers.resize(p_.registers.size() + bytes);
  p_.initially_valid.push_back(0);
  return r;
}

bool Decoder::is_wide(const std::string& name) const { return type_bytes(type_of(name)) == 8; }

Reg Decoder::named(const std::string& name) {
  const auto it = names_.find(name);
  if (it != names_.end()) return it->second;
  const std::string& type = type_of(name);
  const Reg r = allocate(type_bytes(type) == 8, type == "pred");
  return names_[name] = r;
}

Reg Decoder::constant(u64 bits, bool wide) {
  const auto it = constants_.find({bits, wide});
  if (it != constants_.end()) return it->second;
  const Reg r = allocate(wide);
  p_.initially_valid[r.id] = 1;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (wide)
      memcpy(&p_.registers[r.value + 8 * lane], &bits, 8);
    else
      memcpy(&p_.registers[r.value + 4 * lane], &bits, 4);
  }
  return constants_[{bits, wide}] = r;
}

Reg Decoder::sink(bool wide) { return allocate(wide); }

namespace {

bool fits(int have, int bytes, Decoder::Wider wider) {
  if (have == bytes) return true;
  if (wider == Decoder::Wider::kNo || have < bytes) return false;
  return wider == Decoder::Wider::kAny || have < 8;
}

}  // namespace

Reg Decoder::predicate(const Operand& o, bool may_be_negated) {
  if (o.negated && !may_be_negated) fail("a negated predicate as an operand");
  if (o.kind != Operand::kName || !is_register(o.name) || type_of(o.name) != "pred")
    fail("expected a predicate, got " + o.name);
  return named(o.name);
}

Reg Decoder::source(const Operand& o, const std::string& type, Wider wider) {
  if (o.negated) fail("a negated operand");
  const int bytes = type_bytes(type);
  if (bytes <= 0) fail("a source of type ." + type);
  const bool wide = bytes == 8;
  switch (o.kind) {
    case Operand::kInt: {
      u64 bits = o.bits;
      if (type == "f32") bits = bits_as<u32>(static_cast<float>(static_cast<i64>(bits)));
      if (type == "f64") bits = bits_as<u64>(static_cast<double>(static_cast<i64>(bits)));
      if (bytes < 8) bits &= (1ull << (8 * bytes)) - 1;
      return constant(bits, wide);
    }
    case Operand::kFloat32:
      if (type == "f64") return constant(bits_as<u64>(static_cast<double>(as_float(o.bits))), true);
      return constant(o.bits, wide);
    case Operand::kFloat64:
      if (type == "f32") return constant(bits_as<u32>(static_cast<float>(as_double(o.bits))), false);
      return constant(o.bits, wide);
    case Operand::kName: break;
    default: fail("unsupported operand");
  }
  if (is_register(o.name)) {
    const std::string& own = type_of(o.name);
    if (own == "pred") fail("register " + o.name + " is a predicate");
    if (o.offset != 0) fail("register " + o.name + " with an offset");
    const int have = type_bytes(own);
    if (!fits(have, bytes, wider)) fail("register " + o.name + " of type ." + own + " as ." + type);
    return named(o.name);
  }
  const auto special = special_names().find(o.name);
  if (special != special_names().end()) {
    const bool own_wide = special->second == kClock64 || special->second == kGridId;
    if (own_wide != wide || bytes < 4) fail("special register " + o.name + " as ." + type);
    if (special->second == kClock || special->second == kClock64) fail("special register " + o.name);
    Reg& r = p_.special[special->second];
    if (!(p_.used_special >> special->second & 1)) {
      r = allocate(own_wide);
      p_.initially_valid[r.id] = 1;
      p_.used_special |= 1u << special->second;
    }
    return r;
  }
  if (o.name[0] == '%') fail("special register " + o.name);
  // A symbol: its address is known at launch.
  const Reg r = allocate(wide);
  p_.initially_valid[r.id] = 1;
  p_.fixups.push_back({r.value, o.name, o.offset, wide});
  return r;
}

Reg Decoder::result(const Operand& o, const std::string& type, Wider wider) {
  if (o.kind != Operand::kName) fail("expected a register for the result");
  const int bytes = type_bytes(type);
  if (o.name == "_") return sink(bytes == 8);
  if (!is_register(o.name)) fail("result " + o.name + " is not a declared register");
  const int have = type_bytes(type_of(o.name));
  if (have == 0) fail("result " + o.name + " is a predicate");
  if (!fits(have, bytes, wider))
    fail("register " + o.name + " of type ." + type_of(o.name) + " for a result of type ." + type);
  return named(o.name);
}

Reg Decoder::address_base(const Operand& o, bool& wide) {
  if (o.kind != Operand::kAddress) fail("expected an address");
  if (o.name.empty()) {
    wide = true;
    return constant(0, true);
  }
  if (is_register(o.name)) {
    const int bytes = type_bytes(type_of(o.name));
    if (bytes != 4 && bytes != 8) fail("an address in register " + o.name + " of type ." + type_of(o.name));
    wide = bytes == 8;
    return named(o.name);
  }
  wide = true;
  Operand symbol;
  symbol.kind = Operand::kName;
  symbol.name = o.name;
  return source(symbol, "u64");
}

void Decoder::set(Op& op, const std::vector<Reg>& dst, const std::vector<Reg>& src) {
  auto list = std::make_unique<Reg[]>(dst.size() + src.size() + 1);
  std::copy(dst.begin(), dst.end(), list.get());
  std::copy(src.begin(), src.end(), list.get() + dst.size());
  op.regs = list.get();
  op.num_dst = static_cast<u8>(dst.size());
  op.num_src = static_cast<u8>(src.size());
  p_.operand_lists.push_back(std::move(list));
}

void Decoder::expect_operands(const Instruction& in, size_t n) const {
  if (in.operands.size() != n)
    fail("expected " + std::to_string(n) + " operands, got " + std::to_string(in.operands.size()));
}

void Decoder::run() {
  const auto& body = p_.function.body;
  const int n = static_cast<int>(body.size());
  // ---- blocks
  std::set<int> starts = {0};
  for (const auto& [name, at] : p_.function.labels) starts.insert(at);
  auto leaves = [&](const Instruction& in) { return in.opcode == "bra" || in.opcode == "ret" || in.opcode == "exit"; };
  for (int i = 0; i < n; ++i)
    if (leaves(body[i])) starts.insert(i + 1);
  starts.erase(n);
  const std::vector<int> first(starts.begin(), starts.end());
  const int blocks = n == 0 ? 0 : static_cast<int>(first.size());
  auto block_of = [&](int at) {
    return static_cast<int>(std::upper_bound(first.begin(), first.end(), at) - first.begin()) - 1;
  };
  auto label = [&](const Instruction& in) {
    if (in.operands.size() != 1 || in.operands[0].kind != Operand::kName) throw PtxError(in.line, "bra needs a label");
    const auto it = p_.function.labels.find(in.operands[0].name);
    if (it == p_.function.labels.end()) throw PtxError(in.line, "no label " + in.operands[0].name);
    return it->second;
  };
  std::vector<std::vector<int>> successors(blocks);
  std::vector<int> falls_to(blocks, -1);  // n: the end of the function
  for (int b = 0; b < blocks; ++b) {
    const int end = b + 1 < blocks ? first[b + 1] : n;
    const Instruction& last = body[end - 1];
    const bool conditional = !last.guard.empty();
    if (last.opcode == "bra" && label(last) < n) successors[b].push_back(block_of(label(last)));
    if (!leaves(last) || conditional) {
      falls_to[b] = end < n ? b + 1 : blocks;
      if (end < n) successors[b].push_back(b + 1);
    }
  }
  // ---- reverse post-order; the successor that stands later in the text is visited first and so comes last, which
  // keeps a loop's body before its exit
  std::vector<int> order, state(blocks, 0);
  for (auto& s : successors) std::sort(s.begin(), s.end());
  if (blocks > 0) {
    std::vector<std::pair<int, size_t>> stack = {{0, successors[0].size()}};
    state[0] = 1;
    while (!stack.empty()) {
      auto& [b, left] = stack.back();
      if (left == 0) {
        order.push_back(b);
        stack.pop_back();
      } else {
        const int next = successors[b][--left];
        if (state[next] == 0) {
          state[next] = 1;
          stack.emplace_back(next, successors[next].size());
        }
      }
    }
    std::reverse(order.begin(), order.end());
  }
  // ---- operations
  std::vector<u32> begins(blocks + 1, 0);
  std::vector<std::pair<u32, int>> branches;  // operation, block
  auto emit = [&](Op op) {
    op.index = static_cast<u32>(p_.ops.size());
    p_.ops.push_back(op);
  };
  for (size_t k = 0; k < order.size(); ++k) {
    const int b = order[k], end = b + 1 < blocks ? first[b + 1] : n;
    begins[b] = static_cast<u32>(p_.ops.size());
    bool leader = true;
    for (int i = first[b]; i < end; ++i) {
      const Instruction& in = body[i];
      Op op;
      op.source = i;
      op.leader = leader;
      leader = false;
      op.used_bytes = in.used_bytes;
      try {
        if (!in.guard.empty()) {
          Operand guard;
          guard.kind = Operand::kName;
          guard.name = in.guard;
          op.guard = predicate(guard);
          op.guarded = true;
          op.guard_negated = in.guard_negated;
        }
        if (in.opcode == "bra") {
          op.flow = Flow::kBranch;
          if (label(in) >= n)
            op.flow = Flow::kExit;
          else
            branches.emplace_back(static_cast<u32>(p_.ops.size()), block_of(label(in)));
        } else if (in.opcode == "ret" || in.opcode == "exit") {
          op.flow = Flow::kExit;
        } else if (!decode_alu(*this, in, op) && !decode_memory(*this, in, op) && !decode_warp(*this, in, op)) {
          fail("unknown instruction");
        }
      } catch (const PtxError& error) {
        p_.unsupported.push_back({in.line, in.text, error.what()});
        op.exec = [](Warp& w, const Op& o, u32 mask) {
          w.raise(o, std::countr_zero(mask), "unsupported", "unsupported instruction reached");
        };
        op.flow = Flow::kNext;
        set(op, {}, {});
      }
      emit(op);
    }
    const int next = falls_to[b];
    if (next >= 0 && (k + 1 == order.size() || order[k + 1] != next)) {
      Op jump;
      jump.source = -1;
      jump.flow = next == blocks ? Flow::kExit : Flow::kBranch;
      if (next != blocks) branches.emplace_back(static_cast<u32>(p_.ops.size()), next);
      emit(jump);
    }
  }
  Op end;  // so that a pc is always valid
  end.flow = Flow::kExit;
  end.leader = true;
  emit(end);
  for (const auto& [op, block] : branches) p_.ops[op].target = begins[block];
}

}  // namespace gpusim
