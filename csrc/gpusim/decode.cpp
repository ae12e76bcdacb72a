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
                                                       {"%envreg1", kGridBarrier1},
                                                       {"%envreg2", kGridBarrier2}};
  return names;
}

u64 align_up(u64 n, u64 a) { return a <= 1 ? n : (n + a - 1) / a * a; }

constexpr u64 kMaxFrame = 1ull << 19;

float as_float(u64 bits) { return bits_as<float>(static_cast<u32>(bits)); }
double as_double(u64 bits) { return bits_as<double>(bits); }

}  // namespace

Program::Program(const std::string& text, const std::string& name, u64 perturbation)
    : module(parse(text)), perturbation(perturbation) {
  entry = module.entry(name);
  if (entry == nullptr) {
    std::string names;
    for (const auto& g : module.functions)
      if (g.entry) names += (names.empty() ? "" : ", ") + g.name;
    throw PtxError(0, "entry_name: expected one of " + (names.empty() ? "none" : names) + "; got " + name);
  }
  for (const auto& v : entry->params) {
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
    if (!v.external && uses(v.name)) place(v);
  for (const auto& v : entry->variables) place(v);
  for (const auto& v : module.variables)
    if (v.external) place(v);
  Decoder(*this).run();
}

// A module's variable takes room in the kernels that name it, or call functions (which may).
bool Program::uses(const std::string& variable) const {
  const auto names = [&](const Operand& o, const auto& self) -> bool {
    if (o.name == variable) return true;
    return std::any_of(o.list.begin(), o.list.end(), [&](const Operand& e) { return self(e, self); });
  };
  for (const Instruction& in : entry->body) {
    if (in.opcode == "call") return true;
    for (const Operand& o : in.operands)
      if (names(o, names)) return true;
  }
  return false;
}

int Program::code_of(const std::string& name) {
  for (size_t i = 0; i < codes.size(); ++i)
    if (codes[i].function->name == name) return static_cast<int>(i);
  const Function* f = module.function(name);
  if (f == nullptr) return -1;
  codes.emplace_back().function = f;
  return static_cast<int>(codes.size()) - 1;
}

const Instruction* Program::instruction(u32 op) const {
  if (op >= ops.size() || ops[op].source < 0) return nullptr;
  return instructions[static_cast<size_t>(ops[op].source)];
}

std::string Program::where(u32 op) const {
  const Instruction* in = instruction(op);
  if (in == nullptr) return "";
  std::string text;
  int depth = 0;
  for (int at = in->location; at >= 0 && depth < 16; at = module.locations[at].outer, ++depth) {
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
  code().registers.emplace_back(r, bytes);
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

Reg Decoder::carry() {
  if (!has_carry_) carry_ = allocate(false, true), has_carry_ = true;
  return carry_;
}

u32 Decoder::meeting(const std::string& what) {
  return meetings_.emplace(what, static_cast<u32>(meetings_.size() + 1)).first->second;
}

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
    const bool own_wide = special->second == kGridId;
    if (own_wide != wide || bytes < 4) fail("special register " + o.name + " as ." + type);
    if (special->second == kGridBarrier1 || special->second == kGridBarrier2) p_.grid_barrier = true;
    Reg& r = p_.special[special->second];
    if (!(p_.used_special >> special->second & 1)) {
      r = allocate(own_wide);
      p_.initially_valid[r.id] = 1;
      p_.used_special |= 1u << special->second;
    }
    return r;
  }
  if (o.name[0] == '%') fail("special register " + o.name);
  const std::string key = o.name + "+" + std::to_string(o.offset) + (wide ? "" : " narrow");
  const auto known = symbols_.find(key);
  if (known != symbols_.end()) return known->second;
  const Reg r = allocate(wide);
  const auto place = code().places.find(o.name);
  if (place != code().places.end()) {  // the address depends on the frame
    if (!wide) fail("the address of " + o.name + " in 32 bits");
    code().addresses.emplace_back(r, place->second + static_cast<u64>(o.offset));
    p_.initially_valid[r.id] = 1;
    return symbols_[key] = r;
  }
  const auto param = p_.param_offsets.find(o.name);
  if (is_entry() && param != p_.param_offsets.end()) {
    const u64 address = kParamWindow + param->second + static_cast<u64>(o.offset);
    if (!wide) fail("the address of parameter " + o.name + " in 32 bits");
    for (u32 l = 0; l < kLanes; ++l) memcpy(&p_.registers[r.value + 8 * l], &address, 8);
    p_.initially_valid[r.id] = 1;
    return symbols_[key] = r;
  }
  // A variable's or a function's address is known at launch.
  if (p_.code_of(o.name) < 0 && !p_.shared_offsets.count(o.name) &&
      std::none_of(p_.module.variables.begin(), p_.module.variables.end(),
                   [&](const Variable& v) { return v.name == o.name; }))
    fail("symbol " + o.name);
  p_.fixups.push_back({r.value, o.name, o.offset, wide});
  p_.initially_valid[r.id] = 1;
  return symbols_[key] = r;
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

// Variables, parameters and those of calls, one behind the other.
void Decoder::lay_out_frame() {
  Code& c = code();
  const auto place = [&](const Variable& v) {
    c.frame_bytes = align_up(c.frame_bytes, std::max<u64>(v.align, 1));
    c.places[v.name] = c.frame_bytes;
    const std::pair<u64, u64> where{c.frame_bytes, v.bytes};
    c.frame_bytes += v.bytes;
    if (c.frame_bytes > kMaxFrame) fail("unsupported: local variables of more than 512 KiB in " + c.function->name);
    return where;
  };
  if (!is_entry()) {
    for (const Variable& v : c.function->params) c.params.push_back(place(v));
    for (const Variable& v : c.function->returns) c.result = place(v);
  }
  for (const Variable& v : c.function->variables)
    if (v.space == Variable::kLocal || v.space == Variable::kParam) place(v);
  for (const Variable& v : p_.module.variables)
    if (v.space == Variable::kLocal) fail("unsupported: local variable " + v.name + " of a module");
  if (c.frame_bytes > 0) p_.has_frames = true;
}

void Decoder::run() {
  p_.codes.emplace_back().function = p_.entry;
  // Functions join the list while those before them are decoded, and where a table of functions names them.
  for (const Variable& v : p_.module.variables)
    for (const Relocation& r : v.relocations)
      if (p_.module.function(r.symbol) != nullptr && p_.uses(v.name)) p_.code_of(r.symbol);
  if (p_.codes.size() > 1) p_.has_frames = true;
  for (current_ = 0; current_ < static_cast<int>(p_.codes.size()); ++current_) {
    names_.clear();
    symbols_.clear();
    has_carry_ = false;
    function();
  }
}

// call[.uni] [(result),] function or register [, (arguments) [, prototype]]
void Decoder::decode_call(const Instruction& in, Op& op) {
  op.flow = Flow::kCall;
  CallSite site;
  const auto place = [&](const Operand& o) -> std::pair<u64, u64> {
    for (const auto* list : {&code().function->variables, &code().function->params, &code().function->returns})
      for (const Variable& v : *list)
        if (v.name == o.name && code().places.count(o.name)) return {code().places.at(o.name), v.bytes};
    fail("a call with " + o.name + ", which is no .param variable");
  };
  size_t at = 0;
  if (at < in.operands.size() && in.operands[at].kind == Operand::kArguments) {
    if (in.operands[at].list.size() > 1) fail("a call with several results");
    if (!in.operands[at].list.empty()) site.result = place(in.operands[at].list[0]);
    ++at;
  }
  if (at >= in.operands.size() || in.operands[at].kind != Operand::kName) fail("call needs a function");
  const Operand& callee = in.operands[at++];
  if (at < in.operands.size() && in.operands[at].kind == Operand::kArguments)
    for (const Operand& o : in.operands[at].list) site.arguments.push_back(place(o));
  std::vector<Reg> src;
  if (is_register(callee.name)) {
    src.push_back(source(callee, "u64"));
    // Any function of the module may be meant whose address is taken.
  } else if (callee.name == "vprintf" && site.arguments.size() == 2) {
    site.builtin = Builtin::kPrint;
    p_.prints = true;
  } else if (callee.name == "__assertfail" && site.arguments.size() == 5) {
    site.builtin = Builtin::kAssert;
  } else if (callee.name == "malloc" && site.arguments.size() == 1 && site.result.second == 8) {
    site.builtin = Builtin::kAllocate;
    p_.has_heap = true;
  } else if (callee.name == "free" && site.arguments.size() == 1) {
    site.builtin = Builtin::kFree;
    p_.has_heap = true;
  } else {
    site.code = p_.code_of(callee.name);
    if (site.code < 0) fail("a call of " + callee.name + ", which the module does not have");
    const Function* f = p_.codes[static_cast<size_t>(site.code)].function;
    if (f->params.size() != site.arguments.size() || f->returns.empty() != (site.result.second == 0))
      fail("a call of " + callee.name + " with other parameters than its own");
  }
  p_.has_frames = true;
  set(op, {}, src);
  op.imm = static_cast<i64>(p_.call_sites.size());
  p_.call_sites.push_back(site);
}

void Decoder::operation(const Instruction& in, Op& op) {
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
  } else if (in.opcode == "brx") {
    expect_operands(in, 2);
    op.flow = Flow::kTable;
    set(op, {}, {source(in.operands[0], "u32")});
  } else if (in.opcode == "ret" || in.opcode == "exit") {
    op.flow = in.opcode == "exit" || is_entry() ? Flow::kExit : Flow::kReturn;
  } else if (in.opcode == "call") {
    decode_call(in, op);
  } else if (!decode_alu(*this, in, op) && !decode_memory(*this, in, op) && !decode_warp(*this, in, op) &&
             !decode_sync(*this, in, op) && !decode_matrix(*this, in, op)) {
    fail("unknown instruction");
  }
  if (p_.perturbation) perturb(op, in);
}

void Decoder::function() {
  lay_out_frame();
  const Function& f = *code().function;
  const std::vector<Instruction>* text = &f.body;
  if (p_.perturbation) {
    p_.rewritten.push_back(std::make_unique<std::vector<Instruction>>(fuse_products(f)));
    text = p_.rewritten.back().get();
  }
  std::vector<const Instruction*> body;
  for (const Instruction& in : *text) body.push_back(&in);
  const int n = static_cast<int>(body.size());
  // ---- blocks
  std::set<int> starts = {0};
  for (const auto& [name, at] : f.labels) starts.insert(at);
  auto jumps = [&](const Instruction& in) { return in.opcode == "bra" || in.opcode == "brx"; };
  auto leaves = [&](const Instruction& in) { return jumps(in) || in.opcode == "ret" || in.opcode == "exit"; };
  for (int i = 0; i < n; ++i)
    if (leaves(*body[i]) || body[i]->opcode == "call") starts.insert(i + 1);
  starts.erase(n);
  const std::vector<int> first(starts.begin(), starts.end());
  const int blocks = n == 0 ? 0 : static_cast<int>(first.size());
  auto block_of = [&](int at) {
    return static_cast<int>(std::upper_bound(first.begin(), first.end(), at) - first.begin()) - 1;
  };
  auto place_of = [&](const Instruction& in, const std::string& label) {
    const auto it = f.labels.find(label);
    if (it == f.labels.end()) throw PtxError(in.line, "no label " + label);
    return it->second;
  };
  // Where an instruction may jump to, as places in the body.
  auto labels = [&](const Instruction& in) {
    std::vector<int> targets;
    if (in.opcode == "bra") {
      if (in.operands.size() != 1 || in.operands[0].kind != Operand::kName)
        throw PtxError(in.line, "bra needs a label");
      targets.push_back(place_of(in, in.operands[0].name));
    } else if (in.opcode == "brx") {
      const auto it = in.operands.size() == 2 ? f.branch_targets.find(in.operands[1].name) : f.branch_targets.end();
      if (it == f.branch_targets.end()) throw PtxError(in.line, "brx needs a list of branch targets");
      for (const auto& label : it->second) targets.push_back(place_of(in, label));
    }
    return targets;
  };
  std::vector<std::vector<int>> successors(blocks);
  std::vector<int> falls_to(blocks, -1);  // n: the end of the function
  for (int b = 0; b < blocks; ++b) {
    const int end = b + 1 < blocks ? first[b + 1] : n;
    const Instruction& last = *body[end - 1];
    const bool conditional = !last.guard.empty();
    for (const int target : labels(last))
      if (target < n) successors[b].push_back(block_of(target));
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
  code().begin = static_cast<u32>(p_.ops.size());
  std::vector<u32> begins(blocks + 1, 0);
  std::vector<std::pair<u32, int>> branches;  // operation, block
  const Flow at_end = is_entry() ? Flow::kExit : Flow::kReturn;
  auto emit = [&](Op op) {
    op.index = static_cast<u32>(p_.ops.size());
    if (op.meeting == 0) op.meeting = ~op.index;
    p_.ops.push_back(op);
  };
  for (size_t k = 0; k < order.size(); ++k) {
    const int b = order[k], end = b + 1 < blocks ? first[b + 1] : n;
    begins[b] = static_cast<u32>(p_.ops.size());
    bool leader = true;
    for (int i = first[b]; i < end; ++i) {
      const Instruction& in = *body[i];
      Op op;
      op.source = static_cast<int>(p_.instructions.size());
      p_.instructions.push_back(&in);
      op.leader = leader;
      leader = false;
      op.used_bytes = in.used_bytes;
      try {
        operation(in, op);
        if (op.flow == Flow::kBranch) {
          if (labels(in)[0] >= n)
            op.flow = at_end;
          else
            branches.emplace_back(static_cast<u32>(p_.ops.size()), block_of(labels(in)[0]));
        }
      } catch (const std::exception& error) {
        // An operand or a modifier that is not there is one more thing that cannot be decoded.
        const bool missing = dynamic_cast<const std::out_of_range*>(&error) != nullptr;
        p_.unsupported.push_back({in.line, in.text, missing ? "operands or modifiers are missing" : error.what()});
        op.exec = [](Warp& w, const Op& o, u32 mask) {
          w.raise(o, std::countr_zero(mask), "unsupported", "unsupported instruction reached");
        };
        op.flow = Flow::kNext;
        op.meeting = 0;
        set(op, {}, {});
      }
      emit(op);
    }
    const int next = falls_to[b];
    if (next >= 0 && (k + 1 == order.size() || order[k + 1] != next)) {
      Op jump;
      jump.source = -1;
      jump.flow = next == blocks ? at_end : Flow::kBranch;
      if (next != blocks) branches.emplace_back(static_cast<u32>(p_.ops.size()), next);
      emit(jump);
    }
  }
  Op end;  // so that a pc is always valid
  end.flow = at_end;
  end.leader = true;
  emit(end);
  begins[blocks] = static_cast<u32>(p_.ops.size()) - 1;
  for (const auto& [op, block] : branches) p_.ops[op].target = begins[block];
  for (u32 i = code().begin; i < p_.ops.size(); ++i) {
    Op& op = p_.ops[i];
    if (op.flow != Flow::kTable) continue;
    std::vector<u32> targets;
    for (const int target : labels(*p_.instruction(i)))
      targets.push_back(begins[target < n ? block_of(target) : blocks]);
    op.imm = static_cast<i64>(p_.tables.size());
    p_.tables.push_back(targets);
  }
}

}  // namespace gpusim
