// From a block's index to its work, and from there to the tiles of the streamed axis.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/config.h"
#include "kernels/cuda/common/kernel_params.h"

namespace anchor_attention::cuda {

__device__ inline int32_t schedule_word(const ScheduleView& schedule, int32_t i) {
  return schedule.device_words != nullptr ? schedule.device_words[i] : schedule.inline_words[i];
}

struct WorkItem {
  int32_t batch;
  int32_t head;
  int32_t group;  // of the schedule
  int32_t begin;  // rows of the stationary axis
  int32_t end;
  int32_t first_range;
  int32_t last_range;
  int32_t split;
  int32_t n_splits;
  int32_t accumulator;  // of the first split, among those of the head
  int32_t n_tiles;      // of the group: the distance between the accumulators of splits that have their own
};

// The group that an item belongs to. Every warp searches for itself, 32 groups a step.
__device__ inline int32_t find_group(const ScheduleView& schedule, int32_t item) {
  int32_t group = 0;
  for (int32_t n = schedule.n_groups; n > 1;) {
    const int32_t step = (n + 31) / 32;
    const int32_t probe = static_cast<int32_t>(threadIdx.x % 32) * step;
    const bool starts_before = probe < n && schedule_word(schedule, (group + probe) * kWordsPerGroup) <= item;
    const int32_t passed = (__popc(__ballot_sync(kFullWarp, starts_before)) - 1) * step;
    group += passed;
    n = min(step, n - passed);
  }
  return group;
}

// Items of one head follow each other, so that blocks that run together read the same keys.
__device__ inline WorkItem find_work_item(const ScheduleView& schedule, uint32_t index, int32_t heads, int32_t rows) {
  const int32_t item = static_cast<int32_t>(index % schedule.n_items);
  const int32_t batch_head = static_cast<int32_t>(index / schedule.n_items);
  const int32_t group = find_group(schedule, item);
  const int32_t word = group * kWordsPerGroup;
  const int32_t local = item - schedule_word(schedule, word);
  const int32_t end = schedule_word(schedule, word + 2);

  WorkItem work;
  work.batch = batch_head / heads;
  work.head = batch_head % heads;
  work.group = group;
  const int32_t group_begin = schedule_word(schedule, word + 1);
  const int32_t n_tiles = (end - group_begin + rows - 1) / rows;
  const int32_t tile = local % n_tiles;
  work.begin = group_begin + tile * rows;
  work.end = min(work.begin + rows, end);
  work.first_range = schedule_word(schedule, word + 3);
  work.last_range = schedule_word(schedule, word + kWordsPerGroup + 3);
  work.split = local / n_tiles;
  work.n_splits = schedule_word(schedule, word + 4);
  work.accumulator = schedule_word(schedule, word + 5) + tile;
  work.n_tiles = n_tiles;
  return work;
}

// The mask of a batch element's keys, or null.
template <class Params>
__device__ inline const uint8_t* batch_key_mask(const Params& p, const WorkItem& work) {
  return p.key_mask == nullptr ? nullptr : p.key_mask + work.batch * p.key_mask_batch_stride;
}

// Where a split of its tile has its own results: the first row of a tile in PartialResults.
__device__ inline int64_t partial_row(const ScheduleView& schedule, const WorkItem& work, int32_t heads, int32_t rows,
                                      int32_t split) {
  const int64_t batch_head = static_cast<int64_t>(work.batch) * heads + work.head;
  const int64_t of_head = work.accumulator + static_cast<int64_t>(split) * work.n_tiles;
  return (batch_head * schedule.n_accumulators + of_head) * rows;
}

// Up to 64 neighbouring tokens of the streamed axis; bit i of `valid` says whether token begin + i takes part.
struct StreamedTile {
  int32_t begin;
  uint64_t valid;
};

__device__ constexpr uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Walks ranges tile by tile, passing over tiles whose tokens are all masked.
template <int kColumns>
class RangeWalk {
 public:
  __device__ RangeWalk(const ScheduleView& schedule, int32_t first_range, int32_t last_range, const uint8_t* mask)
      : schedule_(schedule), mask_(mask), range_(first_range), last_range_(last_range) {}

  __device__ int32_t count_tiles() const {
    uint32_t tiles = 0;
    // Unrolled, this loop and that of restrict_to would take registers that loading warps do not have.
#pragma unroll 1
    for (int32_t range = range_; range < last_range_; ++range) {
      tiles += static_cast<uint32_t>(range_end(range) - range_begin(range) + kColumns - 1) / kColumns;
    }
    return static_cast<int32_t>(tiles);
  }

  // Restricts the walk to the tiles of the item's split; masked tiles count.
  __device__ void take_share(const WorkItem& work) {
    if (work.n_splits == 1) return;
    const int32_t tiles = count_tiles();
    const auto share = static_cast<int32_t>(static_cast<uint32_t>(tiles) / static_cast<uint32_t>(work.n_splits));
    const int32_t rest = tiles - share * work.n_splits;
    restrict_to(work.split * share + min(work.split, rest), share + (work.split < rest ? 1 : 0));
  }

  // Skips the first tiles of the walk and ends it after `n_tiles` more; masked tiles count.
  __device__ void restrict_to(int32_t first_tile, int32_t n_tiles) {
    tiles_left_ = n_tiles;
#pragma unroll 1
    for (int32_t skip = first_tile; range_ < last_range_;) {
      enter_range();
      const int32_t tiles = (end_ - position_ + kColumns - 1) / kColumns;
      if (skip < tiles) {
        position_ += skip * kColumns;
        return;
      }
      skip -= tiles;
      position_ = end_;
    }
  }

  // At the end of a walk: starts over at the first range, with what restrict_to left of `n_tiles`.
  __device__ void rewind(int32_t first_range) { range_ = first_range; }

  // The next tile, masked or not: `count` tokens from `begin` on.
  __device__ bool next_span(int32_t& begin, int32_t& count) {
    if (position_ >= end_) {
      if (range_ >= last_range_) return false;
      enter_range();
    }
    if (tiles_left_-- <= 0) return false;
    begin = position_;
    count = min(kColumns, end_ - position_);
    position_ += count;
    return true;
  }

  __device__ bool next(StreamedTile& tile) {
    static_assert(kColumns <= 64, "a tile's validity is one 64-bit word");
    for (int32_t count; next_span(tile.begin, count);) {
      tile.valid = low_bits(count);
      if (mask_ != nullptr) tile.valid &= masked_bits(tile.begin, count);
      if (tile.valid != 0) return true;
    }
    return false;
  }

 private:
  __device__ int32_t range_begin(int32_t range) const {
    return schedule_word(schedule_, (schedule_.n_groups + 1) * kWordsPerGroup + 2 * range);
  }
  __device__ int32_t range_end(int32_t range) const {
    return schedule_word(schedule_, (schedule_.n_groups + 1) * kWordsPerGroup + 2 * range + 1);
  }

  __device__ void enter_range() {
    position_ = range_begin(range_);
    end_ = range_end(range_);
    ++range_;
  }

  __device__ uint64_t masked_bits(int32_t begin, int32_t count) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
    uint64_t bits = __ballot_sync(kFullWarp, lane < count && mask_[begin + lane] != 0);
    if constexpr (kColumns > 32) {
      const uint32_t high = __ballot_sync(kFullWarp, lane + 32 < count && mask_[begin + lane + 32] != 0);
      bits |= static_cast<uint64_t>(high) << 32;
    }
    return bits;
  }

  const ScheduleView& schedule_;
  const uint8_t* mask_;
  int32_t range_;
  int32_t last_range_;
  int32_t position_ = 0;
  int32_t end_ = 0;
  int32_t tiles_left_ = INT32_MAX;
};

}  // namespace anchor_attention::cuda
