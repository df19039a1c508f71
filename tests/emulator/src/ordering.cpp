#include "ordering.h"

#include <algorithm>

#include "memory.h"

namespace emulator {
namespace {

void join_epochs(std::vector<uint32_t>& mine, const std::vector<uint32_t>& other) {
  if (mine.size() < other.size()) mine.resize(other.size());
  for (size_t warp = 0; warp < other.size(); ++warp) mine[warp] = std::max(mine[warp], other[warp]);
}

}  // namespace

void Clock::join(const Clock& other) {
  join_epochs(block == other.block ? local : foreign[other.block], other.local);
  for (const auto& [of_block, epochs] : other.foreign)
    join_epochs(block == of_block ? local : foreign[of_block], epochs);
}

bool Clock::covers(uint64_t of_block, int warp, uint32_t epoch) const {
  if (of_block == block) return epoch <= local[warp];
  const auto found = foreign.find(of_block);
  return found != foreign.end() && epoch <= found->second[warp];
}

Ordering::Ordering(uint64_t block, int n_warps) : warps_(n_warps) {
  for (int warp = 0; warp < n_warps; ++warp) {
    WarpState& state = warps_[warp];
    state.clock.block = state.read_by_relaxed.block = block;
    state.clock.local.assign(n_warps, 0);
    state.clock.local[warp] = 1;
  }
}

void Ordering::advance(int warp) {
  if (++warps_[warp].clock.local[warp] > kMaxEpoch) {
    raise(FaultKind::unsupported, "more than " + std::to_string(kMaxEpoch) + " synchronisations of one warp");
  }
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

void Ordering::write(int warp, Strength strength, Publications& published, uint64_t location) {
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
