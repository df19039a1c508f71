// Branches, barriers, clocks, and instructions that only order or hint.
#include <bit>

#include "lanewise.h"

namespace emulator {
namespace {

void branch(Warp& warp, const Instruction& in) { warp.branch(in.target, warp.exec); }

void exit_threads(Warp& warp, const Instruction&) { warp.exit_lanes(warp.exec); }

void trap(Warp& warp, const Instruction&) {
  warp.lane = std::countr_zero(warp.exec);
  raise(FaultKind::trap, "trap");
}

void fence(Warp& warp, const Instruction&) { warp.block->ordering.fence(warp.index); }

void no_effect(Warp&, const Instruction&) {}

uint32_t uniform(Warp& warp, int32_t row, const char* what) {
  const uint32_t* values = warp.row32(row);
  const uint32_t value = values[std::countr_zero(warp.exec)];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(warp.exec >> lane & 1) || values[lane] == value) continue;
    warp.lane = lane;
    raise(FaultKind::divergence, std::string(what) + " " + std::to_string(values[lane]) +
                                     " differs from another thread's " + std::to_string(value));
  }
  return value;
}

// Operands from `first` on: barrier id, thread count or none.
void arrive(Warp& warp, const Instruction& in, int first, bool waits) {
  const uint32_t id = uniform(warp, in.operand[first], "barrier id");
  if (id >= warp.block->barriers.size())
    raise(FaultKind::divergence, "barrier id " + std::to_string(id) + " exceeds 15");
  const int32_t count_row = in.operand[first + 1];
  const uint32_t count = count_row == kNoRow ? 0 : uniform(warp, count_row, "barrier thread count");
  if (count_row != kNoRow && count == 0) raise(FaultKind::divergence, "barrier thread count is 0");
  warp.block->arrive(warp, static_cast<int>(id), count, waits);
}

void barrier_sync(Warp& warp, const Instruction& in) {
  if (warp.converge(warp.alive())) arrive(warp, in, 0, true);
}

void barrier_arrive(Warp& warp, const Instruction& in) {
  if (warp.converge(warp.alive())) arrive(warp, in, 0, false);
}

// Operands: result, barrier id, thread count or none, predicate.
void barrier_reduce(Warp& warp, const Instruction& in) {
  if (!warp.converge(warp.alive())) return;
  const uint32_t id = uniform(warp, in.operand[1], "barrier id");
  NamedBarrier& barrier = warp.block->barriers[id % warp.block->barriers.size()];
  barrier.population += std::popcount(warp.predicate(in.operand[3]) & warp.exec);
  barrier.participants += std::popcount(warp.exec);
  warp.reduction = static_cast<BarrierReduction>(in.variant);
  warp.reduction_operand = in.operand[0];
  arrive(warp, in, 1, true);
}

// Variant 1: relaxed, publishes nothing.
void cluster_arrive(Warp& warp, const Instruction& in) {
  if (!warp.converge(warp.alive())) return;
  Block& block = *warp.block;
  ClusterBarrier& barrier = block.cluster;
  if (warp.cluster_arrivals > barrier.phase) {
    raise(FaultKind::divergence, "barrier.cluster.arrive again before the phase of the last arrival has ended");
  }
  warp.cluster_arrivals = barrier.phase + 1;
  const Clock& mine = block.ordering.clock(warp.index);
  if (barrier.n_arrived++ == 0) barrier.arriving.block = mine.block;
  if (in.variant == 0) {
    barrier.arriving.join(mine);
    block.ordering.synchronise(warp.index);
  }
  block.release_cluster_if_complete();
}

void cluster_wait(Warp& warp, const Instruction&) {
  if (!warp.converge(warp.alive())) return;
  const ClusterBarrier& barrier = warp.block->cluster;
  if (warp.cluster_arrivals == 0) raise(FaultKind::divergence, "barrier.cluster.wait without an arrival before it");
  if (warp.cluster_arrivals > barrier.phase) {
    warp.next_pc = warp.pc;
    warp.doze(Sleep::cluster, 0);
    return;
  }
  warp.block->ordering.join(warp.index, barrier.completed);
}

// Operands: result, address, rank of a block in the cluster, which is the only one.
template <class T>
void map_to_rank(Warp& warp, const Instruction& in) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t rank = warp.row32(in.operand[2])[lane];
    if (!(warp.exec >> lane & 1) || rank == 0) continue;
    warp.lane = lane;
    raise(FaultKind::out_of_bounds, "mapa to block " + std::to_string(rank) + " of a cluster of one block");
  }
  commit(row<T>(warp, in.operand[0]), row<T>(warp, in.operand[1]), warp.exec);
}

template <class T>
void read_clock(Warp& warp, const Instruction& in) {
  uint64_t issued = 0;
  for (const InstructionCounts& counts : warp.launch->counts) issued += counts.warps;
  alignas(64) Storage<T> result[kLanes];
  for (auto& value : result) value = static_cast<T>(issued);
  commit(row<T>(warp, in.operand[0]), result, warp.exec);
}

}  // namespace

void register_control(Registry& r) {
  r["bra"] = {&branch, 0};
  r["exit"] = {&exit_threads, 0};
  r["ret"] = {&exit_threads, 0};
  r["trap"] = {&trap, 0};
  r["bar.sync"] = {&barrier_sync, 0};
  r["bar.arrive"] = {&barrier_arrive, 0};
  r["barrier.cluster.arrive"] = {&cluster_arrive, 0};
  r["barrier.cluster.arrive.relaxed"] = {&cluster_arrive, 1};
  r["barrier.cluster.wait"] = {&cluster_wait, 0};
  r["mapa.u32"] = {&map_to_rank<uint32_t>, 0};
  r["mapa.u64"] = {&map_to_rank<uint64_t>, 0};
  r["bar.red.popc.u32"] = {&barrier_reduce, static_cast<int64_t>(BarrierReduction::popc)};
  r["bar.red.and.pred"] = {&barrier_reduce, static_cast<int64_t>(BarrierReduction::conjunction)};
  r["bar.red.or.pred"] = {&barrier_reduce, static_cast<int64_t>(BarrierReduction::disjunction)};
  r["clock.u32"] = {&read_clock<uint32_t>, 0};
  r["clock.u64"] = {&read_clock<uint64_t>, 0};
  r["fence"] = {&fence, 0};
  r["no_effect"] = {&no_effect, 0};
}

}  // namespace emulator
