#include "kernels/cuda/sm90/backward_schedule.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
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

// How often a tile of queries of each group of the table is added to, by the tiles of keys of a head.
std::vector<int64_t> count_turns(const Schedule& keys, const ReadKeys& read, int32_t n_groups) {
  std::vector<int64_t> turns(n_groups);
  for (int32_t i = 0; i < keys.n_groups; ++i) {
    if (keys.entries[i] < 0) continue;
    const int32_t* bounds = keys.words.data() + i * kWordsPerGroup + 1;
    const int64_t n_tiles = divide_up(bounds[1] - bounds[0], kBackwardKeys);
    for (int32_t r = read.offsets[keys.entries[i]]; r < read.offsets[keys.entries[i] + 1]; ++r) {
      turns[read.groups[r]] += n_tiles;
    }
  }
  for (const int64_t count : turns) {
    if (count > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("the table lets a query read " + std::to_string(count) +
                                  " tiles of keys, more than 2^31 - 1");
    }
  }
  return turns;
}

// Sums of all turns together that the level-2 cache still holds; reading more takes longer than the waiting it saves,
// by the prediction of benchmarks/cuda_turns.py.
constexpr int64_t kMaxBytesOfOwnSums = 32 << 20;

// How many turns share a sum: one, so that no block waits for another, or all.
int64_t choose_turns_per_sum(const std::vector<int64_t>& turns, const std::vector<int64_t>& tiles,
                             const SumSizes& sums) {
  int64_t most = 1;
  int64_t n_own_sums = 0;
  for (size_t g = 0; g < turns.size(); ++g) {
    most = std::max(most, turns[g]);
    n_own_sums += tiles[g] * turns[g];
  }
  const bool waits = sums.concurrent_tiles > 1;
  return waits && n_own_sums <= kMaxBytesOfOwnSums / std::max<int64_t>(sums.bytes, 1) ? 1 : most;
}

// Writes the first sum of each group into the schedule of the queries. Returns it for the groups of the table.
std::vector<int32_t> place_sums(BackwardSchedule& schedule, const std::vector<int64_t>& turns,
                                const std::vector<int64_t>& tiles) {
  std::vector<int32_t> first_sums(turns.size());
  int64_t n_sums = 0;
  for (int32_t i = 0; i <= schedule.queries.n_groups; ++i) {
    if (n_sums > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("the table needs " + std::to_string(n_sums) + " sums, more than 2^31 - 1");
    }
    schedule.queries.words[i * kWordsPerGroup + 5] = static_cast<int32_t>(n_sums);
    const int32_t group = i < schedule.queries.n_groups ? schedule.queries.entries[i] : -1;
    if (group < 0) continue;
    first_sums[group] = static_cast<int32_t>(n_sums);
    n_sums += tiles[group] * divide_up(turns[group], schedule.turns_per_sum);
  }
  schedule.n_sums = static_cast<int32_t>(n_sums);
  return first_sums;
}

// Appends the RangeTurns. Turns at a tile of queries follow the order of the items, the tiles of keys of a group one
// after another, and where a group reads the queries several times, all turns of one of its tiles of keys together:
// nobody waits for a later item.
void append_turns(BackwardSchedule& schedule, const ReadKeys& read, const std::vector<int64_t>& turns,
                  const std::vector<int32_t>& first_sums) {
  Schedule& keys = schedule.keys;
  std::vector<int32_t> before(turns.size());  // turns at every tile of a group
  size_t word = keys.words.size();
  keys.words.resize(word + read.groups.size() * kWordsPerRangeTurns);
  for (int32_t i = 0; i < keys.n_groups; ++i) {
    if (keys.entries[i] < 0) continue;
    const int32_t* bounds = keys.words.data() + i * kWordsPerGroup + 1;
    const auto n_tiles = static_cast<int32_t>(divide_up(bounds[1] - bounds[0], kBackwardKeys));
    const int32_t end = read.offsets[keys.entries[i] + 1];
    for (int32_t first = read.offsets[keys.entries[i]], last = first; first < end; first = last) {
      const int32_t group = read.groups[first];
      while (last < end && read.groups[last] == group) ++last;
      const int32_t repeats = last - first;
      for (int32_t repeat = 0; repeat < repeats; ++repeat) {
        keys.words[word++] = first_sums[group];
        keys.words[word++] = static_cast<int32_t>(divide_up(turns[group], schedule.turns_per_sum));
        keys.words[word++] = before[group] + repeat;
        keys.words[word++] = repeats;
      }
      before[group] += n_tiles * repeats;
    }
  }
}

}  // namespace

BackwardSchedule make_backward_schedule(const KeyRangeTableView& table, int64_t n_queries, int64_t n_keys,
                                        int queries_per_tile, int64_t items, int64_t heads_per_kv_head,
                                        const SumSizes& sums) {
  const ReadKeys read = keys_with_readers(table);
  std::vector<int32_t> q_ranges(2 * read.groups.size());
  for (size_t i = 0; i < read.groups.size(); ++i) {
    q_ranges[2 * i] = table.q_ranges[2 * read.groups[i]];
    q_ranges[2 * i + 1] = table.q_ranges[2 * read.groups[i] + 1];
  }
  const RangesView ranges{read.k_ranges, read.offsets, q_ranges};
  const int64_t tiles_per_item =
      heads_per_kv_head * count_tile_pairs(ranges, kBackwardKeys, queries_per_tile) / std::max<int64_t>(items, 1);
  BackwardSchedule schedule;
  schedule.keys = make_schedule(ranges, n_keys, kBackwardKeys, queries_per_tile,
                                {.max_column_tiles = std::max(kMinQueriesPerItem / queries_per_tile, tiles_per_item),
                                 .walks = heads_per_kv_head});
  schedule.queries = make_schedule(view_of(table), n_queries, queries_per_tile, kBackwardKeys);
  schedule.n_ranges = static_cast<int32_t>(read.groups.size());
  const std::vector<int64_t> turns = count_turns(schedule.keys, read, table.n_groups);
  std::vector<int64_t> tiles(table.n_groups);
  for (int32_t g = 0; g < table.n_groups; ++g) {
    tiles[g] = divide_up(table.q_ranges[2 * g + 1] - table.q_ranges[2 * g], queries_per_tile);
  }
  schedule.turns_per_sum = static_cast<int32_t>(choose_turns_per_sum(turns, tiles, sums));
  append_turns(schedule, read, turns, place_sums(schedule, turns, tiles));
  return schedule;
}

}  // namespace anchor_attention::sm90
