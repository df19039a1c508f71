// What forward and backward share: which rows are packed where, the tiles of queries, buffers and tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/kernel_table.h"
#include "key_ranges.h"

namespace anchor_attention::cpu {

struct FreeMemory {
  void operator()(void* pointer) const { std::free(pointer); }
};
using Buffer = std::unique_ptr<char, FreeMemory>;

// Aligned to a line of the cache.
Buffer allocate(int64_t bytes);

constexpr int32_t kNoGroup = -1;

// Packed keys are divided at multiples of this, which is one of every alignment.
constexpr int32_t kCutKeys = 64;

struct Tile {
  int32_t batch;
  int32_t head;
  int32_t group;  // kNoGroup: rows that read no key
  int32_t n_queries;
  int64_t q_begin;
  int64_t n_keys;
};

// Heads of keys of batch elements, counted head by head: plane = batch · kv_heads + kv_head.
struct Planes {
  int64_t begin;
  int64_t end;
};

// Of keys and of values, which may have heads of another size.
struct RowBytes {
  int64_t k;
  int64_t v;
};

// The steps for a call: the matrix unit's, unless the ranges are so short and so many that padding each of them to its
// alignment would take a multiple of the memory of the keys. Then the vectors', which need almost no padding.
const ProductKernels& suitable_products(const AttentionParams& params, bool allow_split_float32);

// How the work of one call is laid out.
class WorkPlan {
 public:
  WorkPlan(const AttentionParams& params, const Packing& packing);

  // The keys of a batch element that are read and kept, and the table over them.
  const CompactedKeys& keys(int64_t batch) const { return layouts_[layout(batch)]; }
  int64_t n_layouts() const { return static_cast<int64_t>(layouts_.size()); }
  int64_t layout(int64_t batch) const { return layouts_.size() == 1 ? 0 : batch; }
  // Whether the two layouts of packed rows differ.
  bool has_stacks() const { return alignment_ > 1; }

  Planes all_planes() const { return {0, params_.batch * params_.kv_heads}; }
  int64_t n_rows(Planes planes) const { return first_rows_[planes.end] - first_rows_[planes.begin]; }
  RowBytes packed_row_bytes() const { return packed_row_bytes_; }
  RowBytes sum_row_bytes() const { return sum_row_bytes_; }
  // Where the rows that a head of queries reads begin among those of some planes.
  int64_t first_row(Planes planes, int64_t batch, int64_t head) const {
    return first_rows_[batch * params_.kv_heads + head / params_.heads_per_kv_head()] - first_rows_[planes.begin];
  }
  int64_t first_row(Planes planes, int64_t plane) const { return first_rows_[plane] - first_rows_[planes.begin]; }

  double operations(Planes planes, double operations_per_score) const;
  int64_t threads(const Executor& executor, double operations_per_score) const;

  // Tiles of heads that share keys lie together, so that keys and values stay in the cache. `with_gaps` adds the rows
  // that read no key.
  std::vector<Tile> tiles(Planes planes, int64_t tile_queries, bool with_gaps) const;

 private:
  void append_tiles(int64_t batch, int64_t head, int64_t tile_queries, bool with_gaps, std::vector<Tile>& tiles) const;

  const AttentionParams& params_;
  int64_t alignment_;
  RowBytes packed_row_bytes_;
  RowBytes sum_row_bytes_;
  std::vector<CompactedKeys> layouts_;
  std::vector<double> areas_;        // of each layout
  std::vector<int64_t> first_rows_;  // of each plane, and behind the last one
};

// Runs body(task, thread) for every task, each thread taking the next one, until the call is cancelled.
template <typename Body>
void for_each_task(const Executor& executor, int64_t threads, int64_t n_tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  executor.run(std::min(threads, n_tasks), [&](int64_t thread) {
    for (int64_t task = next++; task < n_tasks && !executor.stops(); task = next++) body(task, thread);
  });
}

// Rows of a plane, few enough to share the work among threads.
struct RowTask {
  int64_t plane;
  int64_t batch;
  int64_t kv_head;
  int64_t begin;
  int64_t end;
};

template <typename CountRows>
std::vector<RowTask> row_tasks(Planes planes, int64_t kv_heads, const CountRows& count_rows) {
  constexpr int64_t kRowsPerTask = 256;
  std::vector<RowTask> tasks;
  for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
    const int64_t n = count_rows(plane / kv_heads);
    for (int64_t begin = 0; begin < n; begin += kRowsPerTask) {
      tasks.push_back({plane, plane / kv_heads, plane % kv_heads, begin, std::min(begin + kRowsPerTask, n)});
    }
  }
  return tasks;
}

inline int64_t storage_size(ScalarType dtype) {
  return dtype == ScalarType::float64 ? 8 : dtype == ScalarType::float32 ? 4 : 2;
}

inline const char* head_start(const void* tensor, const Strides& strides, int64_t batch, int64_t head,
                              ScalarType dtype) {
  return static_cast<const char*>(tensor) + (batch * strides.batch + head * strides.head) * storage_size(dtype);
}

// A tensor to pack and where to.
struct PackedTensor {
  const void* source;
  Strides strides;
  int64_t head_dim;
  PackedLayout layout;
  char* packed;
  int64_t row_bytes;
};

// Packs the tokens `source` [n_rows] of a head to `packed`.
inline void pack_tokens(const AttentionParams& p, const Packing& packing, const PackedTensor& tensor, int64_t batch,
                        int64_t kv_head, const int32_t* source, int64_t n_rows, char* packed) {
  packing.pack_rows({head_start(tensor.source, tensor.strides, batch, kv_head, p.dtype), tensor.strides.token, source,
                     n_rows, tensor.head_dim, p.dtype, tensor.layout, packed});
}

void pack(const AttentionParams& params, const WorkPlan& plan, Planes planes, const Packing& packing,
          const Executor& executor, int64_t threads, const std::vector<PackedTensor>& tensors);

}  // namespace anchor_attention::cpu
