#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/backward_division.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/key_rows.h"
#include "kernels/cpu/work_plan.h"

namespace anchor_attention::cpu {
namespace {

// What a call does with a tile, of the first derivative or of the second one.
struct Steps {
  const Packing& packing;
  int64_t tile_queries;
  int64_t scratch_bytes;
  double operations_per_score;
  const ProductKernels* products;               // of the first derivative
  const AttentionDoubleBackwardParams* second;  // null: the first derivative
};

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
        layout_(params, steps.second, plan_),
        sum_bytes_(plan_.sum_row_bytes()),
        scratch_bytes_(steps.scratch_bytes),
        scratch_(allocate(threads_ * scratch_bytes_)),
        wants_grad_q_(params.grad_q != nullptr || params.grad_q_freqs != nullptr),
        sums_in_place_(params.grad_q != nullptr &&
                       (p_.dtype == ScalarType::float32 || p_.dtype == ScalarType::float64)) {
    for (int64_t layout = 0; layout < plan_.n_layouts(); ++layout) {
      const CompactedKeys& keys = plan_.keys(layout);
      key_bounds_.push_back(split_keys(keys, threads_));
      has_copies_ = has_copies_ || keys.first_copy < static_cast<int32_t>(keys.source.size());
    }
  }

  void run() {
    const std::vector<int64_t> bounds = group_planes();
    for (size_t i = 0; i + 1 < bounds.size() && !executor_.stops(); ++i) {
      planes_ = {bounds[i], bounds[i + 1]};
      tiles_ = plan_.tiles(planes_, steps_.tile_queries, /*with_gaps=*/false);
      // For all groups what suits the first one that reads any key: it has about as many tiles as the others.
      if (!order_ && !tiles_.empty()) choose_order();
      if (!finishes_tiles_) begin_grad_q();
      order_.value_or(Order::pieces) == Order::pieces ? run_in_pieces() : run_all_keys();
      if (!finishes_tiles_) finish_grad_q();
    }
  }

 private:
  // The heads are processed one after the other, so that packed keys and sums exist for one of them at a time; or in
  // groups of as many as it takes to keep the threads busy between two barriers, of which there are as many as threads,
  // or as take little memory. The last group's end is the last bound.
  std::vector<int64_t> group_planes() const {
    constexpr double kMinOperations = 5e7;  // of a thread between two barriers: some tenths of a millisecond
    constexpr double kMinTiles = 8;         // of a thread: a tile more or less is then a small difference
    constexpr int64_t kMinBytes = 1 << 20;
    const double min_operations = kMinOperations * static_cast<double>(threads_ * threads_);
    const double min_tiles = kMinTiles * static_cast<double>(threads_);
    const int64_t n_queries = p_.n_queries * p_.heads_per_kv_head();
    const int64_t grad_q_bytes =
        wants_grad_q_ && !sums_in_place_ ? n_queries * p_.head_dim * working_size(p_.dtype) : 0;
    const Planes all = plan_.all_planes();
    std::vector<int64_t> bounds{all.begin};
    double operations = 0, tiles = 0;
    int64_t bytes = 0;
    for (int64_t plane = all.begin; plane + 1 < all.end; ++plane) {
      operations += plan_.operations({plane, plane + 1}, steps_.operations_per_score);
      tiles += static_cast<double>(n_queries) / static_cast<double>(steps_.tile_queries);
      bytes += layout_.bytes(plan_.n_rows({plane, plane + 1})) + grad_q_bytes;
      if (threads_ > 1 && (operations < min_operations || tiles < min_tiles || bytes < kMinBytes)) continue;
      bounds.push_back(plane + 1);
      operations = tiles = 0;
      bytes = 0;
    }
    if (all.end > all.begin) bounds.push_back(all.end);
    return bounds;
  }

  enum class Order { pieces, apart, phases };

  void choose_order() {
    order_ = has_few_tiles() ? Order::pieces : has_few_keys() ? Order::apart : Order::phases;
    // The gradient of a factor that heads share is summed in their order.
    finishes_tiles_ = order_ == Order::apart && wants_grad_q_ && params_.grad_q_freqs == nullptr;
  }

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

  // Memory that is fresh costs more to write than to compute on: all threads share it.
  void zero(void* memory, int64_t bytes) const {
    constexpr int64_t kBytesPerTask = 1 << 18;
    for_each_task(executor_, threads_, (bytes + kBytesPerTask - 1) / kBytesPerTask, [&](int64_t i, int64_t) {
      const int64_t begin = i * kBytesPerTask;
      std::memset(static_cast<char*>(memory) + begin, 0, std::min(kBytesPerTask, bytes - begin));
    });
  }

  void begin_grad_q() {
    if (!wants_grad_q_) return;
    if (!sums_in_place_) {
      const int64_t bytes = n_heads() * p_.n_queries * p_.head_dim * working_size(p_.dtype);
      // Freed before it is allocated, so that two groups never take memory at once.
      grad_q_.reset();
      grad_q_ = allocate(bytes);
      zero(grad_q_.get(), bytes);
    } else if (planes_.begin == 0) {
      zero(params_.grad_q, p_.batch * p_.n_queries * p_.heads * p_.head_dim * working_size(p_.dtype));
    }
  }

  // All keys of the planes are packed first, and their sums written to the gradients last.
  void run_all_keys() {
    const int64_t n_rows = plan_.n_rows(planes_), bytes = layout_.bytes(n_rows);
    // Freed before it is allocated, so that two groups never take memory at once.
    key_rows_.reset();
    key_rows_ = allocate(bytes);
    const KeyRows rows = layout_.rows(n_rows, key_rows_.get());
    pack(p_, plan_, planes_, steps_.packing, executor_, threads_, layout_.packed_tensors(rows));
    const int64_t sums = layout_.first_byte_of_sums(n_rows);
    zero(key_rows_.get() + sums, bytes - sums);
    if (order_ == Order::apart) {
      run_apart(rows);
    } else {
      tile_bounds_ = split_tiles(tiles_, threads_);
      for (int64_t phase = 0; phase < threads_; ++phase) run_phase(rows, phase);
    }
    if (rows.grad_k != nullptr) unpack(rows.grad_k, sum_bytes_.k, p_.head_dim, p_.scale, params_.grad_k);
    if (rows.grad_v != nullptr) unpack(rows.grad_v, sum_bytes_.v, p_.value_dim, 1.0, params_.grad_v);
  }

  // Every thread owns a run of query tiles. The keys are cut into as many slices as there are threads, and in phase s
  // thread t works on slice t + s: no two threads ever add to the same row, and every row is summed in a fixed order.
  void run_phase(const KeyRows& rows, int64_t phase) {
    executor_.run(threads_, [&](int64_t thread) {
      const int64_t slice = (thread + phase) % threads_;
      for (int64_t i = tile_bounds_[thread]; i < tile_bounds_[thread + 1] && !executor_.stops(); ++i) {
        const Tile& tile = tiles_[i];
        run_tile(tile, slice_of(tile.batch, slice), thread, grad_q_sums(tile.batch, tile.head, tile.q_begin),
                 grad_q_stride(), rows);
      }
    });
  }

  // Few to a thread, so that they can't be shared equally, or few that read a key, so that packing it is a large part.
  // Gradients of copied keys are added to those of the keys, which may lie in another piece.
  bool has_few_tiles() const {
    const auto n_tiles = static_cast<int64_t>(tiles_.size());
    return !has_copies_ && (n_tiles < 4 * threads_ || n_tiles <= 2 * (planes_.end - planes_.begin));
  }

  // Every thread owns a slice of the keys. It packs as many of them as stay in the cache together with their sums,
  // processes them with all tiles, writes their gradients, and so on: no key comes from memory or goes there twice.
  // Each thread has its own sums of grad_q, which are added in the order of the slices.
  void run_in_pieces() {
    constexpr int64_t kPieceBytes = 1 << 18;
    const int64_t piece_keys = layout_.rows_of(kPieceBytes), piece_bytes = layout_.bytes(piece_keys);
    const int64_t sum_bytes = piece_bytes - layout_.first_byte_of_sums(piece_keys);
    const Buffer pieces = allocate(threads_ * piece_bytes);
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
      char* const base = pieces.get() + thread * piece_bytes;
      const KeyRows rows = layout_.rows(piece_keys, base);
      const std::vector<PackedTensor> tensors = layout_.packed_tensors(rows);
      int64_t first_tile = 0;
      for (int64_t plane = planes_.begin; plane < planes_.end; ++plane) {
        const int64_t batch = plane / p_.kv_heads, kv_head = plane % p_.kv_heads;
        const CompactedKeys& keys = plan_.keys(batch);
        int64_t last_tile = first_tile;
        while (last_tile < n_tiles && plane_of(tiles_[last_tile]) == plane) ++last_tile;
        const std::vector<Piece> cut =
            cut_into_pieces(keys.table.view(), slice_of(batch, thread), piece_keys, tiles_, first_tile, last_tile);
        for (const Piece& piece : cut) {
          if (executor_.stops()) return;
          const int64_t n_rows = piece.keys.end - piece.keys.begin;
          for (const PackedTensor& tensor : tensors) {
            pack_tokens(p_, steps_.packing, tensor, batch, kv_head, keys.source.data() + piece.keys.begin, n_rows,
                        tensor.packed);
          }
          std::memset(base + piece_bytes - sum_bytes, 0, sum_bytes);
          for (const TileRanges& read : piece.tiles) {
            run_tile(tiles_[read.tile], {0, static_cast<int32_t>(n_rows)}, read.ranges.data(),
                     static_cast<int64_t>(read.ranges.size() / 2), thread,
                     wants_grad_q_ ? sums_of(thread, read.tile) : nullptr, p_.head_dim, rows);
          }
          unpack_piece(batch, kv_head, piece.keys, rows);
        }
        // The gradients of keys of which none is read are the first thread's.
        if (keys.source.empty() && thread == 0) unpack_piece(batch, kv_head, {0, 0}, rows);
        first_tile = last_tile;
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
  // threads. A tile reads all its keys at once, so that its gradient can be finished while it is in the cache.
  void run_apart(const KeyRows& rows) {
    if (finishes_tiles_) tiles_ = plan_.tiles(planes_, steps_.tile_queries, /*with_gaps=*/true);
    order_by_queries(tiles_);
    tile_bounds_ = split_tiles(tiles_, threads_);
    const int64_t tile_bytes = finishes_tiles_ ? steps_.tile_queries * p_.head_dim * working_size(p_.dtype) : 0;
    const Buffer tile_sums = allocate(threads_ * tile_bytes);
    const int64_t n_rows = plan_.n_rows(planes_), k_bytes = n_rows * sum_bytes_.k, v_bytes = n_rows * sum_bytes_.v;
    const Buffer k_sums = allocate(rows.grad_k != nullptr ? (threads_ - 1) * k_bytes : 0);
    const Buffer v_sums = allocate(rows.grad_v != nullptr ? (threads_ - 1) * v_bytes : 0);
    const auto sums_of = [](char* first, const Buffer& sums, int64_t bytes, int64_t thread) {
      return first == nullptr || thread == 0 ? first : sums.get() + (thread - 1) * bytes;
    };
    executor_.run(threads_, [&](int64_t thread) {
      KeyRows own = rows;
      own.grad_k = sums_of(rows.grad_k, k_sums, k_bytes, thread);
      own.grad_v = sums_of(rows.grad_v, v_sums, v_bytes, thread);
      if (thread > 0 && own.grad_k != nullptr) std::memset(own.grad_k, 0, k_bytes);
      if (thread > 0 && own.grad_v != nullptr) std::memset(own.grad_v, 0, v_bytes);
      char* const sums = tile_sums.get() + thread * tile_bytes;
      for (int64_t i = tile_bounds_[thread]; i < tile_bounds_[thread + 1] && !executor_.stops(); ++i) {
        const Tile& tile = tiles_[i];
        const KeySlice all{0, static_cast<int32_t>(plan_.keys(tile.batch).source.size())};
        if (!finishes_tiles_) {
          run_tile(tile, all, thread, grad_q_sums(tile.batch, tile.head, tile.q_begin), grad_q_stride(), own);
          continue;
        }
        std::memset(sums, 0, tile_bytes);
        if (tile.group != kNoGroup) run_tile(tile, all, thread, sums, p_.head_dim, own);
        const int64_t end = tile.q_begin + tile.n_queries;
        for (int64_t token = tile.q_begin; token < end; token += steps_.tile_queries) {
          finish_rows(tile.batch, tile.head, token, std::min(token + steps_.tile_queries, end), sums, p_.head_dim);
        }
      }
    });
    for (int64_t thread = 1; thread < threads_; ++thread) {
      const auto add = [&](char* first, const Buffer& sums, int64_t bytes) {
        if (first == nullptr) return;
        const char* source = sums_of(first, sums, bytes, thread);
        p_.dtype == ScalarType::float64 ? add_sums<double>(first, source, bytes)
                                        : add_sums<float>(first, source, bytes);
      };
      add(rows.grad_k, k_sums, k_bytes);
      add(rows.grad_v, v_sums, v_bytes);
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

  KeySlice slice_of(int64_t batch, int64_t slice) const {
    const std::vector<int32_t>& bounds = key_bounds_[plan_.layout(batch)];
    return {bounds[slice], bounds[slice + 1]};
  }

  int64_t plane_of(const Tile& tile) const { return tile.batch * p_.kv_heads + tile.head / p_.heads_per_kv_head(); }

  // A tile against a slice of the planes' keys, whose rows these are.
  void run_tile(const Tile& tile, KeySlice slice, int64_t thread, char* grad_q, int64_t stride,
                const KeyRows& rows) const {
    const KeyRangeTableView table = plan_.keys(tile.batch).table.view();
    if (!reads_any(table, tile.group, slice)) return;
    const int32_t* const ranges = table.k_ranges + 2 * table.k_offsets[tile.group];
    const int64_t n_ranges = table.k_offsets[tile.group + 1] - table.k_offsets[tile.group];
    run_tile(tile, slice, ranges, n_ranges, thread, grad_q, stride,
             layout_.from_row(rows, plan_.first_row(planes_, tile.batch, tile.head)));
  }

  // `rows`: of the keys that the ranges count.
  void run_tile(const Tile& tile, KeySlice slice, const int32_t* ranges, int64_t n_ranges, int64_t thread, char* grad_q,
                int64_t stride, const KeyRows& rows) const {
    const BackwardTile task{
        .params = &params_,
        .batch = tile.batch,
        .head = tile.head,
        .q_begin = tile.q_begin,
        .n_queries = tile.n_queries,
        .k_rows = rows.k,
        .k_stack = rows.k_stack,
        .v_rows = rows.v,
        .key_ranges = ranges,
        .n_key_ranges = n_ranges,
        .key_begin = slice.begin,
        .key_end = slice.end,
        .grad_q = grad_q,
        .grad_q_stride = stride,
        .grad_k_rows = rows.grad_k,
        .grad_v_rows = rows.grad_v,
        .scratch = scratch_.get() + thread * scratch_bytes_,
    };
    if (steps_.second == nullptr) {
      steps_.products->backward_tile(task);
    } else {
      vector_kernels_.derivatives.double_backward_tile({task, steps_.second, rows.k_tangent, rows.v_tangent});
    }
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
      if (of_batch.empty()) of_batch = packed_rows(plan_.keys(plane / p_.kv_heads), p_.n_keys);
    }
    if (has_copies_) {
      p_.dtype == ScalarType::float64 ? add_copies<double>(rows, row_bytes, packed_row)
                                      : add_copies<float>(rows, row_bytes, packed_row);
    }
    const std::vector<RowTask> tasks = row_tasks(planes_, p_.kv_heads, [&](int64_t) { return p_.n_keys; });
    for_each_task(executor_, threads_, static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
      const RowTask& task = tasks[i];
      unpack_tokens(task, packed_row[task.batch].data() + task.begin,
                    rows + plan_.first_row(planes_, task.plane) * row_bytes, row_bytes, head_dim, scale, target);
    });
  }

  // The sums of a piece. Its tokens are those up to the first one of the next piece, be they read or not.
  void unpack_piece(int64_t batch, int64_t kv_head, KeySlice piece, const KeyRows& rows) const {
    const std::vector<int32_t>& source = plan_.keys(batch).source;
    const auto first_token = [&](size_t row) {
      while (row < source.size() && source[row] < 0) ++row;
      return row < source.size() ? source[row] : p_.n_keys;
    };
    const int64_t begin = piece.begin == 0 ? 0 : first_token(piece.begin), end = first_token(piece.end);
    std::vector<int32_t> indices(end - begin, -1);
    for (int32_t row = piece.begin; row < piece.end; ++row) {
      if (source[row] >= 0) indices[source[row] - begin] = row - piece.begin;
    }
    const RowTask task{batch * p_.kv_heads + kv_head, batch, kv_head, begin, end};
    if (rows.grad_k != nullptr) {
      unpack_tokens(task, indices.data(), rows.grad_k, sum_bytes_.k, p_.head_dim, p_.scale, params_.grad_k);
    }
    if (rows.grad_v != nullptr) {
      unpack_tokens(task, indices.data(), rows.grad_v, sum_bytes_.v, p_.value_dim, 1.0, params_.grad_v);
    }
  }

  // `packed_row`: of each token of the task, among `rows`.
  void unpack_tokens(const RowTask& task, const int32_t* packed_row, const char* rows, int64_t row_bytes,
                     int64_t head_dim, double scale, void* target) const {
    const Strides strides{p_.n_keys * p_.kv_heads * head_dim, p_.kv_heads * head_dim, head_dim};
    char* const first = const_cast<char*>(head_start(target, strides, task.batch, task.kv_head, p_.dtype));
    vector_kernels_.unpack_rows({
        .packed = rows,
        .packed_row_bytes = row_bytes,
        .indices = packed_row,
        .n_tokens = task.end - task.begin,
        .head_dim = head_dim,
        .scale = scale,
        .dtype = p_.dtype,
        .target = first + task.begin * strides.token * storage_size(p_.dtype),
        .target_stride = strides.token,
    });
  }

  void finish_grad_q() const {
    if (!wants_grad_q_) return;
    const int64_t tokens_per_task = 256;
    const int64_t n_tasks = (p_.n_queries + tokens_per_task - 1) / tokens_per_task;
    for_each_task(executor_, threads_, n_tasks, [&](int64_t i, int64_t) {
      const int64_t begin = i * tokens_per_task, end = std::min(begin + tokens_per_task, p_.n_queries);
      for (int64_t index = first_head(); index < first_head() + n_heads(); ++index) {
        const int64_t batch = index / p_.heads, head = index % p_.heads;
        finish_rows(batch, head, begin, end, grad_q_sums(batch, head, begin), grad_q_stride());
      }
    });
  }

  void finish_rows(int64_t batch, int64_t head, int64_t begin, int64_t end, const char* sums, int64_t stride) const {
    vector_kernels_.finish_grad_q({&params_, batch, head, begin, end, sums, stride});
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  const Executor& executor_;
  const Kernels& vector_kernels_;
  const Steps steps_;
  const WorkPlan plan_;
  const int64_t threads_;
  const KeyRowLayout layout_;
  const RowBytes sum_bytes_;
  const int64_t scratch_bytes_;
  const Buffer scratch_;
  const bool wants_grad_q_;
  const bool sums_in_place_;
  std::vector<std::vector<int32_t>> key_bounds_;  // of each layout, n_threads + 1
  bool has_copies_ = false;
  std::optional<Order> order_;
  bool finishes_tiles_ = false;  // of grad_q, tile by tile

  // Of the group in work.
  Planes planes_{};
  std::vector<Tile> tiles_;
  std::vector<int64_t> tile_bounds_;
  Buffer key_rows_, grad_q_;
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
