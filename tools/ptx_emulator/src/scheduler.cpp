// Control flow within a warp, barriers within a block, and the order in which warps run.
//
// Lanes of a warp that share a program counter form a fragment. The fragment with the smallest program counter runs,
// and fragments merge where their counters meet: compilers lay out code so that the point where branches join comes
// behind them, so this reconverges there, whatever the nesting.
#include <algorithm>
#include <bit>

#include "machine.h"

namespace emulator {
namespace {

constexpr uint32_t kRegisterPoison = 0xdeadbeef;
constexpr uint32_t kPatience = 4096;  // selections of the lowest fragment before the others get a turn

std::string thread_set(const Warp& warp, Mask lanes) {
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    int end = lane;
    while (end + 1 < kLanes && (lanes >> (end + 1) & 1)) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(warp.index * kLanes + lane);
    if (end > lane) text += "-" + std::to_string(warp.index * kLanes + end);
    lane = end;
  }
  return text;
}

int n_warps(const LaunchOptions& options) {
  return static_cast<int>((options.block[0] * options.block[1] * options.block[2] + kLanes - 1) / kLanes);
}

}  // namespace

bool Warp::converge(Mask lanes) {
  if (exec & ~lanes) {
    lane = std::countr_zero(exec & ~lanes);
    raise(FaultKind::divergence,
          "thread executes a collective instruction whose member mask " + hex(lanes) + " does not name it");
  }
  if (lanes & ~alive()) {
    raise(FaultKind::divergence, "collective instruction for threads that have exited or were never launched: " +
                                     thread_set(*this, lanes & ~alive()));
  }
  if (exec == lanes) return true;
  if (active != exec) parked.push_back({pc + 1, active & ~exec, 0});
  parked.push_back({pc, exec, lanes});
  active = 0;
  nearest_parked_pc = -1;
  return false;
}

void Warp::branch(int32_t target, Mask taken) {
  if (taken == active) {
    next_pc = target;
  } else {
    parked.push_back({target, taken, 0});
    active &= ~taken;
  }
  if (!parked.empty()) nearest_parked_pc = -1;
}

void Warp::exit_lanes(Mask lanes) {
  finish_bulk_stores(*this, lanes);
  exited |= lanes;
  active &= ~lanes;
  for (const Fragment& fragment : parked) {
    if (!(fragment.waits_for & lanes)) continue;
    pc = fragment.pc;
    lane = std::countr_zero(fragment.lanes);
    raise(FaultKind::divergence, "collective instruction waits for threads " +
                                     thread_set(*this, fragment.waits_for & lanes) + " that exit without it");
  }
  if (!parked.empty()) nearest_parked_pc = -1;
  if (alive()) return;
  finish_warpgroup(*this);
  if (block->n_running == 1 && !block->bulk_loads.empty()) {
    raise(FaultKind::race, "the block ends while a bulk copy to its shared memory is on its way");
  }
  finished = true;
  launch->progress();
  --block->n_running;
  for (int id = 0; id < static_cast<int>(block->barriers.size()); ++id) block->release_if_complete(id);
  block->release_cluster_if_complete();
}

void Warp::select_fragment() {
  if (finished) return;
  if (active) parked.push_back({pc, active, 0});
  std::sort(parked.begin(), parked.end(), [](const Fragment& a, const Fragment& b) { return a.pc < b.pc; });
  size_t n = 0;
  for (const Fragment& fragment : parked) {
    if (n > 0 && parked[n - 1].pc == fragment.pc) {
      parked[n - 1].lanes |= fragment.lanes;
      parked[n - 1].waits_for = 0;
    } else {
      parked[n++] = fragment;
    }
  }
  parked.resize(n);
  const auto runnable = [](const Fragment& fragment) { return fragment.waits_for == 0; };
  auto chosen = std::find_if(parked.begin(), parked.end(), runnable);
  if (chosen == parked.end()) {
    std::string places;
    for (const Fragment& fragment : parked)
      places += "; threads " + thread_set(*this, fragment.lanes) + " wait at {pc" + std::to_string(fragment.pc) + "}";
    pc = parked[0].pc;
    lane = std::countr_zero(parked[0].lanes);
    raise(FaultKind::divergence,
          "threads of one warp wait for each other at different collective instructions" + places);
  }
  // A lane that spins until another lane of its warp acts must not keep it from acting.
  if (parked.size() > 1 && ++selections > kPatience) {
    const size_t skip = launch->random() % parked.size();
    for (size_t i = 0; i < parked.size(); ++i) {
      const auto other = parked.begin() + static_cast<std::ptrdiff_t>((skip + i) % parked.size());
      if (runnable(*other)) {
        chosen = other;
        break;
      }
    }
  }
  pc = chosen->pc;
  active = chosen->lanes;
  parked.erase(chosen);
  if (parked.empty()) selections = 0;
  nearest_parked_pc = INT32_MAX;
  for (const Fragment& fragment : parked) {
    if (runnable(fragment) || fragment.pc > pc) nearest_parked_pc = std::min(nearest_parked_pc, fragment.pc);
  }
}

void Warp::step() {
  const Instruction& instruction = kernel->code[pc];
  InstructionCounts& count = counts();
  ++count.warps;
  exec = active;
  if (instruction.guard != kNoRow) exec &= predicate(instruction.guard);
  next_pc = pc + 1;
  lane = -1;
  if (exec) {
    count.threads += std::popcount(exec);
    if (!instruction.tracked.empty()) track_registers(*this, instruction);
    instruction.handler(*this, instruction);
  }
  pc = next_pc;
  if (pc >= nearest_parked_pc) select_fragment();
}

void Warp::doze(Sleep why, uint32_t mbarrier) {
  yields = true;
  const auto runnable = [](const Fragment& fragment) { return fragment.waits_for == 0; };
  if (std::any_of(parked.begin(), parked.end(), runnable)) return;
  sleep = why;
  sleeps_at = mbarrier;
  sleep_pc = pc;
}

int32_t Warp::waiting_pc() const {
  if (sleep != Sleep::none) return sleep_pc;
  return at_barrier ? pc - 1 : pc;
}

void Warp::lay_out(const std::array<uint32_t, 3>& block_index) {
  row_storage.assign(size_t{kLanes} * kernel->n_rows + 16, kRegisterPoison);
  rows = row_storage.data();
  while (reinterpret_cast<uintptr_t>(rows) % 64 != 0) ++rows;
  predicates.assign(kernel->n_predicates, 0);
  predicates[kTruePredicate] = kFullMask;
  const LaunchOptions& options = launch->options;
  const auto& shape = options.block;
  const uint32_t n_threads = shape[0] * shape[1] * shape[2];
  for (uint32_t i = 0; i < kLanes; ++i) {
    const uint32_t thread = index * kLanes + i;
    const auto set = [&](int32_t row, uint32_t value) { row32(row)[i] = value; };
    set(kTidX, thread % shape[0]);
    set(kTidY, thread / shape[0] % shape[1]);
    set(kTidZ, thread / shape[0] / shape[1]);
    for (int axis = 0; axis < 3; ++axis) {
      set(kNtidX + axis, shape[axis]);
      set(kCtaidX + axis, block_index[axis]);
      set(kNctaidX + axis, options.grid[axis]);
    }
    set(kLaneId, i);
    set(kWarpId, index);
    set(kNWarpId, (n_threads + kLanes - 1) / kLanes);
    set(kSmId, 0);
    set(kNSmId, 1);
    set(kLanemaskEq, 1u << i);
    set(kLanemaskLt, (1u << i) - 1);
    set(kLanemaskLe, (2u << i) - 1);
    set(kLanemaskGt, ~((2u << i) - 1));
    set(kLanemaskGe, ~((1u << i) - 1));
    set(kDynamicSharedSize, options.dynamic_shared_bytes);
    set(kTotalSharedSize, kernel->static_shared_end - kSharedBase + options.dynamic_shared_bytes);
    for (const auto& [row, value] : kernel->constants32) set(row, value);
    for (const auto& [row, value] : kernel->constants64) row64(row)[i] = value;
  }
  warpgroup.register_limit = kernel->registers_per_thread;
  if (kernel->uses_wgmma) warpgroup.registers.resize(kernel->n_rows);
  local.assign(kernel->local_bytes ? kLanes : 0, LocalMemory(kernel->local_bytes));
}

Block::Block(Launch& owner, uint64_t number)
    : index{static_cast<uint32_t>(number % owner.options.grid[0]),
            static_cast<uint32_t>(number / owner.options.grid[0] % owner.options.grid[1]),
            static_cast<uint32_t>(number / owner.options.grid[0] / owner.options.grid[1])},
      launch(&owner),
      ordering(number, n_warps(owner.options)),
      shared(owner.kernel->static_shared_end - kSharedBase + owner.options.dynamic_shared_bytes, n_warps(owner.options),
             ordering, owner.options.lax) {
  const auto& shape = owner.options.block;
  const uint32_t n_threads = shape[0] * shape[1] * shape[2];
  for (uint32_t first = 0; first < n_threads; first += kLanes) {
    auto warp = std::make_unique<Warp>();
    warp->block = this;
    warp->launch = &owner;
    warp->kernel = owner.kernel;
    warp->index = static_cast<int>(first / kLanes);
    const uint32_t n_lanes = std::min<uint32_t>(kLanes, n_threads - first);
    warp->present = n_lanes == kLanes ? kFullMask : (1u << n_lanes) - 1;
    warp->active = warp->present;
    warp->lay_out(index);
    warps.push_back(std::move(warp));
  }
  n_running = static_cast<int>(warps.size());
  warpgroups.resize((warps.size() + 3) / 4);
}

void Block::arrive(Warp& warp, int id, uint32_t expected_threads, bool waits) {
  NamedBarrier& barrier = barriers[id];
  if (expected_threads % kLanes != 0) {
    raise(FaultKind::divergence, "barrier " + std::to_string(id) + " expects " + std::to_string(expected_threads) +
                                     " threads, not a multiple of 32");
  }
  if (barrier.n_arrived > 0 && barrier.expected_threads != expected_threads) {
    raise(FaultKind::divergence, "barrier " + std::to_string(id) + " is used for " +
                                     std::to_string(barrier.expected_threads) + " and for " +
                                     std::to_string(expected_threads) + " threads at the same time (0: all)");
  }
  if (barrier.n_arrived == 0) barrier.clock.block = ordering.clock(warp.index).block;
  barrier.expected_threads = expected_threads;
  ++barrier.n_arrived;
  barrier.arrived_threads += kLanes;
  barrier.clock.join(ordering.clock(warp.index));
  ordering.synchronise(warp.index);
  if (waits) {
    warp.at_barrier = true;
    warp.waits_at = id;
    barrier.waiting.push_back(&warp);
  }
  release_if_complete(id);
}

void Block::release_if_complete(int id) {
  NamedBarrier& barrier = barriers[id];
  if (barrier.n_arrived == 0) return;
  if (barrier.expected_threads == 0 ? static_cast<int>(barrier.n_arrived) < n_running
                                    : barrier.arrived_threads < barrier.expected_threads) {
    return;
  }
  for (Warp* warp : barrier.waiting) {
    ordering.join(warp->index, barrier.clock);
    warp->at_barrier = false;
    if (warp->reduction == BarrierReduction::none) continue;
    const Mask lanes = warp->alive();
    if (warp->reduction == BarrierReduction::popc) {
      for (int i = 0; i < kLanes; ++i) {
        if (lanes >> i & 1) warp->row32(warp->reduction_operand)[i] = barrier.population;
      }
    } else {
      const bool value = warp->reduction == BarrierReduction::conjunction ? barrier.population == barrier.participants
                                                                          : barrier.population > 0;
      Mask& predicate = warp->predicates[warp->reduction_operand];
      predicate = (predicate & ~lanes) | (value ? lanes : 0);
    }
    warp->reduction = BarrierReduction::none;
  }
  barrier = NamedBarrier{};
  launch->progress();
}

void Block::release_cluster_if_complete() {
  if (cluster.n_arrived == 0 || cluster.n_arrived < n_running) return;
  ++cluster.phase;
  cluster.n_arrived = 0;
  cluster.completed = cluster.arriving;
  cluster.arriving = Clock{};
  wake(Sleep::cluster, 0);
  launch->progress();
}

void Block::wake(Sleep why, uint32_t mbarrier) {
  for (const auto& warp : warps) {
    if (warp->sleep == why && warp->sleeps_at == mbarrier) warp->sleep = Sleep::none;
  }
}

// A wait for an mbarrier may also end because it took too long, so that the warp can do something else.
bool Block::pass_time() {
  if (!bulk_loads.empty()) {
    land(launch->random() % bulk_loads.size());
    return true;
  }
  if (effects_at_wake == launch->n_effects) return false;
  effects_at_wake = launch->n_effects;
  bool any = false;
  for (const auto& warp : warps) {
    any |= warp->sleep == Sleep::mbarrier;
    if (warp->sleep == Sleep::mbarrier) warp->sleep = Sleep::none;
  }
  return any;
}

std::string Block::describe_wait(const Warp& warp) const {
  std::string text = std::to_string(warp.index) + " at ";
  if (warp.sleep == Sleep::registers) {
    text += "setmaxnreg, " + std::to_string(free_registers) + " registers are free";
  } else if (warp.sleep == Sleep::cluster) {
    text += "barrier.cluster.wait";
  } else if (warp.sleep == Sleep::mbarrier) {
    const auto found = mbarriers.find(warp.sleeps_at);
    text += found == mbarriers.end() ? "an mbarrier that is gone" : found->second.describe();
  } else {
    text += "barrier " + std::to_string(warp.waits_at);
  }
  return text + " {pc" + std::to_string(warp.waiting_pc()) + "}";
}

uint64_t Launch::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void Launch::run() {
  counts.assign(kernel->code.size(), {});
  races = std::make_unique<GlobalRaces>(*global);
  random_state = options.seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d;
  const auto& grid = options.grid;
  const uint64_t n_blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  uint64_t next_block = 0;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> ready;
  while (true) {
    std::erase_if(blocks, [](const auto& block) { return block->n_running == 0; });
    while (blocks.size() < options.concurrent_blocks && next_block < n_blocks) {
      blocks.push_back(std::make_unique<Block>(*this, next_block++));
    }
    if (blocks.empty()) return;
    ready.clear();
    Warp* warp = blocks.front()->warps.front().get();
    try {
      for (const auto& block : blocks) {
        if (!block->bulk_loads.empty() && random() % 4 == 0) block->land(random() % block->bulk_loads.size());
        const size_t before = ready.size();
        const auto collect = [&](bool reluctant) {
          for (const auto& candidate : block->warps) {
            const bool holds_back = candidate->index < 64 && (options.reluctant >> candidate->index & 1) != 0;
            if (holds_back == reluctant && candidate->ready()) ready.push_back(candidate.get());
          }
        };
        do {
          collect(false);
          if (ready.size() == before) collect(true);
        } while (ready.size() == before && block->pass_time());
        if (ready.size() > before) continue;
        std::string waiting;
        for (const auto& blocked : block->warps) {
          if (blocked->finished) continue;
          warp = blocked.get();
          waiting += (waiting.empty() ? "" : ", ") + block->describe_wait(*warp);
        }
        raise(FaultKind::deadlock, "every warp waits: warp " + waiting);
      }
      warp = ready[random() % ready.size()];
      const int quantum = 8 + static_cast<int>(random() % 128);
      warp->yields = false;
      for (int i = 0; i < quantum && warp->ready() && !warp->yields; ++i) warp->step();
      idle_instructions += quantum;
      if (idle_instructions > options.spin_limit) {
        raise(FaultKind::deadlock, "no store, barrier or exit in " + std::to_string(idle_instructions) +
                                       " warp instructions: the running warps spin");
      }
    } catch (Fault& fault) {
      if (fault.pc < 0) {
        fault.block = warp->block->index;
        fault.warp = warp->index;
        fault.lane = warp->lane >= 0 ? warp->lane : std::countr_zero(warp->active ? warp->active : warp->present);
        fault.pc = fault.kind == FaultKind::deadlock ? warp->waiting_pc() : warp->pc;
      }
      throw;
    }
  }
}

}  // namespace emulator
