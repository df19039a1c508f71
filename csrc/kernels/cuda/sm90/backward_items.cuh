// What a block of the backward works on: a tile of keys, and the walk through the tiles of queries that read it.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/range_walk.cuh"
#include "kernels/cuda/primitives/ordering.cuh"
#include "kernels/cuda/sm90/backward_config.h"
#include "kernels/cuda/sm90/backward_params.h"

namespace anchor_attention::sm90 {

struct KeyItem {
  int32_t batch;
  int32_t kv_head;
  int32_t batch_kv_head;
  int32_t begin;  // keys
  int32_t end;
  int32_t first_range;
  int32_t last_range;
  int32_t tile;  // of keys, within its group
  int32_t split;
  int32_t n_splits;
  int32_t accumulator;                // among those of the head
  int32_t first_head;                 // of queries: earlier splits have those before
  int32_t skipped_tiles;              // of queries of that head
  int32_t n_tiles;                    // of queries of all heads
  uint32_t kept[kBackwardKeys / 32];  // a bit per key: in range and not masked

  __device__ bool keeps(int32_t key) const { return (kept[key / 32] >> key % 32 & 1) != 0; }
  __device__ bool keeps_all() const { return (kept[0] & kept[1] & kept[2] & kept[3]) == ~0u; }
  __device__ bool keeps_any() const { return (kept[0] | kept[1] | kept[2] | kept[3]) != 0; }
};

struct QueryTile {
  int32_t head;
  int32_t begin;
  int32_t count;
  int32_t sum;   // among those of the head
  int32_t turn;  // how many additions to the sum come before
};

// Walks the ranges of an item once per head of queries that shares the keys, or its split's share of that walk.
template <int kQueries>
class QueryWalk {
 public:
  __device__ QueryWalk(const BackwardKernelParams& p, const KeyItem& item)
      : p_(p), item_(item), range_(item.first_range), head_(item.first_head), tiles_left_(item.n_tiles) {
#pragma unroll 1
    for (int32_t skip = item.skipped_tiles; tiles_left_ > 0;) {
      enter_range();
      const int32_t tiles = (end_ - position_ + kQueries - 1) / kQueries;
      if (skip < tiles) {
        position_ += skip * kQueries;
        sum_ += skip * sums_per_tile_;
        return;
      }
      skip -= tiles;
    }
  }

  __device__ bool next(QueryTile& tile) {
    if (tiles_left_-- <= 0) return false;
    if (position_ >= end_) {
      if (range_ == item_.last_range) {
        range_ = item_.first_range;
        ++head_;
      }
      enter_range();
    }
    tile = {head_, position_, min(kQueries, end_ - position_), sum_, turn_};
    position_ += kQueries;
    sum_ += sums_per_tile_;
    return true;
  }

  __device__ static int32_t count_tiles(const BackwardKernelParams& p, int32_t first_range, int32_t last_range) {
    int32_t tiles = 0;
    for (int32_t range = first_range; range < last_range; ++range) {
      const int32_t word = first_word(p) + 2 * range;
      tiles += (schedule_word(p.schedule, word + 1) - schedule_word(p.schedule, word) + kQueries - 1) / kQueries;
    }
    return tiles;
  }

 private:
  __device__ static int32_t first_word(const BackwardKernelParams& p) {
    return (p.schedule.n_groups + 1) * kWordsPerGroup;
  }

  __device__ void enter_range() {
    const int32_t bounds = first_word(p_) + 2 * range_;
    const int32_t turns = first_word(p_) + 2 * p_.n_ranges + kWordsPerRangeTurns * range_;
    position_ = schedule_word(p_.schedule, bounds);
    end_ = schedule_word(p_.schedule, bounds + 1);
    const int32_t turn = schedule_word(p_.schedule, turns + 2) + item_.tile * schedule_word(p_.schedule, turns + 3);
    sum_ = schedule_word(p_.schedule, turns) + turn / p_.turns_per_sum;
    sums_per_tile_ = schedule_word(p_.schedule, turns + 1);
    turn_ = turn % p_.turns_per_sum;
    ++range_;
  }

  const BackwardKernelParams& p_;
  const KeyItem& item_;  // in shared memory: loading warps have no registers for what they seldom read
  int32_t range_;
  int32_t head_;
  int32_t tiles_left_;
  int32_t position_ = 0;
  int32_t end_ = 0;
  int32_t sum_ = 0;
  int32_t sums_per_tile_ = 0;
  int32_t turn_ = 0;
};

// The next item, for one warp. Blocks take items in the order in which they start, and wait only for earlier items:
// for blocks that are already running. Heads of keys alternate, so that concurrent blocks seldom add to the same tile
// of queries; the splits of a tile of keys follow each other for the same reason.
template <int kQueries>
__device__ inline KeyItem take_item(const BackwardKernelParams& p) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  int32_t ticket = 0;
  if (lane == 0) ticket = ptx::fetch_add_relaxed(p.ticket, 1);
  ticket = __shfl_sync(kFullWarp, ticket, 0);
  const int32_t item_of_head = ticket / p.batch_kv_heads;
  const int32_t word = find_group(p.schedule, item_of_head) * kWordsPerGroup;
  const int32_t local = item_of_head - schedule_word(p.schedule, word);

  KeyItem item;
  item.batch_kv_head = ticket % p.batch_kv_heads;
  item.batch = item.batch_kv_head / p.kv_heads;
  item.kv_head = item.batch_kv_head % p.kv_heads;
  item.n_splits = schedule_word(p.schedule, word + 4);
  item.split = local % item.n_splits;
  item.tile = local / item.n_splits;
  item.begin = schedule_word(p.schedule, word + 1) + item.tile * kBackwardKeys;
  item.end = min(item.begin + kBackwardKeys, schedule_word(p.schedule, word + 2));
  item.first_range = schedule_word(p.schedule, word + 3);
  item.last_range = schedule_word(p.schedule, word + kWordsPerGroup + 3);
  item.accumulator = schedule_word(p.schedule, word + 5) + item.tile;
  const int32_t tiles_of_head = QueryWalk<kQueries>::count_tiles(p, item.first_range, item.last_range);
  const int64_t n_tiles = static_cast<int64_t>(tiles_of_head) * p.heads_per_kv_head;
  const int64_t skipped = n_tiles * item.split / item.n_splits;
  item.n_tiles = static_cast<int32_t>(n_tiles * (item.split + 1) / item.n_splits - skipped);
  item.first_head = item.kv_head * p.heads_per_kv_head + static_cast<int32_t>(skipped / max(tiles_of_head, 1));
  item.skipped_tiles = static_cast<int32_t>(skipped % max(tiles_of_head, 1));
  const uint8_t* mask = p.key_mask == nullptr ? nullptr : p.key_mask + item.batch * p.key_mask_batch_stride;
#pragma unroll
  for (int i = 0; i < kBackwardKeys / 32; ++i) {
    const int32_t key = item.begin + 32 * i + lane;
    item.kept[i] = __ballot_sync(kFullWarp, key < item.end && (mask == nullptr || mask[key] != 0));
  }
  return item;
}

// Waits until a counter has reached `turn`.
__device__ inline void await_turn(const int32_t* counter, int32_t turn) {
  while (ptx::load_acquire(counter) != turn) __nanosleep(64);
}

}  // namespace anchor_attention::sm90
