// The order that barriers, fences and strong accesses establish between warps, as vector clocks.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace emulator {

// Some lanes of a warp have gone on alone: their accesses up to an epoch are known of, the others' are not.
struct LaneEpoch {
  int warp;
  uint32_t epoch;
  uint32_t lanes;
};

// What is ordered before the owner's next access: of every warp, its accesses up to an epoch.
struct Clock {
  uint64_t block = 0;
  std::vector<uint32_t> local;                        // warps of the owner's block, then its mbarriers
  std::vector<LaneEpoch> lanes;                       // beyond `local`
  std::map<uint64_t, std::vector<uint32_t>> foreign;  // warps of the blocks that the owner has heard of

  void join(const Clock& other);
  bool covers(int warp, int lane, uint32_t epoch) const {
    return epoch <= local[warp] || covers_lane(warp, lane, epoch);
  }
  bool covers(uint64_t of_block, int warp, int lane, uint32_t epoch) const;

 private:
  bool covers_lane(int warp, int lane, uint32_t epoch) const;
};

// What makes generic accesses visible to the asynchronous proxy (TMA, wgmma).
enum class ProxyFence : int { async, mbarrier_init };

enum class Strength : int64_t { weak, relaxed, acquire, release, acquire_release };

// What strong writes to a location have published.
using Publications = std::unordered_map<uint64_t, Clock>;

// The clocks of one block's warps. A warp's lanes share a clock: what one of them learns, all know, and a fence or a
// release to memory by one lane publishes what the others did before it. Arrivals at an mbarrier tell lanes apart.
class Ordering {
 public:
  Ordering(uint64_t block, int n_warps);

  const Clock& clock(int warp) const { return warps_[warp].clock; }
  // What a warp's asynchronous accesses to global memory are ordered after.
  const Clock& async_clock(int warp) const { return warps_[warp].at_proxy_fence; }
  uint32_t epoch(int warp) const { return warps_[warp].clock.local[warp]; }
  void join(int warp, const Clock& other) { warps_[warp].clock.join(other); }
  // Ends the warp's epoch: later accesses are not part of what it has published so far.
  void advance(int warp);
  // The same, and every lane has waited for the others.
  void synchronise(int warp);
  // What a release by some of the warp's lanes publishes.
  Clock published_by(int warp, uint32_t lanes, uint32_t alive) const;
  void fence(int warp);
  // A further column of the clocks: the phases of an mbarrier, as an author of what bulk copies write.
  int add_agent();
  void proxy_fence(int warp, uint32_t lanes, ProxyFence kind);
  void global_proxy_fence(int warp) { warps_[warp].at_proxy_fence = warps_[warp].clock; }
  // Whether the writer passed a proxy fence between its access and what orders that before the reader.
  bool reaches_async_proxy(int reader, int writer, int lane, uint32_t epoch, ProxyFence kind) const;
  void read(int warp, Strength strength, const Publications& published, uint64_t location);
  // A store ends what earlier stores to the location have published, a read-modify-write continues it.
  void write(int warp, Strength strength, Publications& published, uint64_t location, bool is_store);

  Publications in_shared_memory;

 private:
  struct WarpState {
    Clock clock;
    uint32_t synchronised = 0;  // the last epoch that all lanes know to be over
    Clock read_by_relaxed;      // takes effect at the next fence
    Clock at_fence;             // what relaxed writes publish
    Clock at_proxy_fence;       // of those that reach global memory
    bool has_read = false;
    bool has_fenced = false;
  };
  struct FenceRecord {
    uint32_t epoch;
    uint32_t lanes;
  };
  std::vector<WarpState> warps_;
  std::array<std::vector<std::vector<FenceRecord>>, 2> proxy_fences_;  // by kind and warp, ascending
};

}  // namespace emulator
