// mbarrier objects of one block: phases that complete when all arrivals and all announced bytes are there.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "ordering.h"

namespace emulator {

struct Mbarrier {
  uint32_t address;
  uint32_t expected_arrivals;
  uint32_t pending_arrivals;
  int64_t pending_bytes = 0;  // negative while more bytes have landed than were announced
  uint32_t phase = 0;
  int agent;        // its column in the clocks: how many phases a warp has seen complete
  Clock arrived;    // of the current phase and those before
  Clock completed;  // of the completed phases
  int creator_warp;
  int creator_lane;
  uint32_t creation_epoch;

  std::string describe() const;
};

// The hardware's counter of bytes.
constexpr int64_t kMaxPendingBytes = (1 << 20) - 1;
constexpr uint32_t kMaxArrivals = (1 << 20) - 1;

// By address: an iterator stays valid while others come and go.
using Mbarriers = std::map<uint32_t, Mbarrier>;

}  // namespace emulator
