// The simulated machine: programs decoded to fixed-size operations, warps of 32 lanes, shared and global memory with
// their shadows, and what is counted.
//
// Registers    structure of arrays: 32 lanes of 4 or 8 bytes (types of 1 and 2 bytes in 4), predicates one 32-bit mask.
//              Validity: one flag a register ("every byte of every lane is written") and, where it is not set, a mask
//              of valid bytes for each lane. Arithmetic looks at the flags alone.
// Control      blocks are laid out in reverse post-order, so "the split deepest in calls and lowest in that order" is
//              the deepest one with the lowest pc; splits with equal depth and pc merge. A split that has to meet other
//              lanes (.sync, barriers) is parked until they come; one that spins lets others go on.
// Calls        registers belong to functions; a lane that calls a function which it is already in saves them. Each lane
//              has a stack in local memory: variables, and parameters of calls.
// Happens-before  a vector clock for each warp, ticked and joined at barriers, releases and acquires; every byte of
//              shared memory and of tensors keeps who wrote and read it last (CTA, warp, lane, time).
// Addresses    global: storage n at (n + 1) << 32, or where the host has it; shared, local and parameter memory in
//              windows above those of any host.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
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
// Generic addresses above those of the host: which space, in the bits from 48 up.
constexpr int kWindowShift = 48;
constexpr u64 kSharedWindow = 1ull << kWindowShift, kLocalWindow = 2ull << kWindowShift,
              kParamWindow = 3ull << kWindowShift, kCodeWindow = 4ull << kWindowShift;
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
enum class Flow : u8 { kNext, kBranch, kTable, kCall, kReturn, kExit, kMeet, kBarrier, kYield };
enum class Space : u8 { kGlobal, kShared, kLocal, kParam, kGeneric };
enum class Scope : u8 { kNone, kCta, kGpu };

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
  bool aligned = false;                                    // all lanes of the warp come to this very instruction
  bool votes = false, arrives = false;                     // of a barrier: bar.red, bar.arrive
  bool strong = false;                                     // atomic, volatile, relaxed, acquire or release
  Scope acquires = Scope::kNone, releases = Scope::kNone;  // of accesses and fences
  bool wide_address = true, wide_address2 = true;          // 8 bytes a lane, or 4
  Reg guard{};
  i64 imm = 0;                // of an access: added to its address
  i64 imm2 = 0;               // the same for the second address of a copy
  void (*apply)() = nullptr;  // what an atomic operation does with a value
  u64 used_bytes = ~0ull;
  u32 target = 0;   // of a branch
  u32 meeting = 0;  // lanes at operations with equal numbers can meet; 0: only at this one
  Exec unperturbed = nullptr;
  u32 index = 0;
  int source = -1;  // index into Program::instructions
};

// A function with its place among the operations, and the layout of its frame in local memory: variables, its own
// parameters, those of the calls that it makes.
struct Code {
  const Function* function = nullptr;
  u32 begin = 0;
  u64 frame_bytes = 0;
  std::map<std::string, u64> places;
  std::vector<std::pair<u64, u64>> params;     // offset, bytes
  std::pair<u64, u64> result{0, 0};            // the same; no bytes for none
  std::vector<std::pair<Reg, u64>> addresses;  // registers that hold the address of an offset
  std::vector<std::pair<Reg, u32>> registers;  // with their bytes in the file
};

enum class Builtin : u8 { kNone, kPrint, kAssert, kAllocate, kFree };

struct CallSite {
  int code = -1;  // index into Program::codes; -1: the address is in a register, or it is built in
  Builtin builtin = Builtin::kNone;
  std::vector<std::pair<u64, u64>> arguments;
  std::pair<u64, u64> result{0, 0};
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
  kGridBarrier1,  // %envreg1 and 2: the address of the word on which a cooperative launch synchronises its grid
  kGridBarrier2,
  kNumSpecial
};

struct Unsupported {
  int line;
  std::string text, reason;
};

struct Program {
  Module module;
  const Function* entry = nullptr;
  std::vector<Code> codes;  // the entry and what it may call
  std::vector<const Instruction*> instructions;
  std::vector<std::unique_ptr<std::vector<Instruction>>> rewritten;  // bodies with fused products
  std::vector<CallSite> call_sites;
  std::vector<std::vector<u32>> tables;  // targets of brx.idx
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
  bool has_frames = false, grid_barrier = false, prints = false;
  bool has_heap = false;  // it calls malloc or free
  u64 perturbation = 0;   // seed of numerics="perturb", 0 for exact

  Program(const std::string& text, const std::string& entry, u64 perturbation = 0);
  Program(const Program&) = delete;
  const Instruction* instruction(u32 op) const;  // nullptr for what has none
  std::string where(u32 op) const;               // "file.py:12, called from file.py:40"
  bool uses(const std::string& variable) const;
  int code_of(const std::string& function);  // index into codes, of a function that the module has; -1
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
  std::vector<u8> valid;                   // by byte, of memory that nobody has written; empty: valid from the start
  bool output = false;                     // must be written completely
  struct Heap* heap = nullptr;             // its blocks are what may be accessed
};

// What kernels allocate. Blocks stand apart, so that what is beyond one is nobody's.
struct Heap {
  static constexpr u64 kSize = 8 << 20;  // as CUDA's is at first
  std::map<u64, u64> blocks;             // offset -> bytes

  u64 allocate(u64 bytes);  // the offset, ~0 for no room
  bool holds(u64 offset, u64 bytes) const;
};

// Who touched each byte of a region last, as far as the CTAs of one host thread are concerned.
struct Shadow {
  struct Read {
    u64 reader = 0;  // 1 + CTA, stamp; 0: each byte has its own
    u32 op = 0;
  };
  std::vector<u8> touched;          // 1 loaded, 2 stored; empty: no byte was touched
  bool followed = false;            // whether all that follows is kept
  std::vector<Read> reads;          // of 16 bytes that were only loaded, and all at once
  std::vector<u64> writer, reader;  // of a byte; empty: none has its own
  std::vector<u32> writer_op, reader_op;
  bool keeps_values = false;
  std::vector<u8> value;  // that was written, where several host threads are at work

  void divide(u64 offset, u64 bytes);  // from now on each of these bytes has its own
};
constexpr u64 kSeveralCtas = ~0ull;
constexpr u8 kReadFirst = 4;  // in `touched`: by a CTA before any wrote it

struct OpCounters {
  u64 warps = 0, lanes = 0;  // executions, and lanes in them
  u64 bytes = 0, sectors = 0, wavefronts = 0, ideal_wavefronts = 0, collisions = 0;
  OpCounters& operator+=(const OpCounters& o);
};

struct Options {
  u64 seed = 0;
  std::string order = "in";
  bool races = true, strict_races = false;
  bool uninit = true, uninit_at_load = false;
  bool collect = false;
  u64 budget = 0;  // instructions of a warp
  u32 threads = 1;
};

// What is known of the times of warps, by CTA. Every release takes a copy, which shares what has not changed since.
class Knowledge {
 public:
  using Times = std::shared_ptr<const std::vector<u32>>;
  const std::vector<u32>* find(u32 cta) const;  // nullptr for none
  void add(u32 cta, const Times& times);        // the later ones of these and of what is known
  void add(const Knowledge& more);

 private:
  static constexpr u32 kChunk = 64;
  using Chunk = std::array<Times, kChunk>;
  std::vector<std::shared_ptr<const Chunk>> chunks_;
};
using Known = std::shared_ptr<const Knowledge>;
Known join(const Known& a, const Known& b);

// What an acquire of a location learns: all of it within the CTA that released it, or from any other.
struct Release {
  u32 cta = 0;
  Known within, beyond;
};

struct Launch;
struct Cta;

// The part of a launch that one host thread executes.
struct Worker {
  Launch& launch;
  std::vector<Shadow> shadows;  // by region
  std::vector<OpCounters> counters;
  std::vector<Fault> faults;
  std::vector<u32> fault_turns;  // which CTA in turn each belongs to
  std::unordered_map<u64, Release> releases;
  u64 instructions = 0;
  u32 turn = 0;
  std::string output;  // of printf

  explicit Worker(Launch& launch);
  Shadow& shadow(const Region& r);
  void run(const std::vector<u32>& order, u32 first, u32 step);

 private:
  void run_resident(const std::vector<u32>& order);
};

struct Launch {
  const Program& program;
  std::array<u32, 3> grid{}, block{};
  std::vector<u8> params;
  std::vector<Region> regions;
  u64 dynamic_shared = 0;
  u64 grid_barrier = 0;  // address of the word of a cooperative launch
  bool relocate = true;  // write addresses into the variables that hold them initially
  Options options;

  // results
  std::vector<OpCounters> counters;
  std::vector<Fault> faults;
  std::vector<Shadow> shadows;
  u64 instructions = 0;
  std::string output;

  std::vector<u8> registers;   // a warp's initial register file, addresses of symbols filled in
  std::unique_ptr<Heap> heap;  // of this launch alone, where no region has one
  std::vector<u8> heap_memory;

  explicit Launch(const Program& program) : program(program) {}
  void run();
  std::string resolve_symbols();  // what is unknown, empty for nothing
  Region* region_of(u64 address);
  u64 address_of(const std::string& symbol) const;  // of a variable or a function; 0 for none

 private:
  std::vector<u32> order_of_ctas() const;
  void add_heap();
  void merge(std::vector<std::unique_ptr<Worker>>& workers, const std::vector<u32>& order);
  void check_outputs();
};

struct Split {
  u32 pc, mask, depth;
  bool yields;
};

// Lanes that wait at an operation for others.
struct Parked {
  const Op* op;
  u32 mask, named, depth;
};

struct Frame {
  u32 call;               // operation
  u32 base, top;          // of the caller's frame
  int code;               // that was called
  std::vector<u8> saved;  // this lane's registers of it, where the lane was in it already
};

// A lane's local memory and what it has called.
struct Stack {
  std::vector<Frame> frames;
  std::vector<u8> memory, valid;
  u32 base = 0, top = 0;
  u64 saved = 0;  // bytes of registers in the frames
};

// What one lane's asynchronous copy still has to write.
struct PendingCopy {
  u32 shared;
  u8 bytes, lane;
  u32 group, op;
  std::array<u8, 16> data, valid;
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  u32 live = 0, active = 0, pc = 0, depth = 0;
  std::vector<Split> splits;  // the others
  std::vector<Parked> parked;
  u32 spins = 0;                       // jumps back since the last change of splits
  const Op* const* meeting = nullptr;  // by lane, while lanes of several operations meet
  std::array<Stack, kLanes> stacks;
  u8* file = nullptr;
  std::vector<u8> storage, partial;
  std::vector<std::array<u8, kLanes>> valid;
  std::vector<u32> origin;  // 1 + op that read the invalid bytes
  std::unordered_map<u32, Fault> racy_loads;
  std::vector<u32> clock;    // of every warp of the CTA, own time included
  u32 converged = 0;         // own time before which the lanes are in order among themselves
  Known foreign;             // what is known of other CTAs
  Known fenced_cta, fenced;  // what a strong write publishes: the state at the last fence, of a CTA's or a wider scope
  Known seen;                // what strong reads found and the next fence makes known
  std::vector<PendingCopy> copies;
  std::array<u32, kLanes> copy_groups{};
  int barrier = -1;
  const Op* barrier_op = nullptr;
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
  // control
  Fault fault_at(const Op& op, int lane, const char* kind, const std::string& what, u64 address = 0,
                 const Region* region = nullptr) const;
  void tell(const Fault& f);  // raised, or collected
  void branch(const Op& op, u32 taken, u32 target);
  void jump_by_table(const Op& op, u32 mask);
  void call(const Op& op, u32 mask);
  void enter(const Op& op, u32 mask, int code);
  void leave(u32 mask);
  void print(const Op& op, int lane);
  [[noreturn]] void fail_assertion(const Op& op, int lane);
  void allocate(const Op& op, int lane);
  void free(const Op& op, int lane);
  void exit(u32 mask);
  void reselect();
  void yield();
  void meet(const Op& op, u32 mask);
  void complete(u32 meeting, u32 named);
  void arrive(const Op& op, u32 mask);
  [[noreturn]] void stuck();
  // asynchronous copies
  void wait_copies(u32 mask, u32 keep);
  // order
  void tick(const Op& op);
  Known snapshot() const;
  void learn(const Known& what);
  void learn(const std::vector<u32>& times);  // of the own CTA
  void fence(const Op& op);
  void publish(const Op& op, u64 location);
  void observe(const Op& op, u64 location);
};

// f(operation, lanes) for each operation that takes part in a meeting.
template <class F>
void for_each_op(Warp& w, const Op& op, u32 mask, F f) {
  if (w.meeting == nullptr) return f(op, mask);
  for (u32 left = mask; left;) {
    const Op* at = w.meeting[std::countr_zero(left)];
    u32 same = 0;
    for (int l = 0; l < kLanes; ++l)
      if (left >> l & 1 && w.meeting[l] == at) same |= 1u << l;
    left &= ~same;
    f(*at, same);
  }
}

struct Barrier {
  u32 arrived = 0;            // threads
  u64 waiting = 0;            // warps, by bit
  u64 members = 0;            // the same with those that arrived and went on
  u32 expected = 0;           // threads; 0: all of the CTA
  u32 votes = 0, voters = 0;  // of bar.red
  std::vector<u32> clock;     // of those that went on
  Known foreign;
};

// An mbarrier's order: what those knew that arrived in this phase, and in the one before.
struct Phase {
  std::vector<u32> arriving, complete;
};

// Who wrote and read some bytes of shared memory last: 16 of them, as long as they are accessed together, 4, or one.
struct History {
  u32 writer = 0, reader = 0;        // stamps
  u32 writer_op = 0, reader_op = 0;  // the operations they come from
  u32 serial = 0;                    // which execution of a store wrote the bytes
  u32 others = 0;                    // readers besides, with no order between them: a set of Readers
  u8 in_flight = 0;                  // asynchronous copies to come
  bool plain = false;                // some of those others are plain loads
  bool split = false;                // its parts have histories of their own
  bool operator==(const History&) const = default;
};

// Sets of warps with the times at which they read something, by numbers that are equal where the sets grew alike.
struct Readers {
  size_t warps = 0;
  std::vector<u32> times;  // by set and warp: 1 + time, 0 for no member
  std::unordered_map<u64, u32> grown;
  struct Step {
    u64 key = 0;
    u32 to = 0;
  };
  std::array<Step, 64> last{};  // by warp

  void start(size_t number_of_warps);
  u32 add(u32 set, u32 warp, u32 time);
};

struct Cta {
  Worker& worker;
  Launch& launch;
  const Program& program;
  std::array<u32, 3> index{};
  u32 linear = 0;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<u8> shared_valid;
  // Of shared memory, in units of 16 bytes; words, halves of them and bytes where the larger are split.
  std::vector<History> units, words, halves, bytes;
  std::vector<u32> settled;  // by warp: what it did before this time happens before all that is to come
  Readers readers;
  u32 serial = 0;
  std::array<Barrier, 16> barriers{};
  std::unordered_map<u32, Phase> phases;
  std::vector<int> order;  // of its warps
  std::mt19937_64 random;
  u32 turn = 0;

  explicit Cta(Worker& worker);
  void start(u32 linear_index, u32 turn);
  bool run(u64 quantum);  // each warp for so many instructions; whether all have ended
  void release(int barrier);
  u32 live_threads() const;  // in whole warps, as barriers count them
  void read_shared(Warp& w, const Op& op, int lane, u32 offset, u32 bytes);
  // Checks and writes: data with the validity of each byte, or nothing yet (nullptr). Lanes of one instruction come
  // from the highest to the lowest, and the highest wins where they meet.
  void write_shared(Warp& w, const Op& op, int lane, u32 offset, const u8* data, const u8* valid, u32 bytes);
  // The same for lanes that are all inside: 1, 2, 4, 8 or 16 aligned bytes of each; data that are wholly valid.
  void read_shared(Warp& w, const Op& op, u32 mask, const u64* offsets, u32 bytes);
  void write_shared(Warp& w, const Op& op, u32 mask, const u64* offsets, const u8 (*data)[16], u32 bytes, bool highest);
  void update_shared(Warp& w, const Op& op, int lane, u32 offset, u32 bytes);  // by an atomic operation
  void start_copy(Warp& w, const Op& op, int lane, u32 offset, u32 bytes);
  void end_copy(Warp& w, const PendingCopy& copy);

 private:
  // f(history, its first byte, its bytes) for all that an access touches, while it gives true.
  template <class F>
  void for_each_history(u32 offset, u32 count, F f);
  // The same for the parts of a unit, or of a word, that is split or not accessed as a whole.
  template <u32 kBytes, class F>
  bool for_each_part(History& whole, u32 offset, u32 end, F f);
  template <u32 kBytes>
  History* parts_of(u32 offset);
  template <u32 kBytes>
  History* split(History& whole, u32 offset);  // if it is not; its parts
  template <u32 kBytes>
  bool is_settled(const History& h, u32 offset);
  template <u32 kBytes>
  History* histories_of(u32 offset);
  bool note_read(const Warp& w, const Op& op, int lane, History& h);
  template <u32 kBytes>
  History* note_write(const Warp& w, const Op& op, int lane, u32 offset);
  template <u32 kBytes>
  void read_lanes(Warp& w, const Op& op, u32 mask, const u64* offsets);
  template <u32 kBytes>
  void write_lanes(Warp& w, const Op& op, u32 mask, const u64* offsets, const u8 (*data)[16], bool highest);
  // What writes and updates ask of a history; false after a fault. `writers_agree`: an unordered earlier write is no
  // error.
  bool change(Warp& w, const Op& op, int lane, History& h, u32 first, bool writers_agree, const char* verb);
};

// The same for bytes of a region. A plain load that races with a store of the same CTA tells so where its value is
// used: threads that hold a value twice load it twice, one of them stores the result, and the other's is never used.
// False for such a load, whose fault waits in Warp::racy_loads.
bool follow_read(Warp& w, const Op& op, int lane, Region& r, u64 offset, u32 bytes);
void follow_write(Warp& w, const Op& op, int lane, Region& r, u64 offset, const u8* data, u32 bytes);

// A stamp: time << 12 | several lanes << 11 | warp << 5 | lane; 0 is "never".
constexpr u32 stamp_of(u32 time, u32 warp, u32 lane) { return time << 12 | warp << 5 | lane; }
constexpr u32 kSeveral = 1u << 11;
constexpr u32 kSeveralWarps = 63u << 5;  // in place of a warp: no time is known
constexpr u32 kMaxTime = (1u << 20) - 1;

// ---- decoding: each file of operations takes the instructions it knows -------------------------------------------
class Decoder;
bool decode_alu(Decoder& d, const Instruction& in, Op& op);
bool decode_memory(Decoder& d, const Instruction& in, Op& op);
bool decode_warp(Decoder& d, const Instruction& in, Op& op);
bool decode_sync(Decoder& d, const Instruction& in, Op& op);
bool decode_matrix(Decoder& d, const Instruction& in, Op& op);
void perturb(Op& op, const Instruction& in);
std::vector<Instruction> fuse_products(const Function& function);

// The state space that an instruction names; generic for none.
Space space_of(const Instruction& in);
// Order and scope of a strong access or a fence, from its modifiers.
void set_order(const Instruction& in, Op& op);

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
  Reg predicate_or_sink(const Operand& o) { return o.name == "_" ? sink(false) : predicate(o); }
  Reg constant(u64 bits, bool wide);
  Reg address_base(const Operand& o, bool& wide);
  Reg sink(bool wide);
  Reg carry();  // the condition code, as a predicate
  bool is_wide(const std::string& register_name) const;
  bool is_register(const std::string& name) const { return code().function->registers.count(name) > 0; }
  const std::string& type_of(const std::string& name) const { return code().function->registers.at(name); }
  bool is_entry() const { return current_ == 0; }
  Code& code() { return p_.codes[static_cast<size_t>(current_)]; }
  const Code& code() const { return p_.codes[static_cast<size_t>(current_)]; }
  u32 meeting(const std::string& what);  // a number for what can meet
  void set(Op& op, const std::vector<Reg>& dst, const std::vector<Reg>& src);
  void expect_operands(const Instruction& in, size_t n) const;
  [[noreturn]] static void fail(const std::string& what) { throw PtxError(0, what); }
  Program& program() { return p_; }

 private:
  Reg allocate(bool wide, bool predicate = false);
  Reg named(const std::string& name);
  void lay_out_frame();
  void function();
  void operation(const Instruction& in, Op& op);
  void decode_call(const Instruction& in, Op& op);

  Program& p_;
  int current_ = 0;  // of p_.codes
  std::unordered_map<std::string, Reg> names_;
  std::map<std::pair<u64, bool>, Reg> constants_;
  std::map<std::string, Reg> symbols_;
  std::map<std::string, u32> meetings_;
  Reg carry_{};
  bool has_carry_ = false;
};

template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return std::bit_cast<To>(v);
}

}  // namespace gpusim
