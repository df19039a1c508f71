// mbarrier instructions, fences of the asynchronous proxy.
#include "mbarrier.h"

#include <bit>
#include <cstdlib>

#include "access.h"
#include "lanewise.h"

namespace emulator {

std::string Mbarrier::describe() const {
  return "the mbarrier at offset " + std::to_string(address - kSharedBase) + " in phase " + std::to_string(phase) +
         ", with " + std::to_string(pending_arrivals) + " of " + std::to_string(expected_arrivals) + " arrivals and " +
         std::to_string(pending_bytes) + " bytes to come";
}

void Block::complete_phase_if_done(Mbarrier& barrier) {
  if (barrier.pending_arrivals != 0 || barrier.pending_bytes != 0) return;
  ++barrier.phase;
  barrier.pending_arrivals = barrier.expected_arrivals;
  barrier.completed.join(barrier.arrived);
  std::vector<uint32_t>& seen = barrier.completed.local;
  if (seen.size() <= static_cast<size_t>(barrier.agent)) seen.resize(barrier.agent + 1);
  seen[barrier.agent] = barrier.phase;
  wake(Sleep::mbarrier, barrier.address);
  launch->progress();
}

namespace {

struct Variant {
  Space space;
  bool relaxed;  // neither publishes nor learns
  bool expects;  // announces bytes

  int64_t pack() const {
    return static_cast<int64_t>(space) | static_cast<int64_t>(relaxed) << 8 | static_cast<int64_t>(expects) << 9;
  }
  static Variant unpack(int64_t v) { return {static_cast<Space>(v & 0xff), (v >> 8 & 1) != 0, (v >> 9 & 1) != 0}; }
};

uint32_t mbarrier_address(Warp& warp, const Instruction& in, int first, int lane) {
  uint64_t address = address_of(warp, &in.operand[first], lane);
  if (resolve(Variant::unpack(in.variant).space, address) != Space::shared) {
    raise(FaultKind::out_of_bounds, "an mbarrier must be in shared memory, not at " + hex(address));
  }
  if (address % 8 != 0) raise(FaultKind::misaligned, "mbarrier at shared address " + hex(address));
  return static_cast<uint32_t>(address);
}

Mbarrier& find(Warp& warp, uint32_t address) {
  const auto found = warp.block->mbarriers.find(address);
  if (found == warp.block->mbarriers.end()) {
    raise(FaultKind::mbarrier,
          "no mbarrier was initialised at shared offset " + std::to_string(int64_t{address} - kSharedBase));
  }
  Mbarrier& barrier = found->second;
  const Clock& seen = warp.block->ordering.clock(warp.index);
  const bool ordered = barrier.creator_warp == warp.index
                           ? barrier.creator_lane == warp.lane || barrier.creation_epoch < seen.local[warp.index]
                           : seen.covers(barrier.creator_warp, barrier.creator_lane, barrier.creation_epoch);
  if (!ordered) {
    raise(FaultKind::race, barrier.describe() + " is used by thread " +
                               std::to_string(warp.index * kLanes + warp.lane) +
                               " without a barrier after its initialisation");
  }
  return barrier;
}

void announce(Mbarrier& barrier, int64_t bytes) {
  barrier.pending_bytes += bytes;
  if (std::abs(barrier.pending_bytes) <= kMaxPendingBytes) return;
  raise(FaultKind::mbarrier, "the byte count of " + barrier.describe() + " leaves its range");
}

// Operands: address, number of arrivals.
void init(Warp& warp, const Instruction& in) {
  for_each_lane(warp, warp.exec, [&](int lane) {
    Block& block = *warp.block;
    const uint32_t address = mbarrier_address(warp, in, 0, lane);
    const uint32_t count = warp.row32(in.operand[kAddressOperands])[lane];
    if (count == 0 || count > kMaxArrivals) {
      raise(FaultKind::mbarrier, "mbarrier.init for " + std::to_string(count) + " arrivals");
    }
    if (block.mbarriers.contains(address)) {
      raise(FaultKind::mbarrier,
            "mbarrier.init without mbarrier.inval of " + block.mbarriers.find(address)->second.describe());
    }
    block.shared.place_mbarrier({warp.index, lane, false}, address);
    Mbarrier barrier{};
    barrier.address = address;
    barrier.expected_arrivals = barrier.pending_arrivals = count;
    barrier.agent = block.ordering.add_agent();
    barrier.arrived.block = barrier.completed.block = block.ordering.clock(warp.index).block;
    barrier.creator_warp = warp.index;
    barrier.creator_lane = lane;
    barrier.creation_epoch = block.ordering.epoch(warp.index);
    block.mbarriers.emplace(address, barrier);
  });
  warp.launch->progress();
}

void invalidate(Warp& warp, const Instruction& in) {
  for_each_lane(warp, warp.exec, [&](int lane) {
    const uint32_t address = mbarrier_address(warp, in, 0, lane);
    const Mbarrier& barrier = find(warp, address);
    for (const BulkLoad& load : warp.block->bulk_loads) {
      if (load.mbarrier == address) {
        raise(FaultKind::mbarrier, "mbarrier.inval while a bulk copy is on its way to " + barrier.describe());
      }
    }
    warp.block->shared.remove_mbarrier({warp.index, lane, false}, address);
    warp.block->mbarriers.erase(address);
  });
}

// Operands: state or none, address, count or bytes or none. The state is the number of the phase.
void arrive(Warp& warp, const Instruction& in) {
  const Variant variant = Variant::unpack(in.variant);
  Ordering& ordering = warp.block->ordering;
  const int32_t count_row = in.operand[1 + kAddressOperands];
  const Mbarrier* joined = nullptr;
  for_each_lane(warp, warp.exec, [&](int lane) {
    Mbarrier& barrier = find(warp, mbarrier_address(warp, in, 1, lane));
    const uint32_t given = count_row == kNoRow ? 1 : warp.row32(count_row)[lane];
    const uint32_t count = variant.expects ? 1 : given;
    if (variant.expects) announce(barrier, given);
    if (count == 0 || count > barrier.pending_arrivals) {
      raise(FaultKind::mbarrier, std::to_string(count) + " arrivals are not what " + barrier.describe() + " waits for");
    }
    if (!variant.relaxed && joined != &barrier) {
      barrier.arrived.join(ordering.published_by(warp.index, warp.exec, warp.alive()));
      joined = &barrier;
    }
    if (in.operand[0] != kNoRow) warp.row64(in.operand[0])[lane] = barrier.phase;
    barrier.pending_arrivals -= count;
    warp.block->complete_phase_if_done(barrier);
  });
  ordering.advance(warp.index);
  warp.launch->progress();
}

// Operands: address, bytes. Variant `expects` announces them, the other completes them.
void change_bytes(Warp& warp, const Instruction& in) {
  const Variant variant = Variant::unpack(in.variant);
  for_each_lane(warp, warp.exec, [&](int lane) {
    Mbarrier& barrier = find(warp, mbarrier_address(warp, in, 0, lane));
    const int64_t bytes = warp.row32(in.operand[kAddressOperands])[lane];
    announce(barrier, variant.expects ? bytes : -bytes);
    warp.block->complete_phase_if_done(barrier);
  });
  warp.launch->progress();
}

// Operands: predicate, address, phase parity or state, time limit or none.
template <bool Parity, bool Suspends>
void wait(Warp& warp, const Instruction& in) {
  const Variant variant = Variant::unpack(in.variant);
  Mask done = 0;
  const Mbarrier* missing = nullptr;
  for_each_lane(warp, warp.exec, [&](int lane) {
    Mbarrier& barrier = find(warp, mbarrier_address(warp, in, 1, lane));
    const int32_t row = in.operand[1 + kAddressOperands];
    bool completed;
    if constexpr (Parity) {
      const uint32_t parity = warp.row32(row)[lane];
      if (parity > 1) raise(FaultKind::mbarrier, "phase parity " + std::to_string(parity) + " is neither 0 nor 1");
      completed = (barrier.phase & 1) != parity;
    } else {
      completed = warp.row64(row)[lane] != barrier.phase;
    }
    if (completed) {
      done |= 1u << lane;
      if (!variant.relaxed) warp.block->ordering.join(warp.index, barrier.completed);
    } else {
      missing = &barrier;
    }
  });
  warp.set_predicate(in.operand[0], done);
  if (missing == nullptr) return;
  if (Suspends && done == 0) {
    warp.doze(Sleep::mbarrier, missing->address);
  } else {
    warp.yields = true;
  }
}

template <bool OfShared, bool OfGlobal>
void proxy_fence(Warp& warp, const Instruction&) {
  Ordering& ordering = warp.block->ordering;
  if (OfGlobal) ordering.global_proxy_fence(warp.index);
  if (OfShared) ordering.proxy_fence(warp.index, warp.exec, ProxyFence::async);
}

void initialisation_fence(Warp& warp, const Instruction&) {
  warp.block->ordering.proxy_fence(warp.index, warp.exec, ProxyFence::mbarrier_init);
}

}  // namespace

void register_mbarrier(Registry& r) {
  const std::pair<std::string, Space> spaces[] = {{"", Space::generic}, {".shared", Space::shared}};
  const std::pair<std::string, bool> orders[] = {{"", false}, {".relaxed", true}};
  for (const auto& [space_name, space] : spaces) {
    r["mbarrier.init" + space_name + ".b64"] = {&init, Variant{space, false, false}.pack()};
    r["mbarrier.inval" + space_name + ".b64"] = {&invalidate, Variant{space, false, false}.pack()};
    for (const auto& [order_name, relaxed] : orders) {
      const std::string end = order_name + space_name + ".b64";
      const int64_t plain = Variant{space, relaxed, false}.pack();
      const int64_t expecting = Variant{space, relaxed, true}.pack();
      r["mbarrier.arrive" + end] = {&arrive, plain};
      r["mbarrier.arrive.expect_tx" + end] = {&arrive, expecting};
      r["mbarrier.expect_tx" + end] = {&change_bytes, expecting};
      r["mbarrier.complete_tx" + end] = {&change_bytes, plain};
      r["mbarrier.test_wait" + end] = {&wait<false, false>, plain};
      r["mbarrier.test_wait.parity" + end] = {&wait<true, false>, plain};
      r["mbarrier.try_wait" + end] = {&wait<false, true>, plain};
      r["mbarrier.try_wait.parity" + end] = {&wait<true, true>, plain};
    }
  }
  r["fence.proxy.async"] = {&proxy_fence<true, true>, 0};
  r["fence.proxy.async.shared"] = {&proxy_fence<true, false>, 0};
  r["fence.proxy.async.global"] = {&proxy_fence<false, true>, 0};
  r["fence.mbarrier_init"] = {&initialisation_fence, 0};
}

}  // namespace emulator
