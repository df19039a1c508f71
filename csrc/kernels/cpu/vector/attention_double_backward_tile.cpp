// Second derivatives of one tile of queries against a slice of its keys, along (a, b, c); queries in the vectors' lanes
// as in the backward. With T = scale · (a Kᵀ + Q bᵀ), X = dO cᵀ, and for each row r = Σ P T, mean = <dO, tangent of O>:
//   W = P · (T − r)        dS = P · (V dO − delta)        G = W · (V dO − delta) + P · (X − mean)
//   dV += W dO        dK += G Q + dS a        dQ += G K + dS b
// `scale` is applied to dK and dQ once, at the end.
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"
#include "kernels/cpu/vector/softmax.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

template <typename T>
struct DoubleBackwardScratch {
  DoubleBackwardScratch(void* base, const AttentionParams& p) : scratch(base) {
    constexpr int64_t kQueries = kTileQueries<T>;
    const int64_t stride = row_stride<T>(p.head_dim), value_stride = row_stride<T>(p.value_dim);
    q_rows = scratch.take<T>(kQueries * stride);
    q_tangent_rows = scratch.take<T>(kQueries * stride);
    grad_out_rows = scratch.take<T>(kQueries * value_stride);
    grad_q_rows = scratch.take<T>(kQueries * stride);
    q_panel = scratch.take<T>(p.head_dim * kQueries);
    q_tangent_panel = scratch.take<T>(p.head_dim * kQueries);
    grad_out_panel = scratch.take<T>(p.value_dim * kQueries);
    probabilities = scratch.take<T>(kChunkKeys * kQueries);
    weighted = scratch.take<T>(kChunkKeys * kQueries);
    grad_scores = scratch.take<T>(kChunkKeys * kQueries);
    lse = scratch.take<T>(kQueries);
    delta = scratch.take<T>(kQueries);
    lse_tangent = scratch.take<T>(kQueries);
    mean = scratch.take<T>(kQueries);
  }

  Scratch scratch;
  T* q_rows;           // [tile_queries, row_stride of head_dim]
  T* q_tangent_rows;   // [tile_queries, row_stride of head_dim]
  T* grad_out_rows;    // [tile_queries, row_stride of value_dim]
  T* grad_q_rows;      // [tile_queries, row_stride of head_dim]
  T* q_panel;          // [strips, head_dim, strip_columns]
  T* q_tangent_panel;  // [strips, head_dim, strip_columns]
  T* grad_out_panel;   // [strips, value_dim, strip_columns]
  T* probabilities;    // [chunk_keys, tile_queries]; then dS
  T* weighted;         // [chunk_keys, tile_queries], T without scale; then W
  T* grad_scores;      // [chunk_keys, tile_queries], P · (X − mean); then G
  T* lse;              // [tile_queries], in units of log 2; +inf makes a row's probabilities 0
  T* delta;            // [tile_queries], Σ_d dO · O − grad_lse
  T* lse_tangent;      // [tile_queries], r
  T* mean;             // [tile_queries], Σ_d dO · tangent of O
};

template <typename T>
struct StoreTileProbabilities {
  const DoubleBackwardScratch<T>& s;
  T factor;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> normaliser = load(s.lse + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        store(s.probabilities + (row + i) * kTileQueries<T> + column + j * kLanes<T>,
              exp2(block.value[i][j] * factor - normaliser));
      }
    }
  }
};

// `kAdds`: T is the sum of two products, of which the first one is stored without weights.
template <bool kAdds, bool kWeights, typename T>
struct StoreWeighted {
  const DoubleBackwardScratch<T>& s;
  T scale;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> reference = load(s.lse_tangent + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * kTileQueries<T> + column + j * kLanes<T>;
        Vector<T> value = block.value[i][j];
        if constexpr (kAdds) value += load(s.weighted + at);
        if constexpr (kWeights) value = load(s.probabilities + at) * (value * scale - reference);
        store(s.weighted + at, value);
      }
    }
  }
};

template <typename T>
struct StoreValueTerm {
  const DoubleBackwardScratch<T>& s;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> mean = load(s.mean + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * kTileQueries<T> + column + j * kLanes<T>;
        store(s.grad_scores + at, load(s.probabilities + at) * (block.value[i][j] - mean));
      }
    }
  }
};

template <bool kHasValueTerm, typename T>
struct StoreSecondGradScores {
  const DoubleBackwardScratch<T>& s;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> delta = load(s.delta + column + j * kLanes<T>), mean = load(s.mean + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * kTileQueries<T> + column + j * kLanes<T>;
        const Vector<T> difference = block.value[i][j] - delta, probability = load(s.probabilities + at);
        const Vector<T> of_weighted = load(s.weighted + at) * difference;
        store(s.grad_scores + at, of_weighted + (kHasValueTerm ? load(s.grad_scores + at) : -(probability * mean)));
        store(s.probabilities + at, probability * difference);
      }
    }
  }
};

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void begin_tile(const DoubleBackwardTile& task, const DoubleBackwardScratch<T>& s) {
  const BackwardTile& tile = task.tile;
  const AttentionParams& f = tile.params->forward;
  const int64_t stride = row_stride<T>(f.head_dim), value_stride = row_stride<T>(f.value_dim);
  load_queries<Storage>(f, tile.batch, tile.head, tile.q_begin, tile.n_queries, stride, s.q_rows);
  to_panel(s.q_rows, tile.n_queries, stride, f.head_dim, s.q_panel);
  const Tangents& q_tangent = task.params->q_tangent;
  if (q_tangent.data != nullptr) {
    load_rows<Storage>(q_tangent.data, q_tangent.strides, tile.batch, tile.head, tile.q_begin, tile.n_queries,
                       f.head_dim, stride, s.q_tangent_rows);
    to_panel(s.q_tangent_rows, tile.n_queries, stride, f.head_dim, s.q_tangent_panel);
  }
  load_statistics<Storage>(tile, kTileQueries<T>, value_stride, s.grad_out_rows, s.lse, s.delta);
  to_panel(s.grad_out_rows, tile.n_queries, value_stride, f.value_dim, s.grad_out_panel);
  const int64_t out_stride = f.heads * f.value_dim;
  const Storage* out_tangent = static_cast<const Storage*>(task.params->out_tangent) +
                               (tile.batch * f.n_queries + tile.q_begin) * out_stride + tile.head * f.value_dim;
  const T* lse_tangent =
      static_cast<const T*>(task.params->lse_tangent) + (tile.batch * f.heads + tile.head) * f.n_queries + tile.q_begin;
  for (int64_t i = 0; i < kTileQueries<T>; ++i) {
    const bool exists = i < tile.n_queries;
    s.lse_tangent[i] = exists ? lse_tangent[i] : T(0);
    s.mean[i] = exists ? dot(s.grad_out_rows + i * value_stride, out_tangent + i * out_stride, f.value_dim) : T(0);
  }
  std::memset(s.grad_q_rows, 0, tile.n_queries * stride * sizeof(T));
  // Stays so where the scores do not change.
  std::memset(s.weighted, 0, kChunkKeys * kTileQueries<T> * sizeof(T));
}

template <typename Storage, typename T = Working<Storage>>
void double_backward_tile_of(const DoubleBackwardTile& task) {
  const BackwardTile& tile = task.tile;
  const AttentionParams& f = tile.params->forward;
  const int64_t dims = round_up_to_lanes<T>(f.head_dim), value_dims = round_up_to_lanes<T>(f.value_dim);
  const int64_t stride = row_stride<T>(f.head_dim), value_stride = row_stride<T>(f.value_dim);
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const DoubleBackwardScratch<T> s(tile.scratch, f);
  const bool has_q_tangent = task.params->q_tangent.data != nullptr, has_k_tangent = task.k_tangent_rows != nullptr;
  const bool moves_scores = has_q_tangent || has_k_tangent;
  const T scale = static_cast<T>(f.scale), factor = static_cast<T>(f.scale * kLog2E);
  begin_tile<Storage>(task, s);

  const auto panel_of = [](const T* panel, int64_t length) {
    return Rows<T>{panel, kStripColumns<T>, length * kStripColumns<T>};
  };
  const Rows<T> q_panel = panel_of(s.q_panel, f.head_dim), q_tangent_panel = panel_of(s.q_tangent_panel, f.head_dim);
  const Rows<T> grad_out_panel = panel_of(s.grad_out_panel, f.value_dim);
  const auto by_key = [](const T* chunk) { return Broadcast<T>{chunk, kTileQueries<T>, 1}; };
  const auto by_query = [](const T* chunk) { return Broadcast<T>{chunk, 1, kTileQueries<T>}; };
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t begin = tile.key_ranges[2 * r] > tile.key_begin ? tile.key_ranges[2 * r] : tile.key_begin;
    const int64_t end = tile.key_ranges[2 * r + 1] < tile.key_end ? tile.key_ranges[2 * r + 1] : tile.key_end;
    for (int64_t key = begin; key < end; key += kChunkKeys) {
      const int64_t n_keys = end - key < kChunkKeys ? end - key : kChunkKeys;
      const auto rows_of = [&](const void* rows, int64_t length) {
        return Broadcast<T>{static_cast<const T*>(rows) + key * length, length, 1};
      };
      const auto stack_of = [&](const void* rows) {
        return Rows<T>{static_cast<const T*>(rows) + key * stride, stride};
      };
      const Broadcast<T> k_rows = rows_of(tile.k_rows, stride);
      outer_product(n_keys, columns, f.head_dim, k_rows, q_panel, StoreTileProbabilities<T>{s, factor});
      if (has_q_tangent && has_k_tangent) {
        outer_product(n_keys, columns, f.head_dim, k_rows, q_tangent_panel, StoreWeighted<false, false, T>{s, scale});
        outer_product(n_keys, columns, f.head_dim, rows_of(task.k_tangent_rows, stride), q_panel,
                      StoreWeighted<true, true, T>{s, scale});
      } else if (moves_scores) {
        outer_product(n_keys, columns, f.head_dim, has_q_tangent ? k_rows : rows_of(task.k_tangent_rows, stride),
                      has_q_tangent ? q_tangent_panel : q_panel, StoreWeighted<false, true, T>{s, scale});
      }
      if (tile.grad_v_rows != nullptr && moves_scores) {
        outer_product(n_keys, value_dims, tile.n_queries, by_key(s.weighted), Rows<T>{s.grad_out_rows, value_stride},
                      AddTo<T>{static_cast<T*>(tile.grad_v_rows) + key * value_stride, value_stride});
      }
      if (tile.grad_q == nullptr && tile.grad_k_rows == nullptr) continue;
      const Broadcast<T> v_rows = rows_of(tile.v_rows, value_stride);
      if (task.v_tangent_rows != nullptr) {
        outer_product(n_keys, columns, f.value_dim, rows_of(task.v_tangent_rows, value_stride), grad_out_panel,
                      StoreValueTerm<T>{s});
        outer_product(n_keys, columns, f.value_dim, v_rows, grad_out_panel, StoreSecondGradScores<true, T>{s});
      } else {
        outer_product(n_keys, columns, f.value_dim, v_rows, grad_out_panel, StoreSecondGradScores<false, T>{s});
      }
      if (tile.grad_k_rows != nullptr) {
        const AddTo<T> grad_k{static_cast<T*>(tile.grad_k_rows) + key * stride, stride};
        outer_product(n_keys, dims, tile.n_queries, by_key(s.grad_scores), Rows<T>{s.q_rows, stride}, grad_k);
        if (has_q_tangent) {
          outer_product(n_keys, dims, tile.n_queries, by_key(s.probabilities), Rows<T>{s.q_tangent_rows, stride},
                        grad_k);
        }
      }
      if (tile.grad_q == nullptr) continue;
      const AddTo<T> grad_q{s.grad_q_rows, stride};
      outer_product(tile.n_queries, dims, n_keys, by_query(s.grad_scores), stack_of(tile.k_rows), grad_q);
      if (has_k_tangent) {
        outer_product(tile.n_queries, dims, n_keys, by_query(s.probabilities), stack_of(task.k_tangent_rows), grad_q);
      }
    }
  }
  if (tile.grad_q != nullptr) add_grad_q(tile, stride, s.grad_q_rows);
}

}  // namespace

int64_t double_backward_scratch_bytes(const AttentionParams& p) {
  return dispatch(p.dtype, [&](auto storage) {
    return DoubleBackwardScratch<Working<decltype(storage)>>(nullptr, p).scratch.used();
  });
}

void double_backward_tile(const DoubleBackwardTile& task) {
  dispatch(task.params->backward.forward.dtype,
           [&](auto storage) { double_backward_tile_of<decltype(storage)>(task); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
