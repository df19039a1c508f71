// The order that barriers, fences and strong accesses establish between warps, as vector clocks.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace emulator {

// What is ordered before the owner's next access: of every warp, its accesses up to an epoch.
struct Clock {
  uint64_t block = 0;
  std::vector<uint32_t> local;                        // warps of the owner's block
  std::map<uint64_t, std::vector<uint32_t>> foreign;  // warps of the blocks that the owner has heard of

  void join(const Clock& other);
  bool covers(uint64_t of_block, int warp, uint32_t epoch) const;
};

enum class Strength : int64_t { weak, relaxed, acquire, release, acquire_release };

// What strong writes to a location have published.
using Publications = std::unordered_map<uint64_t, Clock>;

// The clocks of one block's warps. A warp's lanes share a clock: a fence or release by one lane publishes what the
// others did before it, so that a missing __syncwarp before such an access is not seen.
class Ordering {
 public:
  Ordering(uint64_t block, int n_warps);

  const Clock& clock(int warp) const { return warps_[warp].clock; }
  uint32_t epoch(int warp) const { return warps_[warp].clock.local[warp]; }
  void join(int warp, const Clock& other) { warps_[warp].clock.join(other); }
  // Ends the warp's epoch: later accesses are not part of what it has published so far.
  void advance(int warp);
  void fence(int warp);
  void read(int warp, Strength strength, const Publications& published, uint64_t location);
  void write(int warp, Strength strength, Publications& published, uint64_t location);

  Publications in_shared_memory;

 private:
  struct WarpState {
    Clock clock;
    Clock read_by_relaxed;  // takes effect at the next fence
    Clock at_fence;         // what relaxed writes publish
    bool has_read = false;
    bool has_fenced = false;
  };
  std::vector<WarpState> warps_;
};

}  // namespace emulator
