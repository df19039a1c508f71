#include "kernels/cuda/common/schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace anchor_attention::cuda {
namespace {

struct Group {
  int32_t begin;
  int32_t end;
  int32_t first_range;  // of the caller's numbering
  int32_t last_range;
  int64_t column_tiles;
  int64_t n_splits;

  int64_t column_tiles_per_item() const { return (column_tiles + n_splits - 1) / n_splits; }
};

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

int64_t count_column_tiles(const RangesView& ranges, size_t group, int columns_per_tile) {
  int64_t tiles = 0;
  for (int32_t r = ranges.offsets[group]; r < ranges.offsets[group + 1]; ++r) {
    tiles += divide_up(ranges.columns[2 * r + 1] - ranges.columns[2 * r], columns_per_tile);
  }
  return tiles;
}

int64_t count_splits(int64_t column_tiles, int64_t max_column_tiles) {
  const auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(column_tiles)));
  return std::max<int64_t>(1, std::min(divide_up(column_tiles, max_column_tiles), root));
}

std::vector<Group> cover_rows(const RangesView& ranges, int64_t n_rows, int columns_per_tile, int64_t max_column_tiles,
                              int64_t walks) {
  std::vector<Group> groups;
  int32_t covered = 0;
  const auto cover_gap = [&](int64_t end) {
    if (covered < end) groups.push_back({covered, static_cast<int32_t>(end), 0, 0, 0, 1});
  };
  for (size_t g = 0; 2 * g < ranges.rows.size(); ++g) {
    cover_gap(ranges.rows[2 * g]);
    covered = ranges.rows[2 * g + 1];
    const int64_t tiles = walks * count_column_tiles(ranges, g, columns_per_tile);
    groups.push_back({ranges.rows[2 * g], covered, ranges.offsets[g], ranges.offsets[g + 1], tiles,
                      count_splits(tiles, max_column_tiles)});
  }
  cover_gap(n_rows);
  return groups;
}

int32_t checked_index(int64_t value, const char* name) {
  if (value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("the table needs " + std::to_string(value) + " " + name + ", more than 2^31 - 1");
  }
  return static_cast<int32_t>(value);
}

}  // namespace

int64_t count_tile_pairs(const RangesView& ranges, int rows_per_tile, int columns_per_tile) {
  int64_t pairs = 0;
  for (size_t g = 0; 2 * g < ranges.rows.size(); ++g) {
    pairs += divide_up(ranges.rows[2 * g + 1] - ranges.rows[2 * g], rows_per_tile) *
             count_column_tiles(ranges, g, columns_per_tile);
  }
  return pairs;
}

Schedule make_schedule(const RangesView& ranges, int64_t n_rows, int rows_per_tile, int columns_per_tile,
                       int64_t max_column_tiles, int64_t walks) {
  std::vector<Group> groups = cover_rows(ranges, n_rows, columns_per_tile, max_column_tiles, walks);
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) {
    return a.column_tiles_per_item() > b.column_tiles_per_item();
  });

  Schedule schedule;
  schedule.n_groups = checked_index(static_cast<int64_t>(groups.size()), "groups");
  schedule.words.reserve((groups.size() + 1) * kWordsPerGroup + ranges.columns.size());
  std::vector<int32_t> columns;
  columns.reserve(ranges.columns.size());
  int64_t n_items = 0;
  int64_t n_accumulators = 0;
  for (const Group& group : groups) {
    const int64_t tiles = divide_up(group.end - group.begin, rows_per_tile);
    const auto n_splits = static_cast<int32_t>(group.n_splits);
    schedule.words.insert(schedule.words.end(), {checked_index(n_items, "blocks"), group.begin, group.end,
                                                 static_cast<int32_t>(columns.size() / 2), n_splits,
                                                 checked_index(n_accumulators, "accumulators")});
    columns.insert(columns.end(), ranges.columns.begin() + 2 * group.first_range,
                   ranges.columns.begin() + 2 * group.last_range);
    n_items += tiles * n_splits;
    if (n_splits > 1) n_accumulators += tiles;
  }
  schedule.n_items = checked_index(n_items, "blocks");
  schedule.n_accumulators = checked_index(n_accumulators, "accumulators");
  schedule.words.insert(schedule.words.end(),
                        {schedule.n_items, 0, 0, static_cast<int32_t>(columns.size() / 2), 1, schedule.n_accumulators});
  schedule.words.insert(schedule.words.end(), columns.begin(), columns.end());
  return schedule;
}

}  // namespace anchor_attention::cuda
