// Which tiles there are, and in which order they are worked through. Plain C++.
#pragma once

#include <cstdint>
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
  std::vector<int32_t> words;  // as ScheduleView describes them
  int32_t n_groups = 0;
  int32_t n_items = 0;
  int32_t n_accumulators = 0;
};

// Groups in descending order of the time of one item, rows in no range last, so that the last blocks of a launch are
// short. An item goes through its columns `walks` times (heads of queries that share keys) and streams at most
// `max_column_tiles` tiles, but a tile of rows is never split more often than
// the square root of its column tiles: splits add up one after another, and there the two times balance.
Schedule make_schedule(const RangesView& ranges, int64_t n_rows, int rows_per_tile, int columns_per_tile,
                       int64_t max_column_tiles, int64_t walks = 1);

// Σ over tiles of rows of their column tiles: the size of the whole problem in units of `max_column_tiles`.
int64_t count_tile_pairs(const RangesView& ranges, int rows_per_tile, int columns_per_tile);

}  // namespace anchor_attention::cuda
