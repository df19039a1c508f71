#include "kernels/cuda/common/schedule.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace anchor_attention::cuda {
namespace {

struct Group {
  int32_t begin;
  int32_t end;
  int32_t entry;  // of the caller's ranges, −1: of none
  int64_t n_splits;
  int64_t column_tiles_per_item;
};

int64_t divide_up(int64_t value, int64_t divisor) { return value / divisor + (value % divisor == 0 ? 0 : 1); }

int64_t count_column_tiles(const RangesView& ranges, size_t group, int columns_per_tile) {
  const int shift = std::countr_zero(static_cast<uint32_t>(columns_per_tile));
  const auto round_up = static_cast<uint32_t>(columns_per_tile - 1);
  int64_t tiles = 0;
  for (int32_t r = ranges.offsets[group]; r < ranges.offsets[group + 1]; ++r) {
    tiles += (static_cast<uint32_t>(ranges.columns[2 * r + 1] - ranges.columns[2 * r]) + round_up) >> shift;
  }
  return tiles;
}

int64_t count_splits(int64_t column_tiles, const Sharing& sharing) {
  const auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(column_tiles)));
  const int64_t splits = divide_up(column_tiles, sharing.max_column_tiles);
  return std::max<int64_t>(1, sharing.own_accumulators ? splits : std::min(splits, root));
}

std::vector<Group> cover_rows(const RangesView& ranges, int64_t n_rows, int columns_per_tile, const Sharing& sharing) {
  std::vector<Group> groups;
  groups.reserve(ranges.rows.size() + 1);  // with a gap before each
  int32_t covered = 0;
  const auto cover_gap = [&](int64_t end) {
    if (covered < end) groups.push_back({covered, static_cast<int32_t>(end), -1, 1, 0});
  };
  for (size_t g = 0; 2 * g < ranges.rows.size(); ++g) {
    cover_gap(ranges.rows[2 * g]);
    covered = ranges.rows[2 * g + 1];
    const int64_t tiles = sharing.walks * count_column_tiles(ranges, g, columns_per_tile);
    const int64_t splits = count_splits(tiles, sharing);
    groups.push_back({ranges.rows[2 * g], covered, static_cast<int32_t>(g), splits, divide_up(tiles, splits)});
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

int64_t column_tiles_that_fill(const RangesView& ranges, int rows_per_tile, int columns_per_tile, int64_t heads,
                               int64_t slots) {
  // A shorter item costs more for its part of the merging than it saves.
  constexpr int64_t kMinColumnTiles = 4;
  // Estimated costs, in column tiles, of starting an item and of the launch that merges.
  constexpr int64_t kStartCost = 1;
  constexpr int64_t kMergeCost = 3;
  constexpr int64_t kMoreWaves = 3;
  constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
  struct Tiles {
    int64_t rows;
    int64_t columns;
  };
  std::vector<Tiles> groups(ranges.rows.size() / 2);
  int64_t total = 0;
  int64_t longest = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    groups[g] = {heads * divide_up(ranges.rows[2 * g + 1] - ranges.rows[2 * g], rows_per_tile),
                 count_column_tiles(ranges, g, columns_per_tile)};
    total += groups[g].rows * groups[g].columns;
    longest = std::max(longest, groups[g].columns);
  }
  const bool fills_alone = 4 * longest * slots <= 5 * total;
  if (fills_alone || longest < 2 * kMinColumnTiles) return kUnlimited;

  const auto items = [&](int64_t limit) {
    int64_t count = 0;
    for (const Tiles& tiles : groups) count += tiles.rows * divide_up(tiles.columns, limit);
    return count;
  };
  // Time until the last item ends: exact for items of equal length, otherwise an upper bound for a greedy order.
  const auto time = [&](int64_t limit) {
    int64_t item = 0;
    for (const Tiles& tiles : groups) {
      item = std::max(item, divide_up(tiles.columns, std::max<int64_t>(1, divide_up(tiles.columns, limit))));
    }
    item += kStartCost;
    return std::min(divide_up(items(limit), slots) * item, divide_up(total, slots) + item);
  };
  int64_t best = kUnlimited;
  int64_t best_time = time(longest);
  const int64_t waves = divide_up(items(longest), slots);
  for (int64_t more = 0; more <= kMoreWaves; ++more) {
    // The shortest items that fit into this many waves.
    int64_t low = kMinColumnTiles;
    int64_t high = longest;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (items(middle) <= (waves + more) * slots) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    // More splits have to pay off.
    const int64_t split_time = time(low) + kMergeCost;
    if (20 * split_time >= 19 * best_time) continue;
    best = low;
    best_time = split_time;
  }
  return best;
}

Schedule make_schedule(const RangesView& ranges, int64_t n_rows, int rows_per_tile, int columns_per_tile,
                       const Sharing& sharing) {
  std::vector<Group> groups = cover_rows(ranges, n_rows, columns_per_tile, sharing);
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Group& a, const Group& b) { return a.column_tiles_per_item > b.column_tiles_per_item; });

  Schedule schedule;
  schedule.n_groups = checked_index(static_cast<int64_t>(groups.size()), "groups");
  schedule.words.reserve((groups.size() + 1) * kWordsPerGroup + ranges.columns.size());
  schedule.entries.reserve(groups.size());
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
    schedule.entries.push_back(group.entry);
    if (group.entry >= 0) {
      columns.insert(columns.end(), ranges.columns.begin() + 2 * ranges.offsets[group.entry],
                     ranges.columns.begin() + 2 * ranges.offsets[group.entry + 1]);
    }
    n_items += tiles * n_splits;
    if (n_splits > 1) n_accumulators += sharing.own_accumulators ? tiles * n_splits : tiles;
  }
  schedule.n_items = checked_index(n_items, "blocks");
  schedule.n_accumulators = checked_index(n_accumulators, "accumulators");
  schedule.words.insert(schedule.words.end(),
                        {schedule.n_items, 0, 0, static_cast<int32_t>(columns.size() / 2), 1, schedule.n_accumulators});
  schedule.words.insert(schedule.words.end(), columns.begin(), columns.end());
  return schedule;
}

}  // namespace anchor_attention::cuda
