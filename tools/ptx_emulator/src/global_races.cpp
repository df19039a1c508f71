#include "global_races.h"

namespace emulator {
namespace {

std::string thread_name(uint64_t block, int warp, int lane) {
  return "thread " + std::to_string(warp * kLanes + lane % kLanes) + " of block " + std::to_string(block);
}

}  // namespace

GlobalRaces::Word& GlobalRaces::word(uint64_t number) {
  const uint64_t page = number / kWordsPerPage;
  if (page != last_page_number_) {
    std::unique_ptr<Page>& slot = pages_[page];
    if (!slot) slot = std::make_unique<Page>();
    last_page_number_ = page;
    last_page_ = slot.get();
  }
  return (*last_page_)[number % kWordsPerPage];
}

GlobalRaces::Access GlobalRaces::access(const Accessor& who, const Clock& clock, uint32_t epoch, uint32_t bytes) {
  return {
      clock.block, epoch, static_cast<uint8_t>(who.warp), static_cast<uint8_t>(who.lane), static_cast<uint8_t>(bytes),
      who.strong};
}

bool GlobalRaces::ordered(const Access& before, const Access& now, const Clock& clock) {
  if (before.strong && now.strong) return true;
  if (before.block == now.block && before.warp == now.warp) {
    return before.epoch < now.epoch || before.lane == now.lane || before.lane == kWholeWarp;
  }
  return clock.covers(before.block, before.warp, before.lane, before.epoch);
}

void GlobalRaces::race(const Access& before, bool was_write, const Access& now, bool is_write, uint64_t address) const {
  raise(FaultKind::race, std::string(is_write ? "write" : "read") + " of " + memory_->describe(address) + " by " +
                             thread_name(now.block, now.warp, now.lane) + " is not ordered after the " +
                             (was_write ? "write" : "read") + " by " +
                             thread_name(before.block, before.warp, before.lane));
}

void GlobalRaces::read(const Accessor& who, const Clock& clock, uint32_t epoch, uint64_t address, uint32_t size) {
  for (uint64_t number = address / 4; number <= (address + size - 1) / 4; ++number) {
    const Access now = access(who, clock, epoch, word_bytes(address, size, number));
    Word& state = word(number);
    if ((state.write.bytes & now.bytes) && !ordered(state.write, now, clock)) {
      race(state.write, true, now, false, address);
    }
    // A strong read is not recorded: what may follow it is ordered by release and acquire.
    if (who.strong) continue;
    Access& old = state.read;
    const bool same_warp = old.block == now.block && old.warp == now.warp && old.epoch == now.epoch;
    if (old.bytes != 0 && same_warp) {
      // Reads of several lanes: a record that no lane of this warp can race with, and every other warp can.
      if (old.lane != now.lane) old.lane = kWholeWarp;
      old.bytes |= now.bytes;
    } else if (old.bytes == 0 || ordered(old, now, clock)) {
      old = now;
    } else {
      more_reads_[number].push_back(now);
    }
  }
}

void GlobalRaces::write(const Accessor& who, const Clock& clock, uint32_t epoch, uint64_t address, uint32_t size,
                        bool unchanged) {
  for (uint64_t number = address / 4; number <= (address + size - 1) / 4; ++number) {
    const Access now = access(who, clock, epoch, word_bytes(address, size, number));
    Word& state = word(number);
    if ((state.write.bytes & now.bytes) && !ordered(state.write, now, clock)) {
      const bool same_warp = state.write.block == now.block && state.write.warp == now.warp;
      if (!same_warp || !unchanged) race(state.write, true, now, true, address);
    }
    if ((state.read.bytes & now.bytes) && !ordered(state.read, now, clock)) {
      race(state.read, false, now, true, address);
    }
    if (const auto more = more_reads_.find(number); more != more_reads_.end()) {
      for (const Access& read : more->second) {
        if ((read.bytes & now.bytes) && !ordered(read, now, clock)) race(read, false, now, true, address);
      }
      more_reads_.erase(more);
    }
    const bool same_thread = state.write.bytes != 0 && state.write.block == now.block && state.write.warp == now.warp &&
                             state.write.lane == now.lane && state.write.epoch == now.epoch &&
                             state.write.strong == now.strong;
    const uint8_t earlier = same_thread ? state.write.bytes : 0;
    state.write = now;
    state.write.bytes |= earlier;
    state.read.bytes &= ~now.bytes;
  }
}

}  // namespace emulator
