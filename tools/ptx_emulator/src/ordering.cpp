#include "ordering.h"

#include <algorithm>

#include "memory.h"

namespace emulator {
namespace {

void join_epochs(std::vector<uint32_t>& mine, const std::vector<uint32_t>& other) {
  if (mine.size() < other.size()) mine.resize(other.size());
  for (size_t warp = 0; warp < other.size(); ++warp) mine[warp] = std::max(mine[warp], other[warp]);
}

// Lanes of `warp`, kWholeWarp and beyond for several of them.
uint32_t lane_mask(int lane) { return lane < kLanes ? 1u << lane : kFullMask; }

}  // namespace

void Clock::join(const Clock& other) {
  std::vector<uint32_t>& mine = block == other.block ? local : foreign[other.block];
  join_epochs(mine, other.local);
  for (const LaneEpoch& theirs : other.lanes) {
    if (theirs.epoch <= mine[theirs.warp]) continue;
    if (block != other.block) {
      mine[theirs.warp] = theirs.epoch;
      continue;
    }
    const auto known =
        std::find_if(lanes.begin(), lanes.end(), [&](const LaneEpoch& ours) { return ours.warp == theirs.warp; });
    if (known == lanes.end()) {
      lanes.push_back(theirs);
    } else {
      *known = {theirs.warp, std::max(known->epoch, theirs.epoch), known->lanes | theirs.lanes};
    }
  }
  std::erase_if(lanes, [&](const LaneEpoch& ours) { return ours.epoch <= local[ours.warp]; });
  for (const auto& [of_block, epochs] : other.foreign)
    join_epochs(block == of_block ? local : foreign[of_block], epochs);
}

bool Clock::covers_lane(int warp, int lane, uint32_t epoch) const {
  return std::any_of(lanes.begin(), lanes.end(), [&](const LaneEpoch& known) {
    return known.warp == warp && epoch <= known.epoch && (lane_mask(lane) & ~known.lanes) == 0;
  });
}

bool Clock::covers(uint64_t of_block, int warp, int lane, uint32_t epoch) const {
  if (of_block == block) return covers(warp, lane, epoch);
  const auto found = foreign.find(of_block);
  return found != foreign.end() && epoch <= found->second[warp];
}

Ordering::Ordering(uint64_t block, int n_warps) : warps_(n_warps) {
  for (int warp = 0; warp < n_warps; ++warp) {
    WarpState& state = warps_[warp];
    state.clock.block = state.read_by_relaxed.block = block;
    state.clock.local.assign(n_warps, 0);
    state.clock.local[warp] = 1;
    state.at_proxy_fence.block = block;
    state.at_proxy_fence.local.assign(n_warps, 0);
  }
  for (auto& fences : proxy_fences_) fences.resize(n_warps);
}

int Ordering::add_agent() {
  const size_t agent = warps_[0].clock.local.size();
  if (agent > UINT8_MAX) raise(FaultKind::unsupported, "too many mbarriers in one block");
  for (WarpState& state : warps_) state.clock.local.push_back(0);
  return static_cast<int>(agent);
}

void Ordering::proxy_fence(int warp, uint32_t lanes, ProxyFence kind) {
  proxy_fences_[static_cast<int>(kind)][warp].push_back({epoch(warp), lanes});
  advance(warp);
}

bool Ordering::reaches_async_proxy(int reader, int writer, int lane, uint32_t epoch, ProxyFence kind) const {
  const auto& fences = proxy_fences_[static_cast<int>(kind)][writer];
  const uint32_t lanes = lane_mask(lane);
  auto fence = std::lower_bound(fences.begin(), fences.end(), epoch,
                                [](const FenceRecord& record, uint32_t value) { return record.epoch < value; });
  while (fence != fences.end() && (fence->lanes & lanes) != lanes) ++fence;
  return fence != fences.end() && warps_[reader].clock.covers(writer, lane, fence->epoch + 1);
}

void Ordering::advance(int warp) {
  if (++warps_[warp].clock.local[warp] > kMaxEpoch) {
    raise(FaultKind::unsupported, "more than " + std::to_string(kMaxEpoch) + " synchronisations of one warp");
  }
}

void Ordering::synchronise(int warp) {
  warps_[warp].synchronised = epoch(warp);
  advance(warp);
}

Clock Ordering::published_by(int warp, uint32_t lanes, uint32_t alive) const {
  Clock result = warps_[warp].clock;
  if (lanes == alive) return result;
  result.local[warp] = warps_[warp].synchronised;
  result.lanes.push_back({warp, epoch(warp), lanes});
  return result;
}

void Ordering::fence(int warp) {
  WarpState& state = warps_[warp];
  if (state.has_read) state.clock.join(state.read_by_relaxed);
  state.at_fence = state.clock;
  state.has_fenced = true;
  advance(warp);
}

void Ordering::read(int warp, Strength strength, const Publications& published, uint64_t location) {
  if (strength == Strength::weak) return;
  const auto found = published.find(location);
  if (found == published.end()) return;
  WarpState& state = warps_[warp];
  if (strength == Strength::acquire || strength == Strength::acquire_release) {
    state.clock.join(found->second);
  } else {
    state.read_by_relaxed.join(found->second);
    state.has_read = true;
  }
}

void Ordering::write(int warp, Strength strength, Publications& published, uint64_t location, bool is_store) {
  if (is_store) published.erase(location);
  WarpState& state = warps_[warp];
  const bool releases = strength == Strength::release || strength == Strength::acquire_release;
  const bool behind_fence = strength != Strength::weak && state.has_fenced;
  if (!releases && !behind_fence) return;
  const Clock& source = releases ? state.clock : state.at_fence;
  const auto [found, is_new] = published.try_emplace(location, source);
  if (!is_new) found->second.join(source);
  if (releases) advance(warp);
}

}  // namespace emulator
