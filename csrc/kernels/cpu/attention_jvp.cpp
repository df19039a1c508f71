#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/work_plan.h"

namespace anchor_attention::cpu {
namespace {

// Further tangents take another pass over the keys: what a tile keeps of each would no longer fit into the cache.
constexpr int64_t kMaxTangents = 8;

// One call.
class Jvp {
 public:
  Jvp(const AttentionJvpParams& params, const Executor& executor)
      : params_(params),
        p_(params.forward),
        executor_(executor),
        kernels_(selected_kernels().derivatives),
        plan_(p_, kernels_.packing),
        row_bytes_(plan_.packed_row_bytes()),
        tangents_(std::min(params.n_tangents, kMaxTangents)),
        threads_(plan_.threads(executor, 4.0 * static_cast<double>(1 + params.n_tangents))),
        planes_(plan_.all_planes()),
        tiles_(plan_.tiles(planes_, kernels_.tile_queries(p_.dtype), /*with_gaps=*/true)) {}

  void run() {
    pack_keys();
    AttentionJvpParams at_once = params_;
    at_once.n_tangents = tangents_;
    const int64_t scratch_bytes = kernels_.jvp_scratch_bytes(at_once);
    const Buffer scratch = allocate(threads_ * scratch_bytes);
    const int64_t passes = (params_.n_tangents + tangents_ - 1) / tangents_;
    for_each_task(executor_, threads_, passes * static_cast<int64_t>(tiles_.size()), [&](int64_t i, int64_t thread) {
      const Tile& tile = tiles_[i / passes];
      const int64_t first = i % passes * tangents_;
      const int64_t n = std::min(tangents_, params_.n_tangents - first);
      if (tile.group == kNoGroup) {
        p_.dtype == ScalarType::float64 ? fill_rows<double>(tile, first, n) : fill_rows<float>(tile, first, n);
      } else {
        run_tile(tile, first, n, scratch.get() + thread * scratch_bytes);
      }
    });
  }

 private:
  void pack_keys() {
    const int64_t n_rows = plan_.n_rows(planes_);
    std::vector<PackedTensor> tensors;
    const auto add = [&](const void* source, const Strides& strides, int64_t head_dim, char* rows, int64_t bytes) {
      tensors.push_back({source, strides, head_dim, PackedLayout::rows, rows, bytes});
    };
    const auto add_tangents = [&](const Tangents& tangents, int64_t head_dim, Buffer& rows, int64_t bytes) {
      if (tangents.data == nullptr) return;
      rows = allocate(params_.n_tangents * n_rows * bytes);
      for (int64_t t = 0; t < params_.n_tangents; ++t) {
        add(static_cast<const char*>(tangents.data) + t * tangents.stride * storage_size(p_.dtype), tangents.strides,
            head_dim, rows.get() + t * n_rows * bytes, bytes);
      }
    };
    k_rows_ = allocate(n_rows * row_bytes_.k);
    v_rows_ = allocate(n_rows * row_bytes_.v);
    add(p_.k, p_.k_strides, p_.head_dim, k_rows_.get(), row_bytes_.k);
    add(p_.v, p_.v_strides, p_.value_dim, v_rows_.get(), row_bytes_.v);
    add_tangents(params_.k_tangents, p_.head_dim, k_tangent_rows_, row_bytes_.k);
    add_tangents(params_.v_tangents, p_.value_dim, v_tangent_rows_, row_bytes_.v);
    pack(p_, plan_, planes_, kernels_.packing, executor_, threads_, tensors);
  }

  // Rows that read no key: their tangents are zero.
  template <typename T>
  void fill_rows(const Tile& tile, int64_t first, int64_t n) const {
    const int64_t size = p_.value_dim * storage_size(p_.dtype);
    const int64_t lse_row = (tile.batch * p_.heads + tile.head) * p_.n_queries + tile.q_begin;
    const auto fill_out = [&](void* out, int64_t tangent) {
      for (int64_t i = tile.q_begin; i < tile.q_begin + tile.n_queries; ++i) {
        const int64_t row = ((tangent * p_.batch + tile.batch) * p_.n_queries + i) * p_.heads + tile.head;
        std::memset(static_cast<char*>(out) + row * size, 0, size);
      }
    };
    for (int64_t t = first; t < first + n; ++t) {
      fill_out(params_.out_tangents, t);
      T* lse_tangents = static_cast<T*>(params_.lse_tangents) + t * p_.batch * p_.heads * p_.n_queries;
      std::fill_n(lse_tangents + lse_row, tile.n_queries, T(0));
    }
    if (params_.knows_value || first > 0) return;
    fill_out(p_.out, 0);
    std::fill_n(static_cast<T*>(p_.lse) + lse_row, tile.n_queries, -std::numeric_limits<T>::infinity());
  }

  void run_tile(const Tile& tile, int64_t first, int64_t n, char* scratch) const {
    const KeyRangeTableView table = plan_.keys(tile.batch).table.view();
    const int64_t row = plan_.first_row(planes_, tile.batch, tile.head), n_rows = plan_.n_rows(planes_);
    const auto tangent_rows = [&](const Buffer& rows, int64_t bytes) {
      return rows ? rows.get() + (first * n_rows + row) * bytes : nullptr;
    };
    kernels_.jvp_tile({.params = &params_,
                       .batch = tile.batch,
                       .head = tile.head,
                       .q_begin = tile.q_begin,
                       .n_queries = tile.n_queries,
                       .first_tangent = first,
                       .n_tangents = n,
                       .k_rows = k_rows_.get() + row * row_bytes_.k,
                       .v_rows = v_rows_.get() + row * row_bytes_.v,
                       .k_tangent_rows = tangent_rows(k_tangent_rows_, row_bytes_.k),
                       .v_tangent_rows = tangent_rows(v_tangent_rows_, row_bytes_.v),
                       .tangent_rows = n_rows,
                       .key_ranges = table.k_ranges + 2 * table.k_offsets[tile.group],
                       .n_key_ranges = table.k_offsets[tile.group + 1] - table.k_offsets[tile.group],
                       .scratch = scratch});
  }

  const AttentionJvpParams& params_;
  const AttentionParams& p_;
  const Executor& executor_;
  const DerivativeKernels& kernels_;
  const WorkPlan plan_;
  const RowBytes row_bytes_;
  const int64_t tangents_;  // at once
  const int64_t threads_;
  const Planes planes_;
  const std::vector<Tile> tiles_;
  Buffer k_rows_, v_rows_, k_tangent_rows_, v_tangent_rows_;
};

}  // namespace

void attention_jvp(const AttentionJvpParams& params, const Executor& executor) { Jvp(params, executor).run(); }

}  // namespace anchor_attention::cpu
