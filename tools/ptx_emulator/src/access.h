// Addresses of a memory instruction: which state space, how many wavefronts and sectors.
#pragma once

#include <array>

#include "machine.h"

namespace emulator {

enum class Space : int64_t { generic, global, shared, local, constant, parameter };

// What one request touches, for the counters.
class Request {
 public:
  void shared(uint32_t address, uint32_t size, int lane);
  void global(uint64_t address, uint32_t size);
  void count_into(InstructionCounts& counts) const;

 private:
  uint32_t count_wavefronts(int first_lane, int n_lanes) const;

  uint32_t shared_size_ = 0;
  Mask shared_lanes_ = 0;
  std::array<uint32_t, kLanes> shared_address_;
  uint32_t n_sectors_ = 0;
  std::array<uint64_t, 2 * kLanes> sectors_;
};

// Base row, width flag and offset, as the lowering lays them out.
inline uint64_t address_of(Warp& warp, const int32_t* operand, int lane) {
  const uint64_t base = operand[1] ? warp.row64(operand[0])[lane] : warp.row32(operand[0])[lane];
  return base + static_cast<int64_t>(operand[2]);
}

constexpr int kAddressOperands = 3;

// A generic address names its space in its top byte.
Space resolve(Space space, uint64_t& address);

// A checked read of global memory by the lane that is being served.
const uint8_t* read_global(Warp& warp, uint64_t address, uint32_t size, bool strong);

template <class F>
inline void for_each_lane(Warp& warp, Mask lanes, F f) {
  while (lanes) {
    const int lane = __builtin_ctz(lanes);
    lanes &= lanes - 1;
    warp.lane = lane;
    f(lane);
  }
}

}  // namespace emulator
