// Which tiles there are, and in which order they are processed. Plain C++.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/cuda/common/kernel_params.h"

namespace anchor_attention::cuda {

// Ranges of a stationary axis, disjoint and ascending, and the ranges of the streamed axis that each attends to.
struct RangesView {
  std::span<const int32_t> rows;     // [n, 2]
  std::span<const int32_t> offsets;  // [n + 1]
  std::span<const int32_t> columns;  // [offsets[n], 2]
};

struct Schedule {
  std::vector<int32_t> words;    // as ScheduleView describes them
  std::vector<int32_t> entries;  // [n_groups]: which of the caller's each group is, −1 for rows in no range
  int32_t n_groups = 0;
  int32_t n_items = 0;
  int32_t n_accumulators = 0;
};

// How items share the column tiles of a tile of rows.
struct Sharing {
  int64_t max_column_tiles = std::numeric_limits<int64_t>::max();  // of an item
  int64_t walks = 1;  // how often it goes through the columns: heads of queries that share keys
  // Whether every item of a split tile has an accumulator of its own. Otherwise they share one and add to it in turn; a
  // tile then has no more splits than the square root of its column tiles, where the time of the additions and that of
  // an item balance.
  bool own_accumulators = false;
};

// `columns_per_tile`, here and below, is a power of two: tables have thousands of ranges, and dividing takes a while.
// Groups in descending order of the time of one item, rows in no range last, so that the last blocks of a launch are
// short.
Schedule make_schedule(const RangesView& ranges, int64_t n_rows, int rows_per_tile, int columns_per_tile,
                       const Sharing& sharing = {});

// How many column tiles an item should stream so that the items of `heads` heads fill `slots` concurrent blocks: see
// docs/cuda.md. Unlimited where the tiles of rows fill them anyway, or have too few columns for a split to pay off.
int64_t column_tiles_that_fill(const RangesView& ranges, int rows_per_tile, int columns_per_tile, int64_t heads,
                               int64_t slots);

// Σ over tiles of rows of their column tiles: the size of the whole problem in units of `max_column_tiles`.
int64_t count_tile_pairs(const RangesView& ranges, int rows_per_tile, int columns_per_tile);

}  // namespace anchor_attention::cuda
