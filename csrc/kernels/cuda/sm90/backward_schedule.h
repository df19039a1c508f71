// The order in which blocks of the backward work, and in which they add to the gradient of the queries. Plain C++.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/schedule.h"
#include "params.h"

namespace anchor_attention::sm90 {

struct BackwardSchedule {
  cuda::Schedule keys;     // items of the pass over keys; after its ranges the RangeTurns of each
  cuda::Schedule queries;  // its items are the tiles of queries, those without keys last
  int32_t n_ranges = 0;
  int32_t n_query_tiles = 0;  // with keys
};

// Tiles of queries end where a group of the table ends: then every key tile that reads a query of a tile reads all of
// them, and a tile's additions can be counted ahead. A tile of keys with many tiles of queries is processed by
// several items, so that the grid has at least `items`.
BackwardSchedule make_backward_schedule(const KeyRangeTableView& table, int64_t n_queries, int64_t n_keys,
                                        int queries_per_tile, int64_t items, int64_t heads_per_kv_head);

}  // namespace anchor_attention::sm90
