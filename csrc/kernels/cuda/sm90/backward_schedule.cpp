#include "kernels/cuda/sm90/backward_schedule.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/common/plan_parts.h"
#include "kernels/cuda/sm90/backward_config.h"
#include "kernels/cuda/sm90/backward_params.h"
#include "key_ranges.h"

namespace anchor_attention::sm90 {
namespace {

// A shorter item costs more for its turn at the accumulators than it saves.
constexpr int64_t kMinQueriesPerItem = 512;

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The transposed table with its ranges of queries cut where the groups of the table begin.
TransposedKeyRangeTable cut_at_groups(const KeyRangeTableView& table) {
  const TransposedKeyRangeTable whole = transpose(table);
  TransposedKeyRangeTable cut{whole.k_ranges, {0}, {}};
  std::vector<int32_t> begins(table.n_groups);
  for (int32_t g = 0; g < table.n_groups; ++g) begins[g] = table.q_ranges[2 * g];
  for (size_t entry = 0; entry + 1 < whole.q_offsets.size(); ++entry) {
    for (int32_t range = whole.q_offsets[entry]; range < whole.q_offsets[entry + 1]; ++range) {
      auto g = std::ranges::lower_bound(begins, whole.q_ranges[2 * range]) - begins.begin();
      for (; g < table.n_groups && begins[g] < whole.q_ranges[2 * range + 1]; ++g) {
        cut.q_ranges.insert(cut.q_ranges.end(), {table.q_ranges[2 * g], table.q_ranges[2 * g + 1]});
      }
    }
    cut.q_offsets.push_back(static_cast<int32_t>(cut.q_ranges.size() / 2));
  }
  return cut;
}

// (first query, first tile) of every group of the schedule of the queries, ascending.
std::vector<std::pair<int32_t, int32_t>> first_tiles(const Schedule& queries) {
  std::vector<std::pair<int32_t, int32_t>> tiles(queries.n_groups);
  for (int32_t g = 0; g < queries.n_groups; ++g) {
    tiles[g] = {queries.words[g * kWordsPerGroup + 1], queries.words[g * kWordsPerGroup]};
  }
  std::ranges::sort(tiles);
  return tiles;
}

// Appends the RangeTurns. Turns at a tile of queries follow the order of the items, the tiles of keys of a group one
// after another, and where a group reads the queries several times, all turns of one of its tiles of keys together:
// no item waits for a later one.
void append_turns(Schedule& keys, const Schedule& queries) {
  const auto tiles = first_tiles(queries);
  std::vector<int64_t> turns(tiles.size());
  std::vector<int32_t> repeats(tiles.size());
  const auto group_of = [&](size_t bounds) {
    return std::ranges::lower_bound(tiles, keys.words[bounds], {}, &std::pair<int32_t, int32_t>::first) - tiles.begin();
  };
  const size_t first_bounds = static_cast<size_t>(keys.n_groups + 1) * kWordsPerGroup;
  std::vector<int32_t> words;
  for (int32_t g = 0; g < keys.n_groups; ++g) {
    const int32_t* group = keys.words.data() + g * kWordsPerGroup;
    const int64_t n_tiles = divide_up(group[2] - group[1], kBackwardKeys);
    const size_t begin = first_bounds + 2 * group[3];
    const size_t end = first_bounds + 2 * group[kWordsPerGroup + 3];
    for (size_t bounds = begin; bounds < end; bounds += 2) ++repeats[group_of(bounds)];
    for (size_t bounds = begin; bounds < end; bounds += 2) {
      const auto at = group_of(bounds);
      words.insert(words.end(), {tiles[at].second, static_cast<int32_t>(turns[at]), repeats[at]});
      ++turns[at];
    }
    for (size_t bounds = begin; bounds < end; bounds += 2) {
      const auto at = group_of(bounds);
      turns[at] += (n_tiles - 1) * repeats[at];
      repeats[at] = 0;
      if (turns[at] > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("the table lets a query read " + std::to_string(turns[at]) +
                                    " tiles of keys, more than 2^31 - 1");
      }
    }
  }
  keys.words.insert(keys.words.end(), words.begin(), words.end());
}

}  // namespace

BackwardSchedule make_backward_schedule(const KeyRangeTableView& table, int64_t n_queries, int64_t n_keys,
                                        int queries_per_tile, int64_t items, int64_t heads_per_kv_head) {
  const TransposedKeyRangeTable cut = cut_at_groups(table);
  const RangesView ranges{cut.k_ranges, cut.q_offsets, cut.q_ranges};
  const int64_t tiles_per_item =
      heads_per_kv_head * count_tile_pairs(ranges, kBackwardKeys, queries_per_tile) / std::max<int64_t>(items, 1);
  BackwardSchedule schedule;
  schedule.keys = make_schedule(ranges, n_keys, kBackwardKeys, queries_per_tile,
                                {.max_column_tiles = std::max(kMinQueriesPerItem / queries_per_tile, tiles_per_item),
                                 .walks = heads_per_kv_head});
  schedule.queries = make_schedule(view_of(table), n_queries, queries_per_tile, kBackwardKeys);
  schedule.n_ranges = static_cast<int32_t>(cut.q_ranges.size() / 2);
  for (int32_t g = 0; g < table.n_groups; ++g) {
    schedule.n_query_tiles += divide_up(table.q_ranges[2 * g + 1] - table.q_ranges[2 * g], queries_per_tile);
  }
  append_turns(schedule.keys, schedule.queries);
  return schedule;
}

}  // namespace anchor_attention::sm90
