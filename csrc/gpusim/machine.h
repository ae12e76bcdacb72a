// The simulated machine: programs decoded to fixed-size operations, warps of 32 lanes, shared and global memory with
// their shadows, and what is counted.
//
// Registers    structure of arrays: 32 lanes of 4 or 8 bytes (types of 1 and 2 bytes in 4), predicates one 32-bit mask.
//              Validity: one flag a register ("every byte of every lane is written") and, where it is not set, a mask
//              of valid bytes for each lane. Arithmetic looks at the flags alone.
// Control      blocks are laid out in reverse post-order, so "the split lowest in that order" is the lowest pc; splits
//              with equal pc merge.
// Happens-before  a vector clock for each warp, ticked and joined at barriers; every byte of shared memory keeps who
//              wrote and read it last (warp, lane, time).
// Addresses    global: storage n at (n + 1) << 32, so a lookup is a shift; shared: a window of its own.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "gpusim/ptx.h"

namespace gpusim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAllLanes = ~0u;
constexpr u64 kSharedWindow = 0x7f00'0000'0000ull;  // generic addresses of shared memory
constexpr int kGlobalShift = 32;
constexpr int kSector = 32;

struct Warp;
struct Op;
using Exec = void (*)(Warp&, const Op&, u32 mask);

struct Reg {
  u32 value;  // byte offset into the register file
  u32 id;     // index of its validity
};

// How validity of the results follows from that of the sources, where some source is not wholly valid.
enum class Rule : u8 { kAll, kMove, kPack, kUnpack, kAnd, kOr, kShl, kShr, kPrmt, kSelect, kExtend, kOwn };
enum class Flow : u8 { kNext, kBranch, kExit, kBarrier };
enum class Space : u8 { kGlobal, kShared, kGeneric, kConst, kParam, kLocal };

struct Op {
  Exec exec = nullptr;
  const Reg* regs = nullptr;  // results first, then sources
  u8 num_dst = 0, num_src = 0;
  Flow flow = Flow::kNext;
  Rule rule = Rule::kAll;
  Space space = Space::kGlobal;
  u8 width = 0, vector = 1;  // of an access: bytes of an element, elements
  bool guarded = false, guard_negated = false;
  bool leader = false;  // first of a block
  bool wide = false;    // of the result's storage: 8 bytes a lane
  bool sign = false;    // of what is loaded: extended by its sign
  bool transposed = false, saturate = false, read_only = false, overwrites = false;
  bool wide_address = true, wide_address2 = true;  // 8 bytes a lane, or 4
  Reg guard{};
  i64 imm = 0;                // of an access: added to its address
  i64 imm2 = 0;               // the same for the second address of a copy
  void (*apply)() = nullptr;  // what an atomic operation does with a value
  u64 used_bytes = ~0ull;
  u32 target = 0;  // of a branch
  u32 index = 0;
  int source = -1;  // index into Function::body
};

struct Fixup {
  u32 value;  // constant in the register template
  std::string symbol;
  i64 offset;
  bool wide;
};

enum Special : u8 {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNWarpId,
  kLaneMaskEq,
  kLaneMaskLe,
  kLaneMaskLt,
  kLaneMaskGe,
  kLaneMaskGt,
  kDynamicShared,
  kTotalShared,
  kSmId,
  kNSmId,
  kGridId,
  kClock,
  kClock64,
  kNumSpecial
};

struct Unsupported {
  int line;
  std::string text, reason;
};

struct Program {
  Module module;
  Function function;
  std::vector<Op> ops;
  std::vector<std::unique_ptr<Reg[]>> operand_lists;
  std::vector<u8> registers;        // initial register file: constants filled in
  std::vector<u8> initially_valid;  // by register id
  std::array<Reg, kNumSpecial> special{};
  u32 used_special = 0;
  std::vector<Fixup> fixups;
  std::unordered_map<std::string, u64> shared_offsets;  // static shared variables
  u64 static_shared = 0;
  std::unordered_map<std::string, u64> param_offsets;
  u64 param_bytes = 0;
  std::vector<Unsupported> unsupported;
  bool synchronises_ctas = false;  // atomics, acquire or release: order between CTAs is the program's own

  Program(const std::string& text, const std::string& entry);
  Program(const Program&) = delete;
  std::string where(u32 op) const;  // "file.py:12 (called from file.py:40)"
};

struct Fault : std::runtime_error {
  std::string kind;
  u32 op = 0, other_op = ~0u;  // the other side of a race
  std::array<u32, 3> cta{}, thread{};
  u64 address = 0;
  std::string region;
  Fault(const std::string& kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
};

// A torch storage (or a module's variable) in the simulated address space.
struct Region {
  u64 base = 0, size = 0;
  u8* host = nullptr;
  std::string name;
  bool constant = false;
  std::vector<std::pair<u64, u64>> views;  // allowed [begin, end) offsets; empty: all of it
  std::vector<u8> valid;                   // by byte, of a fresh output; empty: valid from the start
  std::vector<u32> writer, reader;         // by byte: 1 + CTA that wrote or read last; empty: not followed
  std::vector<u8> touched;                 // by byte: 1 loaded, 2 stored
};

struct OpCounters {
  u64 warps = 0, lanes = 0;  // executions, and lanes in them
  u64 bytes = 0, sectors = 0, wavefronts = 0, ideal_wavefronts = 0, collisions = 0;
};

struct Options {
  u64 seed = 0;
  std::string order = "in";
  bool races = true, strict_races = false;
  bool uninit = true, uninit_at_load = false;
  bool collect = false;
  u64 budget = 0;  // instructions of a warp
};

struct Launch {
  const Program& program;
  std::array<u32, 3> grid{}, block{};
  std::vector<u8> params;
  std::vector<Region> regions;
  u64 dynamic_shared = 0;
  Options options;

  // results
  std::vector<OpCounters> counters;
  std::vector<Fault> faults;
  u64 instructions = 0;

  std::vector<u8> registers;  // a warp's initial register file, addresses of symbols filled in

  explicit Launch(const Program& program) : program(program) {}
  void run();
  std::string resolve_symbols();  // what is unknown, empty for nothing
};

struct Split {
  u32 pc, mask;
};

// What one lane's asynchronous copy still has to write.
struct PendingCopy {
  u32 shared;
  u8 bytes, lane;
  u32 group, op;
  std::array<u8, 16> data, valid;
};

struct Cta;

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  u32 live = 0, active = 0, pc = 0;
  std::vector<Split> splits;  // the others
  u8* file = nullptr;
  std::vector<u8> storage, partial;
  std::vector<std::array<u8, kLanes>> valid;
  std::vector<u32> origin;  // 1 + op that read the invalid bytes
  std::vector<u32> clock;   // of every warp, own time included
  std::vector<PendingCopy> copies;
  std::array<u32, kLanes> copy_groups{};
  int barrier = -1;
  u64 executed = 0;
  std::vector<OpCounters>* counters = nullptr;

  template <class T = u8>
  T* reg(const Op& op, int i) {
    return reinterpret_cast<T*>(file + op.regs[i].value);
  }
  u32 time() const { return clock[index]; }

  void run(u64 quantum);
  void propagate(const Op& op, u32 mask);
  void propagate_slowly(const Op& op, u32 mask);
  void set_valid(const Reg& r, u32 mask);
  void require_valid(const Op& op, const Reg& r, u32 mask, u8 bytes, const char* what);
  [[noreturn]] void raise(const Op& op, int lane, const char* kind, const std::string& what, u64 address = 0,
                          const Region* region = nullptr);
  void fault(const Op& op, int lane, const char* kind, const std::string& what, u64 address = 0,
             const Region* region = nullptr, u32 other_op = ~0u);
  void branch(const Op& op, u32 taken);
  void exit(u32 mask);
  void reselect();
  void wait_copies(u32 mask, u32 keep);
};

struct Barrier {
  u32 arrived = 0;   // threads
  u64 waiting = 0;   // warps, by bit
  u32 expected = 0;  // threads; 0: all of the CTA
};

struct Cta {
  Launch& launch;
  const Program& program;
  std::array<u32, 3> index{};
  u32 linear = 0;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<u8> shared_valid;
  std::vector<u32> writer, reader;        // stamps, by byte of shared memory
  std::vector<u32> writer_op, reader_op;  // the operations they come from
  std::vector<u32> writer_serial;         // which execution of a store wrote the byte
  u32 serial = 0;
  std::vector<u8> in_flight;  // asynchronous copies to come, by byte
  // Where several warps read a byte with no order between them: whether, and the stamp of each warp.
  std::vector<u8> many_readers;
  std::vector<u32> reader_of_warp;
  std::array<Barrier, 16> barriers{};

  Cta(Launch& launch);
  void start(u32 linear_index);
  void run();
  void release(int barrier);
  u32 live_threads() const;  // in whole warps, as barriers count them
  void read_shared(Warp& w, const Op& op, int lane, u32 offset, u32 bytes);
  // Checks and writes: data with the validity of each byte, or nothing yet (nullptr). Lanes of one instruction come
  // from the highest to the lowest, and the highest wins where they meet.
  void write_shared(Warp& w, const Op& op, int lane, u32 offset, const u8* data, const u8* valid, u32 bytes);
  void update_shared(Warp& w, const Op& op, int lane, u32 offset, u32 bytes);  // by an atomic operation
  // What both ask of one byte; false after a fault. `writers_agree`: an unordered earlier write is no error.
  bool change_shared(Warp& w, const Op& op, int lane, u32 b, bool writers_agree, const char* verb);
};

// A stamp: time << 12 | several lanes << 11 | warp << 5 | lane; 0 is "never".
constexpr u32 stamp_of(u32 time, u32 warp, u32 lane) { return time << 12 | warp << 5 | lane; }
constexpr u32 kSeveral = 1u << 11;
constexpr u32 kMaxTime = (1u << 20) - 1;

// ---- decoding: each file of operations takes the instructions it knows -------------------------------------------
class Decoder;
bool decode_alu(Decoder& d, const Instruction& in, Op& op);
bool decode_memory(Decoder& d, const Instruction& in, Op& op);
bool decode_warp(Decoder& d, const Instruction& in, Op& op);

class Decoder {
 public:
  explicit Decoder(Program& p) : p_(p) {}
  void run();

  // Operands. `type` is the instruction's type of this operand; the register may be wider, as far as the instruction
  // reads its cells: 4 bytes a lane, or 8 as well.
  enum class Wider { kNo, kInItsCell, kAny };
  Reg source(const Operand& o, const std::string& type, Wider wider = Wider::kNo);
  Reg result(const Operand& o, const std::string& type, Wider wider = Wider::kNo);
  Reg predicate(const Operand& o, bool may_be_negated = false);
  Reg constant(u64 bits, bool wide);
  Reg address_base(const Operand& o, bool& wide);
  Reg sink(bool wide);
  bool is_wide(const std::string& register_name) const;
  bool is_register(const std::string& name) const { return p_.function.registers.count(name) > 0; }
  const std::string& type_of(const std::string& name) const { return p_.function.registers.at(name); }
  void set(Op& op, const std::vector<Reg>& dst, const std::vector<Reg>& src);
  void expect_operands(const Instruction& in, size_t n) const;
  [[noreturn]] static void fail(const std::string& what) { throw PtxError(0, what); }
  Program& program() { return p_; }

 private:
  Reg allocate(bool wide, bool predicate = false);
  Reg named(const std::string& name);

  Program& p_;
  std::unordered_map<std::string, Reg> names_;
  std::map<std::pair<u64, bool>, Reg> constants_;
};

template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return std::bit_cast<To>(v);
}

}  // namespace gpusim
