// PTX text as data: what a module declares and the instructions of each function, names not yet resolved.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpusim {

// Malformed text, or text that is well formed and not supported; `line` counts from 1 in the PTX.
struct PtxError : std::runtime_error {
  int line;
  PtxError(int line, const std::string& what) : std::runtime_error(what), line(line) {}
};

struct Operand {
  enum Kind { kName, kInt, kFloat32, kFloat64, kVector, kAddress, kPair, kArguments };
  Kind kind = kInt;
  bool negated = false;       // !%p
  std::string name;           // kName: register or symbol; kAddress: the base, empty for an absolute address
  int64_t offset = 0;         // kAddress and kName (symbol + offset)
  uint64_t bits = 0;          // kInt, kFloat32, kFloat64
  std::vector<Operand> list;  // kVector: elements; kPair: a|b; kArguments: (a, b)
};

// A place in the user's source, from .loc; `outer` is where the function that it belongs to was inlined, -1 for
// nowhere.
struct Location {
  int file = 0, line = 0, outer = -1;
  bool operator==(const Location&) const = default;
};

struct Instruction {
  std::string opcode;
  std::vector<std::string> modifiers;  // without dots: {"global", "v4", "b32"}
  std::vector<Operand> operands;
  std::string guard;  // predicate, empty for none
  bool guard_negated = false;
  std::string text;
  int line = 0;
  int location = -1;            // index into Module::locations
  int scope = 0;                // the {} that it stands in
  uint64_t used_bytes = ~0ull;  // .pragma "used_bytes_mask": bytes of a load that are read
  bool has(const char* modifier) const;
  std::string last() const { return modifiers.empty() ? "" : modifiers.back(); }
};

// A variable's initial value that is an address: of a variable or of a function.
struct Relocation {
  uint64_t at;
  std::string symbol;
  int64_t addend;
};

struct Variable {
  std::string name, type;
  enum Space { kGlobal, kConst, kShared, kLocal, kParam } space = kGlobal;
  uint64_t count = 1, bytes = 0, align = 1;
  bool external = false;
  std::vector<uint8_t> initial;  // empty: zeros (global, const) or undefined (shared, local)
  std::vector<Relocation> relocations;
};

struct Function {
  std::string name;
  bool entry = false;
  int line = 0;
  std::vector<Variable> returns, params, variables;
  std::map<std::string, std::string> registers;  // name -> type
  std::vector<Instruction> body;
  std::map<std::string, int> labels;  // name -> index into body of the instruction that follows
  std::map<std::string, std::vector<std::string>> branch_targets;  // name -> labels, of brx.idx
  int reqntid = 0;                                                 // product of .reqntid, 0 for none
};

struct Module {
  std::string version, target;
  std::map<int, std::string> files;
  std::vector<Location> locations;
  std::vector<Variable> variables;
  std::vector<Function> functions;
  const Function* entry(const std::string& name) const;
  const Function* function(const std::string& name) const;
  uint64_t address_of(const std::string& function) const;  // one for all kernels of the module; 0: it has none
};

Module parse(const std::string& text);

// Bytes of one element of a PTX type, 0 for .pred; -1 for an unknown type.
int type_bytes(const std::string& type);

}  // namespace gpusim
