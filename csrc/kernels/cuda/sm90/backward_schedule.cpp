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

// Appends the RangeTurns. Turns at a tile of queries follow the order of the items, the tiles of keys of a group one
// after another, and where a group reads the queries several times, all turns of one of its tiles of keys together:
// nobody waits for a later item.
void append_turns(Schedule& keys, const Schedule& queries, const ReadKeys& read) {
  std::vector<int32_t> first_tiles(queries.n_groups);  // of the groups of the table
  for (int32_t i = 0; i < queries.n_groups; ++i) {
    if (queries.entries[i] >= 0) first_tiles[queries.entries[i]] = queries.words[i * kWordsPerGroup];
  }
  std::vector<int64_t> turns(first_tiles.size());  // that come before, at every tile of a group
  size_t word = keys.words.size();
  keys.words.resize(word + read.groups.size() * kWordsPerRangeTurns);
  for (int32_t i = 0; i < keys.n_groups; ++i) {
    if (keys.entries[i] < 0) continue;
    const int32_t* bounds = keys.words.data() + i * kWordsPerGroup + 1;
    const int64_t n_tiles = divide_up(bounds[1] - bounds[0], kBackwardKeys);
    const int32_t end = read.offsets[keys.entries[i] + 1];
    for (int32_t first = read.offsets[keys.entries[i]], last = first; first < end; first = last) {
      const int32_t group = read.groups[first];
      while (last < end && read.groups[last] == group) ++last;
      const int32_t repeats = last - first;
      for (int32_t repeat = 0; repeat < repeats; ++repeat) {
        keys.words[word++] = first_tiles[group];
        keys.words[word++] = static_cast<int32_t>(turns[group] + repeat);
        keys.words[word++] = repeats;
      }
      turns[group] += n_tiles * repeats;
      if (turns[group] > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("the table lets a query read " + std::to_string(turns[group]) +
                                    " tiles of keys, more than 2^31 - 1");
      }
    }
  }
}

}  // namespace

BackwardSchedule make_backward_schedule(const KeyRangeTableView& table, int64_t n_queries, int64_t n_keys,
                                        int queries_per_tile, int64_t items, int64_t heads_per_kv_head) {
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
  for (int32_t g = 0; g < table.n_groups; ++g) {
    schedule.n_query_tiles += divide_up(table.q_ranges[2 * g + 1] - table.q_ranges[2 * g], queries_per_tile);
  }
  append_turns(schedule.keys, schedule.queries, read);
  return schedule;
}

}  // namespace anchor_attention::sm90
