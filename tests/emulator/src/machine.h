// The emulated machine: instructions, warps, blocks. A warp's registers are rows of 32 lanes, so that an instruction is
// one loop over lanes that the compiler vectorises.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "global_races.h"
#include "memory.h"

namespace emulator {

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

// A handler and the constant that selects its variant (a type size, a comparison, …).
struct Operation {
  Handler handler = nullptr;
  int64_t variant = 0;
};

// Key: the opcode as PTX spells it, without cache hints.
using Registry = std::unordered_map<std::string, Operation>;
const Registry& registry();

constexpr int kMaxOperands = 24;
constexpr int kNoRow = -1;
constexpr int kTruePredicate = 1;  // predicate 0 is always false
constexpr int kNegatedPredicate = 1 << 30;

// Register operands are rows of the register file, predicates are indices (kNegatedPredicate marks `!p`), an address is
// three entries: row of the base, 1 if the base is 64 bits wide, byte offset.
struct Instruction {
  Handler handler;
  int64_t variant;
  int32_t guard;           // predicate, kNoRow when unguarded
  int32_t target;          // of a branch
  uint32_t wide_operands;  // bit i: operand i is a 64-bit register
  int32_t n_operands;
  std::array<int32_t, kMaxOperands> operand;
};

struct InstructionCounts {
  uint64_t warps = 0;
  uint64_t threads = 0;
  uint64_t requests = 0;  // warp-level memory requests
  uint64_t shared_wavefronts = 0;
  uint64_t ideal_wavefronts = 0;  // what the same bytes need without a bank conflict
  uint64_t global_sectors = 0;    // 32 B each
};

// Lanes of one warp that share a program counter.
struct Fragment {
  int32_t pc;
  Mask lanes;
  Mask waits_for;  // lanes that must arrive at pc first; 0 when it can run
};

struct PendingCopy {
  Mask lanes;
  uint32_t size;
  std::array<uint64_t, kLanes> source;
  std::array<uint32_t, kLanes> source_size;
  std::array<uint32_t, kLanes> destination;
  std::array<uint32_t, kLanes> group;
  std::array<std::array<uint8_t, 16>, kLanes> bytes;
};

enum class BarrierReduction : int64_t { none, popc, conjunction, disjunction };

struct NamedBarrier {
  uint32_t arrived_threads = 0;
  uint32_t expected_threads = 0;  // 0: all warps of the block that have not exited
  uint32_t n_arrived = 0;
  Clock clock;
  std::vector<Warp*> waiting;
  uint32_t population = 0;    // threads that brought a true predicate to bar.red
  uint32_t participants = 0;  // threads that brought any
};

struct Kernel;
struct Block;
struct Launch;

struct Warp {
  Block* block;
  Launch* launch;
  const Kernel* kernel;
  int index;
  Mask present;  // lanes that were launched
  Mask exited = 0;
  Mask active;  // lanes of the running fragment
  Mask exec;    // active lanes whose guard holds
  int32_t pc = 0;
  int32_t next_pc = 0;
  std::vector<Fragment> parked;
  int32_t nearest_parked_pc = INT32_MAX;
  bool at_barrier = false;
  bool finished = false;
  int waits_at = -1;                                    // id of the barrier
  BarrierReduction reduction = BarrierReduction::none;  // what bar.red delivers, and where
  int32_t reduction_operand = kNoRow;
  int lane = -1;            // being served, for the report of a fault
  uint32_t selections = 0;  // of a fragment, since the warp was last in one piece
  std::vector<uint32_t> row_storage;
  uint32_t* rows;
  std::vector<Mask> predicates;
  std::vector<PendingCopy> copies;
  std::array<uint32_t, kLanes> committed_groups{};
  std::vector<LocalMemory> local;

  uint32_t* row32(int32_t row) { return rows + size_t{kLanes} * row; }
  uint64_t* row64(int32_t row) { return reinterpret_cast<uint64_t*>(rows + size_t{kLanes} * row); }
  Mask predicate(int32_t operand) const {
    const Mask value = predicates[operand & ~kNegatedPredicate];
    return operand & kNegatedPredicate ? ~value : value;
  }
  void set_predicate(int32_t index, Mask value) { predicates[index] = (predicates[index] & ~exec) | (value & exec); }
  Mask alive() const { return present & ~exited; }
  InstructionCounts& counts();
  // Takes the running lanes off their instruction until `lanes` have arrived there too. True when they all have.
  bool converge(Mask lanes);
  void branch(int32_t target, Mask taken);
  void exit_lanes(Mask lanes);
  void select_fragment();
  void step();
  void lay_out(const std::array<uint32_t, 3>& block_index);
};

struct Block {
  std::array<uint32_t, 3> index;
  Launch* launch;
  Ordering ordering;
  SharedMemory shared;
  std::array<NamedBarrier, 16> barriers;
  std::vector<std::unique_ptr<Warp>> warps;
  int n_running = 0;

  Block(Launch& launch, uint64_t number);
  void arrive(Warp& warp, int id, uint32_t expected_threads, bool waits);
  void release_if_complete(int id);
};

struct Kernel {
  std::vector<Instruction> code;
  int32_t n_rows;  // constants and special registers included
  int32_t n_predicates;
  uint32_t static_shared_end;  // address behind the statically allocated shared memory
  uint32_t local_bytes;
  std::vector<std::pair<int32_t, uint32_t>> constants32;
  std::vector<std::pair<int32_t, uint64_t>> constants64;
};

struct LaunchOptions {
  std::array<uint32_t, 3> grid;
  std::array<uint32_t, 3> block;
  uint32_t dynamic_shared_bytes;
  uint64_t seed;
  uint32_t concurrent_blocks;
  uint64_t spin_limit;  // warp instructions without an effect before the program counts as stuck
};

struct Launch {
  const Kernel* kernel;
  LaunchOptions options;
  GlobalMemory* global;
  std::unique_ptr<GlobalRaces> races;
  Publications published;  // by strong writes to global memory
  std::vector<uint8_t> parameters;
  std::vector<uint8_t> constants;  // the module's constant bank
  std::vector<InstructionCounts> counts;
  uint64_t idle_instructions = 0;  // since the last effect
  uint64_t random_state;

  void run();
  uint64_t random();
  void progress() { idle_instructions = 0; }
};

inline InstructionCounts& Warp::counts() { return launch->counts[pc]; }

// Special registers occupy the first rows, in this order.
enum SpecialRow : int32_t {
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
  kSmId,
  kNSmId,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kDynamicSharedSize,
  kTotalSharedSize,
  kSpecialRows
};

}  // namespace emulator
