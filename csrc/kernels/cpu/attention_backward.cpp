#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/work_plan.h"

namespace anchor_attention::cpu {
namespace {

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
std::vector<int32_t> split_keys(const CompactedKeys& keys, int64_t n) {
  const std::vector<KeyReaders> readers = count_readers(keys.table.view());
  double total = 0;
  for (const KeyReaders& r : readers) total += static_cast<double>(r.n_queries) * (r.end - r.begin);
  constexpr int32_t kAlignment = 64;
  const auto n_rows = static_cast<int32_t>(keys.source.size());
  std::vector<int32_t> bounds{0};
  double done = 0;
  for (const KeyReaders& r : readers) {
    const double n_queries = static_cast<double>(r.n_queries), area = n_queries * (r.end - r.begin);
    while (static_cast<int64_t>(bounds.size()) < n && done + area >= total * bounds.size() / n) {
      const int32_t key = r.begin + static_cast<int32_t>((total * bounds.size() / n - done) / n_queries);
      bounds.push_back(std::max(bounds.back(), (key + kAlignment / 2) / kAlignment * kAlignment));
    }
    done += area;
  }
  bounds.resize(n + 1, n_rows);
  for (int32_t& bound : bounds) bound = std::min(bound, n_rows);
  bounds.back() = n_rows;
  return bounds;
}

bool reads_any(const KeyRangeTableView& table, int32_t group, int32_t key_begin, int32_t key_end) {
  for (int32_t r = table.k_offsets[group]; r < table.k_offsets[group + 1]; ++r) {
    if (table.k_ranges[2 * r] < key_end && table.k_ranges[2 * r + 1] > key_begin) return true;
  }
  return false;
}

// What a call does with a tile, of the first derivative or of the second one.
struct Steps {
  const Packing& packing;
  int64_t tile_queries;
  int64_t scratch_bytes;
  double operations_per_score;
  const ProductKernels* products;               // of the first derivative
  const AttentionDoubleBackwardParams* second;  // null: the first derivative
};

// The heads are processed one after the other, so that packed keys and sums exist for one of them at a time; or in
// groups of as many as it takes to keep the threads busy between two barriers, of which there are as many as threads.
// The last group's end is the last bound.
std::vector<int64_t> group_planes(const AttentionParams& p, const WorkPlan& plan, const Steps& steps, int64_t threads) {
  constexpr double kMinOperations = 5e7;  // of a thread between two barriers: some tenths of a millisecond
  constexpr double kMinTiles = 8;         // of a thread: a tile more or less is then a small difference
  const double min_operations = kMinOperations * static_cast<double>(threads * threads);
  const double min_tiles = kMinTiles * static_cast<double>(threads);
  const Planes all = plan.all_planes();
  std::vector<int64_t> bounds{all.begin};
  double operations = 0, tiles = 0;
  for (int64_t plane = all.begin; plane + 1 < all.end; ++plane) {
    operations += plan.operations({plane, plane + 1}, steps.operations_per_score);
    tiles += static_cast<double>(p.n_queries * p.heads_per_kv_head()) / static_cast<double>(steps.tile_queries);
    if (threads > 1 && (operations < min_operations || tiles < min_tiles)) continue;
    bounds.push_back(plane + 1);
    operations = tiles = 0;
  }
  if (all.end > all.begin) bounds.push_back(all.end);
  return bounds;
}

// One call of the backward: its buffers, and its steps for a group of planes.
class Backward {
 public:
  Backward(const AttentionBackwardParams& params, const Executor& executor, const Steps& steps)
      : params_(params),
        p_(params.forward),
        executor_(executor),
        vector_kernels_(selected_kernels()),
        steps_(steps),
        plan_(p_, steps.packing),
        threads_(plan_.threads(executor, steps.operations_per_score)),
        row_bytes_(plan_.packed_row_bytes()),
        sum_bytes_(plan_.sum_row_bytes()),
        scratch_bytes_(steps.scratch_bytes),
        scratch_(allocate(threads_ * scratch_bytes_)),
        wants_grad_q_(params.grad_q != nullptr || params.grad_q_freqs != nullptr),
        sums_in_place_(params.grad_q != nullptr &&
                       (p_.dtype == ScalarType::float32 || p_.dtype == ScalarType::float64)) {
    for (int64_t layout = 0; layout < plan_.n_layouts(); ++layout) {
      key_bounds_.push_back(split_keys(plan_.keys(layout), threads_));
    }
  }

  void run() {
    const std::vector<int64_t> bounds = group_planes(p_, plan_, steps_, threads_);
    for (size_t i = 0; i + 1 < bounds.size() && !executor_.stops(); ++i) {
      planes_ = {bounds[i], bounds[i + 1]};
      begin_group();
      if (has_few_tiles()) {
        run_slices();
      } else if (has_few_keys()) {
        run_apart();
      } else {
        for (int64_t phase = 0; phase < threads_; ++phase) run_phase(phase);
      }
      if (params_.grad_k != nullptr) unpack(grad_k_rows_.get(), sum_bytes_.k, p_.head_dim, p_.scale, params_.grad_k);
      if (params_.grad_v != nullptr) unpack(grad_v_rows_.get(), sum_bytes_.v, p_.value_dim, 1.0, params_.grad_v);
      if (wants_grad_q_) finish_grad_q();
    }
  }

 private:
  // Sums of grad_q: in the gradient itself, or [heads of the planes, n_queries, head_dim].
  int64_t grad_q_stride() const { return sums_in_place_ ? p_.heads * p_.head_dim : p_.head_dim; }

  // Heads of queries are counted as planes are.
  int64_t first_head() const { return planes_.begin * p_.heads_per_kv_head(); }
  int64_t n_heads() const { return (planes_.end - planes_.begin) * p_.heads_per_kv_head(); }

  char* grad_q_sums(int64_t batch, int64_t head, int64_t token) const {
    if (!wants_grad_q_) return nullptr;
    const int64_t row = sums_in_place_ ? (batch * p_.n_queries + token) * p_.heads + head
                                       : (batch * p_.heads + head - first_head()) * p_.n_queries + token;
    char* const base = sums_in_place_ ? static_cast<char*>(params_.grad_q) : grad_q_.get();
    return base + row * p_.head_dim * working_size(p_.dtype);
  }

  // Frees before it allocates, so that two groups never take memory at once.
  static void reserve(Buffer& buffer, int64_t bytes) {
    buffer.reset();
    buffer = allocate(bytes);
  }

  void begin_group() {
    const int64_t n_rows = plan_.n_rows(planes_);
    reserve(k_rows_, n_rows * row_bytes_.k);
    reserve(v_rows_, n_rows * row_bytes_.v);
    const PackedTensor k{p_.k, p_.k_strides, p_.head_dim, PackedLayout::rows, k_rows_.get(), row_bytes_.k};
    const PackedTensor v{p_.v, p_.v_strides, p_.value_dim, PackedLayout::rows, v_rows_.get(), row_bytes_.v};
    std::vector<PackedTensor> tensors{k, v};
    if (plan_.has_stacks()) {
      reserve(k_stack_, n_rows * row_bytes_.k);
      tensors.push_back({p_.k, p_.k_strides, p_.head_dim, PackedLayout::stack, k_stack_.get(), row_bytes_.k});
    }
    const auto add_tangent = [&](const Tangents& tangent, int64_t head_dim, Buffer& rows, int64_t bytes) {
      if (tangent.data == nullptr) return;
      reserve(rows, n_rows * bytes);
      tensors.push_back({tangent.data, tangent.strides, head_dim, PackedLayout::rows, rows.get(), bytes});
    };
    if (steps_.second != nullptr) {
      add_tangent(steps_.second->k_tangent, p_.head_dim, k_tangent_rows_, row_bytes_.k);
      add_tangent(steps_.second->v_tangent, p_.value_dim, v_tangent_rows_, row_bytes_.v);
    }
    pack(p_, plan_, planes_, steps_.packing, executor_, threads_, tensors);
    const auto begin_sums = [&](const void* gradient, Buffer& rows, int64_t bytes) {
      if (gradient == nullptr) return;
      reserve(rows, bytes);
      std::memset(rows.get(), 0, bytes);
    };
    begin_sums(params_.grad_k, grad_k_rows_, n_rows * sum_bytes_.k);
    begin_sums(params_.grad_v, grad_v_rows_, n_rows * sum_bytes_.v);
    if (wants_grad_q_ && !sums_in_place_) {
      const int64_t bytes = n_heads() * p_.n_queries * p_.head_dim * working_size(p_.dtype);
      reserve(grad_q_, bytes);
      std::memset(grad_q_.get(), 0, bytes);
    } else if (wants_grad_q_ && planes_.begin == 0) {
      std::memset(params_.grad_q, 0, p_.batch * p_.n_queries * p_.heads * p_.head_dim * working_size(p_.dtype));
    }
    tiles_ = plan_.tiles(planes_, steps_.tile_queries, /*with_gaps=*/false);
    tile_bounds_ = split_tiles(tiles_, threads_);
  }

  // Every thread owns a run of query tiles. The keys are cut into as many slices as there are threads, and in phase s
  // thread t works on slice t + s: no two threads ever add to the same row, and every row is summed in a fixed order.
  void run_phase(int64_t phase) {
    executor_.run(threads_, [&](int64_t thread) {
      const int64_t slice = (thread + phase) % threads_;
      for (int64_t i = tile_bounds_[thread]; i < tile_bounds_[thread + 1] && !executor_.stops(); ++i) {
        const Tile& tile = tiles_[i];
        run_tile(tile, slice_of(tile, slice), thread, grad_q_sums(tile.batch, tile.head, tile.q_begin), grad_q_stride(),
                 grad_k_rows_.get(), grad_v_rows_.get());
      }
    });
  }

  // Too few tiles to give each thread about as many.
  bool has_few_tiles() const { return threads_ > 1 && static_cast<int64_t>(tiles_.size()) < 4 * threads_; }

  // Every thread owns a slice of the keys, which it processes with all tiles. Each has its own sums of grad_q, which
  // are added in the order of the slices.
  void run_slices() {
    const int64_t tile_rows = steps_.tile_queries;
    const int64_t tile_bytes = tile_rows * p_.head_dim * working_size(p_.dtype);
    const auto n_tiles = static_cast<int64_t>(tiles_.size());
    const int64_t bytes = wants_grad_q_ ? threads_ * n_tiles * tile_bytes : 0;
    const Buffer sums = allocate(bytes);
    std::memset(sums.get(), 0, bytes);
    const auto sums_of = [&](int64_t slice, int64_t tile) {
      return sums.get() + (slice * n_tiles + tile) * tile_bytes;
    };
    executor_.run(threads_, [&](int64_t thread) {
      for (int64_t i = 0; i < n_tiles && !executor_.stops(); ++i) {
        run_tile(tiles_[i], slice_of(tiles_[i], thread), thread, wants_grad_q_ ? sums_of(thread, i) : nullptr,
                 p_.head_dim, grad_k_rows_.get(), grad_v_rows_.get());
      }
    });
    if (!wants_grad_q_) return;
    for_each_task(executor_, threads_, n_tiles, [&](int64_t i, int64_t) {
      for (int64_t slice = 0; slice < threads_; ++slice) {
        p_.dtype == ScalarType::float64 ? add_grad_q<double>(tiles_[i], sums_of(slice, i))
                                        : add_grad_q<float>(tiles_[i], sums_of(slice, i));
      }
    });
  }

  // Too few keys for slices that make up for the set-up of a tile, which every slice of its keys repeats.
  bool has_few_keys() const {
    constexpr int64_t kMinSliceKeys = 1024;
    const int64_t planes = planes_.end - planes_.begin, rows = plan_.n_rows(planes_);
    // Sums of every thread take no more memory than the queries.
    return threads_ > 1 && rows < kMinSliceKeys * threads_ * planes && rows * threads_ <= p_.n_queries * n_heads();
  }

  // Every thread owns a run of query tiles, and sums of all keys' gradients, which are added in the order of the
  // threads.
  void run_apart() {
    const int64_t n_rows = plan_.n_rows(planes_), k_bytes = n_rows * sum_bytes_.k, v_bytes = n_rows * sum_bytes_.v;
    const Buffer k_sums = allocate(grad_k_rows_ ? (threads_ - 1) * k_bytes : 0);
    const Buffer v_sums = allocate(grad_v_rows_ ? (threads_ - 1) * v_bytes : 0);
    const auto sums_of = [](const Buffer& rows, const Buffer& sums, int64_t bytes, int64_t thread) -> char* {
      return !rows ? nullptr : thread == 0 ? rows.get() : sums.get() + (thread - 1) * bytes;
    };
    executor_.run(threads_, [&](int64_t thread) {
      char* const grad_k = sums_of(grad_k_rows_, k_sums, k_bytes, thread);
      char* const grad_v = sums_of(grad_v_rows_, v_sums, v_bytes, thread);
      if (thread > 0 && grad_k != nullptr) std::memset(grad_k, 0, k_bytes);
      if (thread > 0 && grad_v != nullptr) std::memset(grad_v, 0, v_bytes);
      for (int64_t i = tile_bounds_[thread]; i < tile_bounds_[thread + 1] && !executor_.stops(); ++i) {
        const Tile& tile = tiles_[i];
        const auto n_rows = static_cast<int32_t>(plan_.keys(tile.batch).source.size());
        run_tile(tile, {0, n_rows}, thread, grad_q_sums(tile.batch, tile.head, tile.q_begin), grad_q_stride(), grad_k,
                 grad_v);
      }
    });
    for (int64_t thread = 1; thread < threads_; ++thread) {
      const auto add = [&](const Buffer& rows, const Buffer& sums, int64_t bytes) {
        if (!rows) return;
        const char* source = sums_of(rows, sums, bytes, thread);
        p_.dtype == ScalarType::float64 ? add_sums<double>(rows.get(), source, bytes)
                                        : add_sums<float>(rows.get(), source, bytes);
      };
      add(grad_k_rows_, k_sums, k_bytes);
      add(grad_v_rows_, v_sums, v_bytes);
    }
  }

  template <typename T>
  void add_sums(char* rows, const char* sums, int64_t bytes) const {
    T* target = reinterpret_cast<T*>(rows);
    const T* source = reinterpret_cast<const T*>(sums);
    for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(T)); ++i) target[i] += source[i];
  }

  template <typename T>
  void add_grad_q(const Tile& tile, const char* sums) const {
    T* target = reinterpret_cast<T*>(grad_q_sums(tile.batch, tile.head, tile.q_begin));
    const T* rows = reinterpret_cast<const T*>(sums);
    for (int64_t i = 0; i < tile.n_queries; ++i) {
      for (int64_t d = 0; d < p_.head_dim; ++d) target[i * grad_q_stride() + d] += rows[i * p_.head_dim + d];
    }
  }

  struct KeySlice {
    int32_t begin;
    int32_t end;
  };

  KeySlice slice_of(const Tile& tile, int64_t slice) const {
    const std::vector<int32_t>& bounds = key_bounds_[plan_.layout(tile.batch)];
    return {bounds[slice], bounds[slice + 1]};
  }

  // `grad_k` and `grad_v` are sums for the planes of the group, or null.
  void run_tile(const Tile& tile, KeySlice slice, int64_t thread, char* grad_q, int64_t stride, char* grad_k,
                char* grad_v) const {
    const KeyRangeTableView table = plan_.keys(tile.batch).table.view();
    if (!reads_any(table, tile.group, slice.begin, slice.end)) return;
    const int64_t row = plan_.first_row(planes_, tile.batch, tile.head);
    const BackwardTile task{
        .params = &params_,
        .batch = tile.batch,
        .head = tile.head,
        .q_begin = tile.q_begin,
        .n_queries = tile.n_queries,
        .k_rows = k_rows_.get() + row * row_bytes_.k,
        .k_stack = (plan_.has_stacks() ? k_stack_ : k_rows_).get() + row * row_bytes_.k,
        .v_rows = v_rows_.get() + row * row_bytes_.v,
        .key_ranges = table.k_ranges + 2 * table.k_offsets[tile.group],
        .n_key_ranges = table.k_offsets[tile.group + 1] - table.k_offsets[tile.group],
        .key_begin = slice.begin,
        .key_end = slice.end,
        .grad_q = grad_q,
        .grad_q_stride = stride,
        .grad_k_rows = grad_k == nullptr ? nullptr : grad_k + row * sum_bytes_.k,
        .grad_v_rows = grad_v == nullptr ? nullptr : grad_v + row * sum_bytes_.v,
        .scratch = scratch_.get() + thread * scratch_bytes_,
    };
    if (steps_.second == nullptr) {
      steps_.products->backward_tile(task);
      return;
    }
    const auto rows_of = [&](const Buffer& rows, int64_t bytes) { return rows ? rows.get() + row * bytes : nullptr; };
    vector_kernels_.derivatives.double_backward_tile(
        {task, steps_.second, rows_of(k_tangent_rows_, row_bytes_.k), rows_of(v_tangent_rows_, row_bytes_.v)});
  }

  // The packed row of every token of a batch element, below 0 where it has none.
  std::vector<int32_t> packed_rows(int64_t batch) const {
    std::vector<int32_t> rows(p_.n_keys, -1);
    const CompactedKeys& keys = plan_.keys(batch);
    for (int32_t j = 0; j < keys.first_copy; ++j) {
      if (keys.source[j] >= 0) rows[keys.source[j]] = j;
    }
    return rows;
  }

  // Adds the sums of copied keys to those of the keys, in their order.
  template <typename T>
  void add_copies(char* rows, int64_t row_bytes, const std::vector<std::vector<int32_t>>& packed_row) const {
    const int64_t length = row_bytes / static_cast<int64_t>(sizeof(T));
    for_each_task(executor_, threads_, planes_.end - planes_.begin, [&](int64_t i, int64_t) {
      const int64_t plane = planes_.begin + i, batch = plane / p_.kv_heads;
      T* sums = reinterpret_cast<T*>(rows + plan_.first_row(planes_, plane) * row_bytes);
      const CompactedKeys& keys = plan_.keys(batch);
      for (size_t j = keys.first_copy; j < keys.source.size(); ++j) {
        if (keys.source[j] < 0) continue;
        T* target = sums + packed_row[batch][keys.source[j]] * length;
        for (int64_t d = 0; d < length; ++d) target[d] += sums[j * length + d];
      }
    });
  }

  void unpack(char* rows, int64_t row_bytes, int64_t head_dim, double scale, void* target) const {
    std::vector<std::vector<int32_t>> packed_row(p_.batch);
    for (int64_t plane = planes_.begin; plane < planes_.end; ++plane) {
      std::vector<int32_t>& of_batch = packed_row[plane / p_.kv_heads];
      if (of_batch.empty()) of_batch = packed_rows(plane / p_.kv_heads);
    }
    p_.dtype == ScalarType::float64 ? add_copies<double>(rows, row_bytes, packed_row)
                                    : add_copies<float>(rows, row_bytes, packed_row);
    const std::vector<RowTask> tasks = row_tasks(planes_, p_.kv_heads, [&](int64_t) { return p_.n_keys; });
    const Strides strides{p_.n_keys * p_.kv_heads * head_dim, p_.kv_heads * head_dim, head_dim};
    for_each_task(executor_, threads_, static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
      const RowTask& task = tasks[i];
      char* first = const_cast<char*>(head_start(target, strides, task.batch, task.kv_head, p_.dtype));
      vector_kernels_.unpack_rows({
          .packed = rows + plan_.first_row(planes_, task.plane) * row_bytes,
          .packed_row_bytes = row_bytes,
          .indices = packed_row[task.batch].data() + task.begin,
          .n_tokens = task.end - task.begin,
          .head_dim = head_dim,
          .scale = scale,
          .dtype = p_.dtype,
          .target = first + task.begin * strides.token * storage_size(p_.dtype),
          .target_stride = strides.token,
      });
    });
  }

  void finish_grad_q() const {
    const int64_t tokens_per_task = 256;
    const int64_t n_tasks = (p_.n_queries + tokens_per_task - 1) / tokens_per_task;
    for_each_task(executor_, threads_, n_tasks, [&](int64_t i, int64_t) {
      const int64_t begin = i * tokens_per_task, end = std::min(begin + tokens_per_task, p_.n_queries);
      for (int64_t index = first_head(); index < first_head() + n_heads(); ++index) {
        const int64_t batch = index / p_.heads, head = index % p_.heads;
        vector_kernels_.finish_grad_q(
            {&params_, batch, head, begin, end, grad_q_sums(batch, head, begin), grad_q_stride()});
      }
    });
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  const Executor& executor_;
  const Kernels& vector_kernels_;
  const Steps steps_;
  const WorkPlan plan_;
  const int64_t threads_;
  const RowBytes row_bytes_;
  const RowBytes sum_bytes_;
  const int64_t scratch_bytes_;
  const Buffer scratch_;
  const bool wants_grad_q_;
  const bool sums_in_place_;
  std::vector<std::vector<int32_t>> key_bounds_;  // of each layout, n_threads + 1

  // Of the group in work.
  Planes planes_{};
  std::vector<Tile> tiles_;
  std::vector<int64_t> tile_bounds_;
  Buffer k_rows_, v_rows_, k_stack_, k_tangent_rows_, v_tangent_rows_, grad_k_rows_, grad_v_rows_, grad_q_;
};

}  // namespace

void attention_backward(const AttentionBackwardParams& params, const Executor& executor, bool allow_split_float32) {
  const ProductKernels& products = suitable_products(params.forward, allow_split_float32);
  Backward(params, executor,
           {.packing = products.packing,
            .tile_queries = products.backward_tile_queries(params.forward.dtype),
            .scratch_bytes = products.backward_scratch_bytes(params.forward),
            .operations_per_score = 10,
            .products = &products,
            .second = nullptr})
      .run();
}

void attention_double_backward(const AttentionDoubleBackwardParams& params, const Executor& executor) {
  const DerivativeKernels& kernels = selected_kernels().derivatives;
  const AttentionParams& p = params.backward.forward;
  Backward(params.backward, executor,
           {.packing = kernels.packing,
            .tile_queries = kernels.tile_queries(p.dtype),
            .scratch_bytes = kernels.double_backward_scratch_bytes(p),
            .operations_per_score = 20,
            .products = nullptr,
            .second = &params})
      .run();
}

}  // namespace anchor_attention::cpu
