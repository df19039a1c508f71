// The order in which blocks of the backward work, and in which they add to the gradient of the queries. Plain C++.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/schedule.h"
#include "params.h"

namespace anchor_attention::sm90 {

struct BackwardSchedule {
  cuda::Schedule keys;     // items of the pass over keys; after its ranges the RangeTurns of each
  cuda::Schedule queries;  // its accumulators are the sums: none where rows have no keys
  int32_t n_ranges = 0;
  int32_t n_sums = 0;
  int32_t turns_per_sum = 1;
};

// What the number of sums per tile of queries depends on.
struct SumSizes {
  int64_t bytes;             // of one sum for a tile of queries, times all heads
  int64_t concurrent_tiles;  // tiles of keys of one head that are processed at the same time
};

// Tiles of queries end where a group of the table ends: then every key tile that reads a query of a tile reads all of
// them, and a tile's additions can be counted ahead. A tile of keys with many tiles of queries is processed by
// several items, so that the grid has at least `items`. Small problems get several sums per tile of queries, so that
// blocks wait for fewer others: see docs/hopper_backward.md.
BackwardSchedule make_backward_schedule(const KeyRangeTableView& table, int64_t n_queries, int64_t n_keys,
                                        int queries_per_tile, int64_t items, int64_t heads_per_kv_head,
                                        const SumSizes& sums);

}  // namespace anchor_attention::sm90
