// The emulated machine: instructions, warps, blocks. A warp's registers are rows of 32 lanes, so that an instruction is
// one loop over lanes that the compiler vectorises.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "bulk_copy.h"
#include "global_races.h"
#include "mbarrier.h"
#include "memory.h"
#include "warpgroup.h"

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

constexpr int kMaxOperands = 144;
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
  std::span<const int32_t> operand;
  // Registers of it that some wgmma uses: row << 1, and 1 where it is written. Of a move: source, destination.
  std::span<const int32_t> tracked;
  bool is_move;
};

struct InstructionCounts {
  uint64_t warps = 0;
  uint64_t threads = 0;
  uint64_t requests = 0;  // warp-level memory requests
  uint64_t shared_wavefronts = 0;
  uint64_t ideal_wavefronts = 0;  // what the same bytes need without a bank conflict
  uint64_t global_sectors = 0;    // 32 B each
  uint64_t bulk_bytes = 0;        // moved by the TMA unit
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

// Why a warp does not run, beyond barriers.
enum class Sleep { none, mbarrier, registers, cluster };

// barrier.cluster of a cluster of one block: arrivals and waits are two instructions.
struct ClusterBarrier {
  uint32_t phase = 0;  // completed
  int n_arrived = 0;
  Clock arriving;
  Clock completed;
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
  int waits_at = -1;  // id of the barrier
  Sleep sleep = Sleep::none;
  uint32_t sleeps_at = 0;  // address of the mbarrier
  int32_t sleep_pc = 0;
  bool yields = false;                                  // ends its turn
  BarrierReduction reduction = BarrierReduction::none;  // what bar.red delivers, and where
  int32_t reduction_operand = kNoRow;
  int lane = -1;            // being served, for the report of a fault
  uint32_t selections = 0;  // of a fragment, since the warp was last in one piece
  std::vector<uint32_t> row_storage;
  uint32_t* rows;
  std::vector<Mask> predicates;
  Mask carry = 0;  // the condition code of .cc
  std::vector<PendingCopy> copies;
  std::array<uint32_t, kLanes> committed_groups{};
  std::vector<LocalMemory> local;
  std::vector<BulkStore> bulk_stores;
  std::array<uint32_t, kLanes> committed_bulk_groups{};
  uint32_t cluster_arrivals = 0;
  WarpgroupState warpgroup;

  uint32_t* row32(int32_t row) { return rows + size_t{kLanes} * row; }
  uint64_t* row64(int32_t row) { return reinterpret_cast<uint64_t*>(rows + size_t{kLanes} * row); }
  Mask predicate(int32_t operand) const {
    const Mask value = predicates[operand & ~kNegatedPredicate];
    return operand & kNegatedPredicate ? ~value : value;
  }
  void set_predicate(int32_t index, Mask value) { predicates[index] = (predicates[index] & ~exec) | (value & exec); }
  bool ready() const { return !finished && !at_barrier && sleep == Sleep::none; }
  // Ends the turn until `why` is over, unless another fragment can run.
  void doze(Sleep why, uint32_t mbarrier);
  int32_t waiting_pc() const;  // of the instruction that a warp that is not ready waits in
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
  ClusterBarrier cluster;
  std::vector<std::unique_ptr<Warp>> warps;
  int n_running = 0;
  Mbarriers mbarriers;
  std::vector<BulkLoad> bulk_loads;
  std::vector<Warpgroup> warpgroups;
  uint32_t free_registers = 0;
  uint64_t effects_at_wake = ~uint64_t{0};

  Block(Launch& launch, uint64_t number);
  void arrive(Warp& warp, int id, uint32_t expected_threads, bool waits);
  void release_if_complete(int id);
  void release_cluster_if_complete();
  void complete_phase_if_done(Mbarrier& barrier);
  void wake(Sleep why, uint32_t mbarrier);
  // Lands one of the bulk loads.
  void land(size_t load);
  // No warp is ready: lets time pass. False when that cannot help.
  bool pass_time();
  std::string describe_wait(const Warp& warp) const;
};

// Bulk stores of threads that end: the kernel's end waits for what they write, nothing for what they read.
void finish_bulk_stores(Warp& warp, Mask lanes);

struct Kernel {
  Kernel() = default;
  Kernel(Kernel&&) = default;
  Kernel(const Kernel&) = delete;

  std::vector<Instruction> code;
  std::vector<int32_t> operand_pool;  // what the instructions' spans point into
  std::vector<int32_t> tracked_pool;
  int32_t n_rows;  // constants and special registers included
  int32_t n_predicates;
  uint32_t static_shared_end;  // address behind the statically allocated shared memory
  uint32_t local_bytes;
  bool uses_wgmma = false;
  uint32_t registers_per_thread;  // at launch; 0 when the launch bounds do not say
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
  uint64_t reluctant;   // bit i: warp i of a block runs only where no other warp of it can
  bool lists_products;
  bool lax;  // passes over what other people's kernels do less strictly than ours: see README.md
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
  std::vector<std::array<uint64_t, 4>> products;  // of wgmma, where wanted: warp, instruction, descriptors of A and B
  uint64_t idle_instructions = 0;                 // since the last effect
  uint64_t n_effects = 0;
  uint64_t random_state;

  void run();
  uint64_t random();
  void progress() {
    idle_instructions = 0;
    ++n_effects;
  }
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
