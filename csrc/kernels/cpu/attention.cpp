#include "kernels/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernels.h"
#include "key_ranges.h"

namespace anchor_attention::cpu {
namespace {

// A thread more costs some microseconds to wake: it must have about as many operations to do.
constexpr double kMinOperationsPerThread = 1e6;
constexpr int64_t kRowsPerPackTask = 256;
constexpr int64_t kRowsPerFillTask = 4096;
constexpr int32_t kNoGroup = -1;

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  void* pointer =
      std::aligned_alloc(kAlignment, (std::max<int64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment);
  if (pointer == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<char*>(pointer));
}

// The keys of one batch element that are read and kept, and the table over them.
struct BatchKeys {
  CompactedKeys keys;

  int64_t n_rows() const { return static_cast<int64_t>(keys.source.size()); }
};

struct Tile {
  int32_t batch;
  int32_t head;
  int32_t group;  // kNoGroup: rows that read no key
  int32_t n_queries;
  int64_t q_begin;
  int64_t n_keys;
};

int64_t keys_of_group(const KeyRangeTableView& table, int32_t group) {
  int64_t n = 0;
  for (int32_t r = table.k_offsets[group]; r < table.k_offsets[group + 1]; ++r) {
    n += table.k_ranges[2 * r + 1] - table.k_ranges[2 * r];
  }
  return n;
}

// One call: which rows are packed where, and the tiles of queries.
class Schedule {
 public:
  Schedule(const AttentionParams& p, const ProductKernels& kernels)
      : p_(p),
        alignment_(kernels.key_alignment(p.dtype)),
        packed_row_bytes_(kernels.packed_row_bytes(p.head_dim, p.dtype)),
        sum_row_bytes_(kernels.sum_row_bytes(p.head_dim, p.dtype)) {
    const int64_t n_layouts = p.key_mask == nullptr ? std::min<int64_t>(p.batch, 1) : p.batch;
    for (int64_t b = 0; b < n_layouts; ++b) {
      const bool* mask = p.key_mask == nullptr ? nullptr : p.key_mask + b * p.key_mask_batch_stride;
      layouts_.push_back({compact_keys(p.table, mask, p.n_keys, alignment_)});
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      first_rows_.push_back(n_rows_);
      n_rows_ += keys(b).n_rows() * p.heads;
    }
    area_ = 0;
    for (int64_t b = 0; b < p.batch; ++b) area_ += keys(b).keys.table.area() * p.heads;
  }

  const BatchKeys& keys(int64_t batch) const { return layouts_[layouts_.size() == 1 ? 0 : batch]; }
  // Whether the two layouts of packed rows differ.
  bool has_stacks() const { return alignment_ > 1; }
  int64_t packed_bytes() const { return n_rows_ * packed_row_bytes_; }
  int64_t sum_row_bytes() const { return sum_row_bytes_; }
  int64_t sum_bytes() const { return n_rows_ * sum_row_bytes_; }
  int64_t packed_offset(int64_t batch, int64_t head, int64_t row = 0) const {
    return (first_row(batch, head) + row) * packed_row_bytes_;
  }
  int64_t sum_offset(int64_t batch, int64_t head) const { return first_row(batch, head) * sum_row_bytes_; }

  int64_t threads(const Executor& executor, double operations_per_score) const {
    const double useful = operations_per_score * static_cast<double>(area_) * p_.head_dim / kMinOperationsPerThread;
    return std::clamp<int64_t>(static_cast<int64_t>(std::min(useful, 1e9)), 1, std::max<int64_t>(executor.threads, 1));
  }

  // Tiles of one head lie together, so that its keys and values stay in the cache. `with_gaps` adds the rows that
  // read no key.
  std::vector<Tile> tiles(int64_t tile_queries, bool with_gaps) const {
    std::vector<Tile> tiles;
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t h = 0; h < p_.heads; ++h) append_tiles(b, h, tile_queries, with_gaps, tiles);
    }
    return tiles;
  }

 private:
  int64_t first_row(int64_t batch, int64_t head) const { return first_rows_[batch] + head * keys(batch).n_rows(); }

  void append_tiles(int64_t batch, int64_t head, int64_t tile_queries, bool with_gaps, std::vector<Tile>& tiles) const {
    const KeyRangeTableView table = keys(batch).keys.table.view();
    const auto append = [&](int32_t group, int64_t begin, int64_t end, int64_t step, int64_t n_keys) {
      for (int64_t q = begin; q < end; q += step) {
        tiles.push_back({static_cast<int32_t>(batch), static_cast<int32_t>(head), group,
                         static_cast<int32_t>(std::min(step, end - q)), q, n_keys});
      }
    };
    int64_t covered = 0;
    for (int32_t g = 0; g < table.n_groups; ++g) {
      if (with_gaps) append(kNoGroup, covered, table.q_ranges[2 * g], kRowsPerFillTask, 0);
      append(g, table.q_ranges[2 * g], table.q_ranges[2 * g + 1], tile_queries, keys_of_group(table, g));
      covered = table.q_ranges[2 * g + 1];
    }
    if (with_gaps) append(kNoGroup, covered, p_.n_queries, kRowsPerFillTask, 0);
  }

  const AttentionParams& p_;
  int64_t alignment_;
  int64_t packed_row_bytes_;
  int64_t sum_row_bytes_;
  int64_t n_rows_ = 0;
  int64_t area_;
  std::vector<BatchKeys> layouts_;
  std::vector<int64_t> first_rows_;  // of each batch element, head 0; head h follows h · n_rows() later
};

// Runs body(task, thread) for every task, each thread taking the next one.
template <typename Body>
void for_each_task(const Executor& executor, int64_t threads, int64_t n_tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  executor.run(std::min(threads, n_tasks), [&](int64_t thread) {
    for (int64_t task = next++; task < n_tasks; task = next++) body(task, thread);
  });
}

struct RowTask {
  int64_t batch;
  int64_t head;
  int64_t begin;
  int64_t end;
};

template <typename CountRows>
std::vector<RowTask> row_tasks(const AttentionParams& p, const CountRows& count_rows) {
  std::vector<RowTask> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t n = count_rows(b);
      for (int64_t begin = 0; begin < n; begin += kRowsPerPackTask) {
        tasks.push_back({b, h, begin, std::min(begin + kRowsPerPackTask, n)});
      }
    }
  }
  return tasks;
}

int64_t storage_size(ScalarType dtype) {
  return dtype == ScalarType::float64 ? 8 : dtype == ScalarType::float32 ? 4 : 2;
}

const char* head_start(const void* tensor, const Strides& strides, int64_t batch, int64_t head, ScalarType dtype) {
  return static_cast<const char*>(tensor) + (batch * strides.batch + head * strides.head) * storage_size(dtype);
}

// A tensor to pack and where to.
struct PackedTensor {
  const void* source;
  Strides strides;
  PackedLayout layout;
  char* packed;
};

void pack(const AttentionParams& p, const Schedule& schedule, const ProductKernels& kernels, const Executor& executor,
          int64_t threads, std::initializer_list<PackedTensor> tensors) {
  const std::vector<RowTask> tasks = row_tasks(p, [&](int64_t batch) { return schedule.keys(batch).n_rows(); });
  for_each_task(executor, threads, static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const RowTask& task = tasks[i];
    for (const PackedTensor& tensor : tensors) {
      kernels.pack_rows({head_start(tensor.source, tensor.strides, task.batch, task.head, p.dtype),
                         tensor.strides.token, schedule.keys(task.batch).keys.source.data() + task.begin,
                         task.end - task.begin, p.head_dim, p.dtype, tensor.layout,
                         tensor.packed + schedule.packed_offset(task.batch, task.head, task.begin)});
    }
  });
}

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

// Splits the tiles into `n` runs of about equal work: n + 1 bounds.
std::vector<int64_t> split_tiles(const std::vector<Tile>& tiles, int64_t n) {
  double total = 0;
  for (const Tile& tile : tiles) total += static_cast<double>(tile.n_queries) * tile.n_keys;
  std::vector<int64_t> bounds{0};
  double done = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    done += static_cast<double>(tiles[i].n_queries) * tiles[i].n_keys;
    while (static_cast<int64_t>(bounds.size()) < n && done >= total * bounds.size() / n) bounds.push_back(i + 1);
  }
  bounds.resize(n + 1, static_cast<int64_t>(tiles.size()));
  bounds.back() = static_cast<int64_t>(tiles.size());
  return bounds;
}

// Splits the packed keys of one batch element into `n` slices that about equally many queries read: n + 1 bounds.
std::vector<int32_t> split_keys(const BatchKeys& keys, int64_t n) {
  const TransposedKeyRangeTable readers = transpose(keys.keys.table.view());
  const size_t n_segments = readers.q_offsets.size() - 1;
  std::vector<double> weights(n_segments, 0.0);
  double total = 0;
  for (size_t s = 0; s < n_segments; ++s) {
    for (int32_t r = readers.q_offsets[s]; r < readers.q_offsets[s + 1]; ++r) {
      weights[s] += readers.q_ranges[2 * r + 1] - readers.q_ranges[2 * r];
    }
    total += weights[s] * (readers.k_ranges[2 * s + 1] - readers.k_ranges[2 * s]);
  }
  constexpr int32_t kAlignment = 64;
  std::vector<int32_t> bounds{0};
  double done = 0;
  for (size_t s = 0; s < n_segments; ++s) {
    const int32_t begin = readers.k_ranges[2 * s];
    const double area = weights[s] * (readers.k_ranges[2 * s + 1] - begin);
    while (static_cast<int64_t>(bounds.size()) < n && done + area >= total * bounds.size() / n) {
      const int32_t key = begin + static_cast<int32_t>((total * bounds.size() / n - done) / weights[s]);
      bounds.push_back(std::max(bounds.back(), (key + kAlignment / 2) / kAlignment * kAlignment));
    }
    done += area;
  }
  bounds.resize(n + 1, static_cast<int32_t>(keys.n_rows()));
  for (int32_t& bound : bounds) bound = std::min(bound, static_cast<int32_t>(keys.n_rows()));
  bounds.back() = static_cast<int32_t>(keys.n_rows());
  return bounds;
}

void unpack(const AttentionParams& p, const Schedule& schedule, const Kernels& kernels, const Executor& executor,
            int64_t threads, const char* rows, double scale, void* target) {
  std::vector<std::vector<int32_t>> packed_row;
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<int32_t>& of_batch = packed_row.emplace_back(p.n_keys, -1);
    const std::vector<int32_t>& source = schedule.keys(b).keys.source;
    for (size_t j = 0; j < source.size(); ++j) {
      if (source[j] >= 0) of_batch[source[j]] = static_cast<int32_t>(j);
    }
  }
  const std::vector<RowTask> tasks = row_tasks(p, [&](int64_t) { return p.n_keys; });
  const Strides strides{p.n_keys * p.heads * p.head_dim, p.heads * p.head_dim, p.head_dim};
  for_each_task(executor, threads, static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const RowTask& task = tasks[i];
    char* first = const_cast<char*>(head_start(target, strides, task.batch, task.head, p.dtype));
    const int64_t size = storage_size(p.dtype);
    kernels.unpack_rows({rows + schedule.sum_offset(task.batch, task.head), schedule.sum_row_bytes(),
                         packed_row[task.batch].data() + task.begin, task.end - task.begin, p.head_dim, scale, p.dtype,
                         first + task.begin * strides.token * size, strides.token});
  });
}

}  // namespace

void attention(const AttentionParams& p, const Executor& executor, bool allow_split_float32) {
  const ProductKernels& kernels = selected_products(p.dtype, allow_split_float32);
  const Schedule schedule(p, kernels);
  const int64_t threads = schedule.threads(executor, 4);
  const Buffer k_rows = allocate(schedule.packed_bytes());
  const Buffer v_stack = allocate(schedule.packed_bytes());
  const int64_t scratch_bytes = kernels.forward_scratch_bytes(p.head_dim, p.dtype);
  const Buffer scratch = allocate(threads * scratch_bytes);
  const std::vector<Tile> tiles = schedule.tiles(kernels.forward_tile_queries(p.dtype), /*with_gaps=*/true);

  pack(p, schedule, kernels, executor, threads,
       {{p.k, p.k_strides, PackedLayout::rows, k_rows.get()}, {p.v, p.v_strides, PackedLayout::stack, v_stack.get()}});
  for_each_task(executor, threads, static_cast<int64_t>(tiles.size()), [&](int64_t i, int64_t thread) {
    const Tile& tile = tiles[i];
    if (tile.group == kNoGroup) {
      p.dtype == ScalarType::float64 ? fill_rows_without_keys<double>(p, tile) : fill_rows_without_keys<float>(p, tile);
      return;
    }
    const KeyRangeTableView table = schedule.keys(tile.batch).keys.table.view();
    const int64_t offset = schedule.packed_offset(tile.batch, tile.head);
    kernels.forward_tile({&p, tile.batch, tile.head, tile.q_begin, tile.n_queries, k_rows.get() + offset,
                          v_stack.get() + offset, table.k_ranges + 2 * table.k_offsets[tile.group],
                          table.k_offsets[tile.group + 1] - table.k_offsets[tile.group],
                          scratch.get() + thread * scratch_bytes});
  });
}

// Every thread owns a run of query tiles. The keys are cut into as many slices as there are threads, and in phase s
// thread t meets slice t + s: no two threads ever add to the same row, and every row's sums are formed in one order.
void attention_backward(const AttentionBackwardParams& params, const Executor& executor, bool allow_split_float32) {
  const AttentionParams& p = params.forward;
  const Kernels& vector_kernels = selected_kernels();
  const ProductKernels& kernels = selected_products(p.dtype, allow_split_float32);
  const Schedule schedule(p, kernels);
  const int64_t threads = schedule.threads(executor, 10);
  const bool wants_grad_q = params.grad_q != nullptr || params.grad_q_freqs != nullptr;
  const int64_t grad_q_bytes = p.batch * p.n_queries * p.heads * p.head_dim * working_size(p.dtype);
  const bool sums_in_place =
      params.grad_q != nullptr && (p.dtype == ScalarType::float32 || p.dtype == ScalarType::float64);

  const Buffer k_rows = allocate(schedule.packed_bytes());
  const Buffer v_rows = allocate(schedule.packed_bytes());
  const Buffer own_k_stack = schedule.has_stacks() ? allocate(schedule.packed_bytes()) : nullptr;
  char* const k_stack = own_k_stack ? own_k_stack.get() : k_rows.get();
  const Buffer grad_k_rows = params.grad_k == nullptr ? nullptr : allocate(schedule.sum_bytes());
  const Buffer grad_v_rows = params.grad_v == nullptr ? nullptr : allocate(schedule.sum_bytes());
  const Buffer grad_q_sums = wants_grad_q && !sums_in_place ? allocate(grad_q_bytes) : nullptr;
  const int64_t scratch_bytes = kernels.backward_scratch_bytes(p.head_dim, p.dtype);
  const Buffer scratch = allocate(threads * scratch_bytes);
  char* const grad_q = !wants_grad_q ? nullptr : sums_in_place ? static_cast<char*>(params.grad_q) : grad_q_sums.get();

  const std::vector<Tile> tiles = schedule.tiles(kernels.backward_tile_queries(p.dtype), /*with_gaps=*/false);
  const std::vector<int64_t> tile_bounds = split_tiles(tiles, threads);
  std::vector<std::vector<int32_t>> key_bounds;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (b > 0 && p.key_mask == nullptr) break;
    key_bounds.push_back(split_keys(schedule.keys(b), threads));
  }

  if (grad_q != nullptr) std::memset(grad_q, 0, grad_q_bytes);
  if (grad_k_rows) std::memset(grad_k_rows.get(), 0, schedule.sum_bytes());
  if (grad_v_rows) std::memset(grad_v_rows.get(), 0, schedule.sum_bytes());
  const PackedTensor packed_k{p.k, p.k_strides, PackedLayout::rows, k_rows.get()};
  const PackedTensor packed_v{p.v, p.v_strides, PackedLayout::rows, v_rows.get()};
  const PackedTensor stacked_k{p.k, p.k_strides, PackedLayout::stack, k_stack};
  if (schedule.has_stacks()) {
    pack(p, schedule, kernels, executor, threads, {packed_k, packed_v, stacked_k});
  } else {
    pack(p, schedule, kernels, executor, threads, {packed_k, packed_v});
  }

  for (int64_t phase = 0; phase < threads; ++phase) {
    executor.run(threads, [&](int64_t thread) {
      const int64_t slice = (thread + phase) % threads;
      for (int64_t i = tile_bounds[thread]; i < tile_bounds[thread + 1]; ++i) {
        const Tile& tile = tiles[i];
        const KeyRangeTableView table = schedule.keys(tile.batch).keys.table.view();
        const int64_t offset = schedule.packed_offset(tile.batch, tile.head);
        const int64_t sum_offset = schedule.sum_offset(tile.batch, tile.head);
        const std::vector<int32_t>& bounds = key_bounds[key_bounds.size() == 1 ? 0 : tile.batch];
        kernels.backward_tile(
            {&params, tile.batch, tile.head, tile.q_begin, tile.n_queries, k_rows.get() + offset, k_stack + offset,
             v_rows.get() + offset, table.k_ranges + 2 * table.k_offsets[tile.group],
             table.k_offsets[tile.group + 1] - table.k_offsets[tile.group], bounds[slice], bounds[slice + 1], grad_q,
             grad_k_rows ? grad_k_rows.get() + sum_offset : nullptr,
             grad_v_rows ? grad_v_rows.get() + sum_offset : nullptr, scratch.get() + thread * scratch_bytes});
      }
    });
  }

  if (params.grad_k != nullptr) {
    unpack(p, schedule, vector_kernels, executor, threads, grad_k_rows.get(), p.scale, params.grad_k);
  }
  if (params.grad_v != nullptr) {
    unpack(p, schedule, vector_kernels, executor, threads, grad_v_rows.get(), 1.0, params.grad_v);
  }
  if (wants_grad_q) {
    const int64_t n_tasks = (p.n_queries + kRowsPerPackTask - 1) / kRowsPerPackTask;
    for_each_task(executor, threads, n_tasks, [&](int64_t i, int64_t) {
      vector_kernels.finish_grad_q(
          {&params, grad_q, i * kRowsPerPackTask, std::min((i + 1) * kRowsPerPackTask, p.n_queries)});
    });
  }
}

}  // namespace anchor_attention::cpu
