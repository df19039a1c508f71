#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/work_plan.h"

namespace anchor_attention::cpu {
namespace {

template <typename T>
void fill_rows_without_keys(const AttentionParams& p, const Tile& tile) {
  const int64_t size = storage_size(p.dtype);
  for (int64_t i = tile.q_begin; i < tile.q_begin + tile.n_queries; ++i) {
    const int64_t row = (tile.batch * p.n_queries + i) * p.heads + tile.head;
    std::memset(static_cast<char*>(p.out) + row * p.value_dim * size, 0, p.value_dim * size);
  }
  T* lse = static_cast<T*>(p.lse) + (static_cast<int64_t>(tile.batch) * p.heads + tile.head) * p.n_queries;
  std::fill_n(lse + tile.q_begin, tile.n_queries, -std::numeric_limits<T>::infinity());
}

// A tile, or where there are few tiles, some of the keys of one.
struct Item {
  int64_t tile;
  int64_t part;     // its number among all parts
  int32_t index;    // of the part in its tile
  int32_t n_parts;  // of its tile
};

// One call of the forward.
class Forward {
 public:
  Forward(const AttentionParams& params, const Executor& executor, bool allow_split_float32)
      : p_(params),
        executor_(executor),
        kernels_(suitable_products(params, allow_split_float32)),
        plan_(params, kernels_.packing),
        row_bytes_(plan_.packed_row_bytes()),
        threads_(plan_.threads(executor, 4)),
        planes_(plan_.all_planes()),
        tile_queries_(kernels_.forward_tile_queries(params)),
        tiles_(plan_.tiles(planes_, tile_queries_, /*with_gaps=*/true)) {
    double reads = 0;
    for (const Tile& tile : tiles_) reads += static_cast<double>(tile.n_keys);
    // Packing all keys for all tiles writes them to memory and reads them back; packing a few of them at a time into
    // the cache of the core that needs them does not, but is done again for every tile.
    constexpr double kMaxPackings = 2;
    packs_per_tile_ = reads <= kMaxPackings * static_cast<double>(plan_.n_rows(planes_));
    constexpr int64_t kPieceBytes = 1 << 17;
    const int64_t key_bytes = row_bytes_.k + row_bytes_.v;
    piece_rows_ = std::max(kPieceBytes / key_bytes / kCutKeys, int64_t{1}) * kCutKeys;
    scratch_bytes_ = kernels_.forward_scratch_bytes(p_);
    thread_bytes_ = scratch_bytes_ + (packs_per_tile_ ? piece_rows_ * key_bytes : 0);
    scratch_ = allocate(threads_ * thread_bytes_);
  }

  void run() {
    if (!packs_per_tile_) {
      k_rows_ = allocate(plan_.n_rows(planes_) * row_bytes_.k);
      v_stack_ = allocate(plan_.n_rows(planes_) * row_bytes_.v);
      pack(p_, plan_, planes_, kernels_.packing, executor_, threads_,
           {{p_.k, p_.k_strides, p_.head_dim, PackedLayout::rows, k_rows_.get(), row_bytes_.k},
            {p_.v, p_.v_strides, p_.value_dim, PackedLayout::stack, v_stack_.get(), row_bytes_.v}});
    }
    const int64_t row_bytes = (p_.value_dim + 1) * working_size(p_.dtype);
    const std::vector<Item> items = make_items();
    parts_ = allocate(n_parts_ * tile_queries_ * row_bytes);
    for_each_task(executor_, threads_, static_cast<int64_t>(items.size()),
                  [&](int64_t i, int64_t thread) { run_item(items[i], scratch_.get() + thread * thread_bytes_); });
    std::vector<Item> split;
    for (const Item& item : items) {
      if (item.n_parts > 1 && item.index == 0) split.push_back(item);
    }
    for_each_task(executor_, threads_, static_cast<int64_t>(split.size()), [&](int64_t i, int64_t) {
      p_.dtype == ScalarType::float64 ? merge_parts<double>(split[i]) : merge_parts<float>(split[i]);
    });
  }

 private:
  // With fewer tiles than it takes to keep the threads busy, the keys of each are split, in a way that depends only on
  // the shapes and on the number of threads.
  std::vector<Item> make_items() {
    constexpr int64_t kItemsPerThread = 4, kMinKeys = 512;
    const auto wanted = threads_ > 1 ? kItemsPerThread * threads_ : 1;
    const auto n_tiles = static_cast<int64_t>(tiles_.size());
    std::vector<Item> items;
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      const int64_t useful = std::max<int64_t>(tiles_[tile].n_keys / kMinKeys, 1);
      const auto n_parts = static_cast<int32_t>(std::min((wanted + n_tiles - 1) / n_tiles, useful));
      for (int32_t index = 0; index < n_parts; ++index) {
        items.push_back({tile, n_parts > 1 ? n_parts_++ : 0, index, n_parts});
      }
    }
    return items;
  }

  // The key ranges of a part: those of its tile, one after the other, cut into equally long pieces.
  std::vector<int32_t> ranges_of(const Item& item) const {
    const Tile& tile = tiles_[item.tile];
    const KeyRangeTableView table = plan_.keys(tile.batch).table.view();
    const int32_t* first = table.k_ranges + 2 * table.k_offsets[tile.group];
    const int32_t* last = table.k_ranges + 2 * table.k_offsets[tile.group + 1];
    if (item.n_parts == 1) return {first, last};
    const int64_t begin = tile.n_keys * item.index / item.n_parts, end = tile.n_keys * (item.index + 1) / item.n_parts;
    std::vector<int32_t> ranges;
    int64_t passed = 0;
    for (const int32_t* range = first; range < last; range += 2) {
      const int64_t length = range[1] - range[0];
      const auto cut = [&](int64_t bound) {
        const int64_t at = std::clamp<int64_t>(bound - passed, 0, length);
        return static_cast<int32_t>(range[0] + (at == length ? at : at / kCutKeys * kCutKeys));
      };
      if (cut(begin) < cut(end)) ranges.insert(ranges.end(), {cut(begin), cut(end)});
      passed += length;
    }
    return ranges;
  }

  template <typename T>
  T* partial_out(int64_t part) const {
    return reinterpret_cast<T*>(parts_.get()) + part * tile_queries_ * p_.value_dim;
  }

  template <typename T>
  T* partial_lse(int64_t part) const {
    return partial_out<T>(n_parts_) + part * tile_queries_;
  }

  void run_item(const Item& item, char* scratch) const {
    const Tile& tile = tiles_[item.tile];
    const bool wide = p_.dtype == ScalarType::float64;
    if (tile.group == kNoGroup) {
      wide ? fill_rows_without_keys<double>(p_, tile) : fill_rows_without_keys<float>(p_, tile);
      return;
    }
    const std::vector<int32_t> ranges = ranges_of(item);
    const int64_t first_row = plan_.first_row(planes_, tile.batch, tile.head);
    ForwardTile task{.params = &p_,
                     .batch = tile.batch,
                     .head = tile.head,
                     .q_begin = tile.q_begin,
                     .n_queries = tile.n_queries,
                     .k_rows = packs_per_tile_ ? nullptr : k_rows_.get() + first_row * row_bytes_.k,
                     .v_stack = packs_per_tile_ ? nullptr : v_stack_.get() + first_row * row_bytes_.v,
                     .key_ranges = ranges.data(),
                     .n_key_ranges = static_cast<int64_t>(ranges.size() / 2),
                     .scratch = scratch};
    if (item.n_parts > 1) {
      task.partial_out = wide ? static_cast<void*>(partial_out<double>(item.part)) : partial_out<float>(item.part);
      task.partial_lse = wide ? static_cast<void*>(partial_lse<double>(item.part)) : partial_lse<float>(item.part);
    }
    packs_per_tile_ ? run_in_pieces(task, ranges, scratch + scratch_bytes_) : kernels_.forward_tile(task);
  }

  // Packs as many keys as fit into the cache together with the tile, runs the tile over them, and so on.
  void run_in_pieces(ForwardTile task, const std::vector<int32_t>& ranges, char* packed) const {
    const int64_t alignment = kernels_.packing.key_alignment(p_.dtype);
    const int64_t kv_head = task.head / p_.heads_per_kv_head();
    const int32_t* source = plan_.keys(task.batch).source.data();
    char* const v_packed = packed + piece_rows_ * row_bytes_.k;
    task.k_rows = packed;
    task.v_stack = v_packed;
    task.last = false;
    std::vector<int32_t> piece;
    int64_t rows = 0;
    const auto run_piece = [&] {
      task.key_ranges = piece.data();
      task.n_key_ranges = static_cast<int64_t>(piece.size() / 2);
      kernels_.forward_tile(task);
      task.first = false;
      piece.clear();
      rows = 0;
    };
    const auto pack_piece = [&](const PackedTensor& tensor, int64_t key, int64_t n) {
      pack_tokens(p_, kernels_.packing, tensor, task.batch, kv_head, source + key, n,
                  tensor.packed + rows * tensor.row_bytes);
    };
    for (size_t r = 0; r < ranges.size(); r += 2) {
      for (int64_t key = ranges[r]; key < ranges[r + 1];) {
        const int64_t n = std::min(ranges[r + 1] - key, piece_rows_ - rows);
        const int64_t n_aligned = (n + alignment - 1) / alignment * alignment;
        pack_piece({p_.k, p_.k_strides, p_.head_dim, PackedLayout::rows, packed, row_bytes_.k}, key, n_aligned);
        pack_piece({p_.v, p_.v_strides, p_.value_dim, PackedLayout::stack, v_packed, row_bytes_.v}, key, n_aligned);
        piece.insert(piece.end(), {static_cast<int32_t>(rows), static_cast<int32_t>(rows + n)});
        rows += n_aligned;
        key += n;
        if (rows == piece_rows_) run_piece();
      }
    }
    task.last = true;
    run_piece();
  }

  // Softmax over all keys from those over the parts, weighted by their sums, in the order of the parts.
  template <typename T>
  void merge_parts(const Item& first) const {
    const Tile& tile = tiles_[first.tile];
    T* lse = static_cast<T*>(p_.lse) + (tile.batch * p_.heads + tile.head) * p_.n_queries + tile.q_begin;
    for (int64_t i = 0; i < tile.n_queries; ++i) {
      T max = -std::numeric_limits<T>::infinity();
      for (int32_t part = 0; part < first.n_parts; ++part) max = std::max(max, partial_lse<T>(first.part + part)[i]);
      // A finite reference where there is no score: then weights and outputs are 0, as without keys.
      const T reference = max == -std::numeric_limits<T>::infinity() ? T(0) : max;
      T sum = 0;
      T* out = partial_out<T>(first.part) + i * p_.value_dim;
      for (int32_t part = 0; part < first.n_parts; ++part) {
        const T weight = std::exp(partial_lse<T>(first.part + part)[i] - reference);
        const T* row = partial_out<T>(first.part + part) + i * p_.value_dim;
        for (int64_t d = 0; d < p_.value_dim; ++d) out[d] = (part == 0 ? T(0) : out[d]) + weight * row[d];
        sum += weight;
      }
      const T inverse = sum == 0 ? T(0) : 1 / sum;
      for (int64_t d = 0; d < p_.value_dim; ++d) out[d] *= inverse;
      lse[i] = reference + std::log(sum);
    }
    std::vector<int32_t> rows(tile.n_queries);
    std::iota(rows.begin(), rows.end(), 0);
    const int64_t stride = p_.heads * p_.value_dim;
    const int64_t row = (tile.batch * p_.n_queries + tile.q_begin) * p_.heads + tile.head;
    selected_kernels().unpack_rows({.packed = partial_out<T>(first.part),
                                    .packed_row_bytes = p_.value_dim * static_cast<int64_t>(sizeof(T)),
                                    .indices = rows.data(),
                                    .n_tokens = tile.n_queries,
                                    .head_dim = p_.value_dim,
                                    .scale = 1.0,
                                    .dtype = p_.dtype,
                                    .target = static_cast<char*>(p_.out) + row * p_.value_dim * storage_size(p_.dtype),
                                    .target_stride = stride});
  }

  const AttentionParams& p_;
  const Executor& executor_;
  const ProductKernels& kernels_;
  const WorkPlan plan_;
  const RowBytes row_bytes_;
  const int64_t threads_;
  const Planes planes_;
  const int64_t tile_queries_;
  const std::vector<Tile> tiles_;
  bool packs_per_tile_;
  int64_t piece_rows_;
  int64_t scratch_bytes_;
  int64_t thread_bytes_;
  int64_t n_parts_ = 0;
  Buffer scratch_, k_rows_, v_stack_, parts_;
};

}  // namespace

void attention(const AttentionParams& params, const Executor& executor, bool allow_split_float32) {
  Forward(params, executor, allow_split_float32).run();
}

}  // namespace anchor_attention::cpu
