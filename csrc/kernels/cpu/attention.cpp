#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/schedule.h"

namespace anchor_attention::cpu {
namespace {

template <typename T>
void fill_rows_without_keys(const AttentionParams& p, const Tile& tile) {
  const int64_t size = storage_size(p.dtype);
  for (int64_t i = tile.q_begin; i < tile.q_begin + tile.n_queries; ++i) {
    const int64_t row = (tile.batch * p.n_queries + i) * p.heads + tile.head;
    std::memset(static_cast<char*>(p.out) + row * p.head_dim * size, 0, p.head_dim * size);
  }
  T* lse = static_cast<T*>(p.lse) + (static_cast<int64_t>(tile.batch) * p.heads + tile.head) * p.n_queries;
  std::fill_n(lse + tile.q_begin, tile.n_queries, -std::numeric_limits<T>::infinity());
}

}  // namespace

void attention(const AttentionParams& p, const Executor& executor, bool allow_split_float32) {
  const ProductKernels& kernels = selected_products(p.dtype, allow_split_float32);
  const Schedule schedule(p, kernels);
  const int64_t threads = schedule.threads(executor, 4);
  const Planes planes = schedule.all_planes();
  const int64_t packed_bytes = schedule.n_rows(planes) * schedule.packed_row_bytes();
  const Buffer k_rows = allocate(packed_bytes);
  const Buffer v_stack = allocate(packed_bytes);
  const int64_t scratch_bytes = kernels.forward_scratch_bytes(p.head_dim, p.dtype);
  const Buffer scratch = allocate(threads * scratch_bytes);
  const std::vector<Tile> tiles = schedule.tiles(planes, kernels.forward_tile_queries(p.dtype), /*with_gaps=*/true);

  pack(p, schedule, planes, kernels, executor, threads,
       {{p.k, p.k_strides, PackedLayout::rows, k_rows.get()}, {p.v, p.v_strides, PackedLayout::stack, v_stack.get()}});
  for_each_task(executor, threads, static_cast<int64_t>(tiles.size()), [&](int64_t i, int64_t thread) {
    const Tile& tile = tiles[i];
    if (tile.group == kNoGroup) {
      p.dtype == ScalarType::float64 ? fill_rows_without_keys<double>(p, tile) : fill_rows_without_keys<float>(p, tile);
      return;
    }
    const KeyRangeTableView table = schedule.keys(tile.batch).table.view();
    const int64_t offset = schedule.first_row(planes, tile.batch, tile.head) * schedule.packed_row_bytes();
    kernels.forward_tile({&p, tile.batch, tile.head, tile.q_begin, tile.n_queries, k_rows.get() + offset,
                          v_stack.get() + offset, table.k_ranges + 2 * table.k_offsets[tile.group],
                          table.k_offsets[tile.group + 1] - table.k_offsets[tile.group],
                          scratch.get() + thread * scratch_bytes});
  });
}

}  // namespace anchor_attention::cpu
