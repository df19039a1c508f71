// Keys and values on their way to shared memory: the ring of buffers, the warps that fill it, and what they tell the
// warpgroups that consume it.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/range_walk.cuh"
#include "kernels/cuda/primitives/async_proxy.cuh"
#include "kernels/cuda/primitives/mbarrier.cuh"
#include "kernels/cuda/primitives/shared_memory.cuh"
#include "kernels/cuda/primitives/tma.cuh"
#include "kernels/cuda/primitives/warpgroup.cuh"
#include "kernels/cuda/sm90/config.h"
#include "kernels/cuda/sm90/kernel_params.h"

namespace anchor_attention::sm90 {

// Accompanies a tile of keys.
struct TileNote {
  uint32_t valid[4];  // bit i: key i takes part; only read where a tile is partial
  uint32_t flags;
};
constexpr uint32_t kPartial = 1;  // some keys take no part
constexpr uint32_t kNoKeys = 2;   // stands for a range walk without a tile: nothing was loaded
constexpr uint32_t kLastOfItem = 4;

template <int kStages>
struct StreamControl {
  uint64_t k_full[kStages];
  uint64_t v_full[kStages];
  uint64_t v_landed[kStages];  // of values whose rows without a key still have to be zeroed
  uint64_t k_empty[kStages];
  uint64_t v_empty[kStages];
  TileNote notes[kStages];
};

// Position in the ring; `parity` is that of the phase of the buffer's barriers.
template <int kStages>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Sizes as constants: device code can't call what computes them.
template <int kHeadDim>
struct ForwardLayout {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim);
  static constexpr int kConsumers = kTile.consumers;
  static constexpr int kQueries = kTile.queries();
  static constexpr int kKeys = kTile.keys;
  static constexpr int kStages = kTile.stages;
  static constexpr int kSlabs = kTile.slabs();
  static constexpr int kSlabChannels = kTile.slab_channels;
  static constexpr int kSpan = 2 * kSlabChannels;
  static constexpr int kQueryBytes = kTile.query_bytes();
  static constexpr int kTileBytes = kTile.tile_bytes();
  static constexpr bool kOutputBuffer = has_output_buffer(kTile);
};

// Addresses in shared memory.
template <int kHeadDim>
struct ForwardShared {
  using Layout = ForwardLayout<kHeadDim>;
  using Control = StreamControl<Layout::kStages>;
  static_assert(sizeof(Control) <= kForwardControlBytes);

  uint32_t q;    // of the first consumer warpgroup
  uint32_t out;  // likewise; that of the queries where there is no room for both
  uint32_t k;
  uint32_t v;
  Control* control;

  __device__ explicit ForwardShared(uint8_t* dynamic) {
    const uint32_t base = ptx::shared_address(dynamic);
    const uint32_t aligned = (base + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    q = aligned;
    out = Layout::kOutputBuffer ? q + Layout::kConsumers * Layout::kQueryBytes : q;
    k = out + Layout::kConsumers * Layout::kQueryBytes;
    v = k + Layout::kStages * Layout::kTileBytes;
    control = reinterpret_cast<Control*>(dynamic + (v - base) + Layout::kStages * Layout::kTileBytes);
  }

  __device__ uint32_t k_tile(uint32_t stage) const { return k + stage * Layout::kTileBytes; }
  __device__ uint32_t v_tile(uint32_t stage) const { return v + stage * Layout::kTileBytes; }
};

template <int kStages>
__device__ inline void init_barriers(StreamControl<kStages>& control, uint32_t consumer_warps) {
  for (int stage = 0; stage < kStages; ++stage) {
    ptx::mbarrier_init(ptx::shared_address(&control.k_full[stage]), 1);
    ptx::mbarrier_init(ptx::shared_address(&control.v_full[stage]), 1);
    ptx::mbarrier_init(ptx::shared_address(&control.v_landed[stage]), 1);
    ptx::mbarrier_init(ptx::shared_address(&control.k_empty[stage]), consumer_warps);
    ptx::mbarrier_init(ptx::shared_address(&control.v_empty[stage]), consumer_warps);
  }
  ptx::fence_mbarrier_init();
}

// A tile of keys as a lane of a warp sees it: bit w of `mine` says whether key 32w + lane takes part.
template <int kKeys>
struct KeyTile {
  int32_t begin;
  uint32_t mine;

  __device__ bool partial() const { return !__all_sync(kFullWarp, mine == 0xf); }
  __device__ uint32_t word(int w) const { return __ballot_sync(kFullWarp, (mine >> w & 1) != 0); }
};

// The tiles of an item that have a key.
template <int kKeys>
class KeyWalk {
 public:
  static_assert(kKeys == 128, "the validity of a tile is four words");

  __device__ KeyWalk(const ForwardKernelParams& p, const cuda::WorkItem& work)
      : walk_(p.schedule, work.first_range, work.last_range, nullptr), mask_(batch_key_mask(p, work)) {
    walk_.take_share(work);
  }

  __device__ bool next(KeyTile<kKeys>& tile) {
    for (int32_t count; walk_.next_span(tile.begin, count);) {
      tile.mine = 0;
#pragma unroll
      for (int word = 0; word < kKeys / 32; ++word) {
        const int32_t key = 32 * word + static_cast<int32_t>(threadIdx.x % 32);
        if (key < count && (mask_ == nullptr || mask_[tile.begin + key] != 0)) tile.mine |= 1u << word;
      }
      if (__any_sync(kFullWarp, tile.mine != 0)) return true;
    }
    return false;
  }

 private:
  RangeWalk<kKeys> walk_;
  const uint8_t* mask_;
};

// Starts copying a tile of one head; its bytes complete the phase of `barrier`. One lane executes it.
template <int kHeadDim>
__device__ inline void load_tile(const TensorMap& map, const AxisSteps& steps, int32_t batch, int32_t head,
                                 int32_t token, uint32_t buffer, uint32_t barrier) {
  using Layout = ForwardLayout<kHeadDim>;
  ptx::mbarrier_arrive_expect(barrier, Layout::kTileBytes);
#pragma unroll
  for (int slab = 0; slab < Layout::kSlabs; ++slab) {
    ptx::tma_load(buffer + slab * (Layout::kTileBytes / Layout::kSlabs), map,
                  {slab * Layout::kSlabChannels, token, head * steps.head, batch * steps.batch}, barrier);
  }
}

// Three warps walk the same tiles. This one loads the keys and writes the notes.
template <int kHeadDim>
__device__ inline void load_keys(const ForwardKernelParams& p, const ForwardShared<kHeadDim>& shared) {
  using Layout = ForwardLayout<kHeadDim>;
  auto& control = *shared.control;
  RingPosition<Layout::kStages> ring;
  const bool leader = threadIdx.x % 32 == 0;
  for (uint32_t index = blockIdx.x; index < p.n_work; index += gridDim.x) {
    const cuda::WorkItem work = find_work_item(p.schedule, index, p.heads, Layout::kQueries);
    const int32_t kv_head = work.head / p.heads_per_kv_head;
    KeyWalk<Layout::kKeys> walk(p, work);
    KeyTile<Layout::kKeys> tile{};
    const bool exists = walk.next(tile);
    bool more = exists;
    do {
      const KeyTile<Layout::kKeys> current = tile;
      if (exists) more = walk.next(tile);
      ptx::mbarrier_wait(ptx::shared_address(&control.k_empty[ring.stage]), ring.parity ^ 1);
      TileNote& note = control.notes[ring.stage];
      const bool partial = current.partial();
      if (partial) {
#pragma unroll
        for (int w = 0; w < Layout::kKeys / 32; ++w) {
          const uint32_t word = current.word(w);
          if (leader) note.valid[w] = word;
        }
      }
      if (leader) {
        note.flags = (partial ? kPartial : 0) | (exists ? 0 : kNoKeys) | (more ? 0 : kLastOfItem);
        const uint32_t full = ptx::shared_address(&control.k_full[ring.stage]);
        if (exists) {
          load_tile<kHeadDim>(p.k, p.k_steps, work.batch, kv_head, current.begin, shared.k_tile(ring.stage), full);
        } else {
          ptx::mbarrier_arrive(full);
        }
      }
      __syncwarp();
      ring.advance();
    } while (more);
  }
}

// Loads the values. Those of partial tiles go to `v_landed`, from where zero_values passes them on.
template <int kHeadDim>
__device__ inline void load_values(const ForwardKernelParams& p, const ForwardShared<kHeadDim>& shared) {
  using Layout = ForwardLayout<kHeadDim>;
  auto& control = *shared.control;
  RingPosition<Layout::kStages> ring;
  const bool leader = threadIdx.x % 32 == 0;
  for (uint32_t index = blockIdx.x; index < p.n_work; index += gridDim.x) {
    const cuda::WorkItem work = find_work_item(p.schedule, index, p.heads, Layout::kQueries);
    const int32_t kv_head = work.head / p.heads_per_kv_head;
    KeyWalk<Layout::kKeys> walk(p, work);
    KeyTile<Layout::kKeys> tile{};
    bool exists = walk.next(tile);
    do {
      ptx::mbarrier_wait(ptx::shared_address(&control.v_empty[ring.stage]), ring.parity ^ 1);
      const uint32_t full = ptx::shared_address(&control.v_full[ring.stage]);
      const bool partial = tile.partial();
      if (leader && exists) {
        const uint32_t landed = ptx::shared_address(&control.v_landed[ring.stage]);
        load_tile<kHeadDim>(p.v, p.v_steps, work.batch, kv_head, tile.begin, shared.v_tile(ring.stage),
                            partial ? landed : full);
      } else if (leader) {
        ptx::mbarrier_arrive(full);
      }
      __syncwarp();
      ring.advance();
    } while (exists && (exists = walk.next(tile)));
  }
}

// Zeroes the values of keys that take no part: their probabilities are zero, but zero times NaN is not. Only partial
// tiles pass through here, and the loads do not wait for it.
template <int kHeadDim>
__device__ inline void zero_values(const ForwardKernelParams& p, const ForwardShared<kHeadDim>& shared) {
  using Layout = ForwardLayout<kHeadDim>;
  constexpr int kSpanChunks = Layout::kSlabChannels / 8;
  constexpr int kRowsAtOnce = 32 / kSpanChunks;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t zeros[4] = {};
  auto& control = *shared.control;
  RingPosition<Layout::kStages> ring;
  uint32_t landed_parity = 0;  // one bit per stage
  for (uint32_t index = blockIdx.x; index < p.n_work; index += gridDim.x) {
    const cuda::WorkItem work = find_work_item(p.schedule, index, p.heads, Layout::kQueries);
    KeyWalk<Layout::kKeys> walk(p, work);
    KeyTile<Layout::kKeys> tile{};
    bool exists = walk.next(tile);
    if (!exists) ring.advance();
    for (; exists; exists = walk.next(tile), ring.advance()) {
      if (!tile.partial()) continue;
      ptx::mbarrier_wait(ptx::shared_address(&control.v_landed[ring.stage]), landed_parity >> ring.stage & 1);
      landed_parity ^= 1u << ring.stage;
      // Whole rows: however their chunks are permuted, all of them become zero.
      const uint32_t first = shared.v_tile(ring.stage) + lane * 16;
#pragma unroll 1
      for (uint32_t block = 0; block < Layout::kSlabs * Layout::kKeys / 32; ++block) {
        const uint32_t valid = tile.word(block % (Layout::kKeys / 32)) >> lane / kSpanChunks;
#pragma unroll
        for (int row = 0; row < 32; row += kRowsAtOnce) {
          if ((valid >> row & 1) == 0) ptx::store_shared(first + (32 * block + row) * kSpanChunks * 16, zeros);
        }
      }
      ptx::fence_async_proxy();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&control.v_full[ring.stage]));
    }
  }
}

}  // namespace anchor_attention::sm90
