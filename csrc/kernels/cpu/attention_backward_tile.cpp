// Backward of one tile of queries against a slice of its keys, queries in the vectors' lanes as in the forward:
//   Pᵀ = 2^(Sᵀ − lse)        dSᵀ = Pᵀ · (V dOᵀ − delta)        dV += Pᵀ dO        dK += dSᵀ Q        dQ += dS K
// `scale` is applied to dK and dQ once, at the end.
#include "kernels.h"
#include "outer_product.h"
#include "rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;

template <typename T>
struct BackwardScratch {
  BackwardScratch(void* base, int64_t head_dim) : scratch(base) {
    const int64_t padded = round_up_to_lanes<T>(head_dim);
    q_rows = scratch.take<T>(kTileQueries<T> * padded);
    grad_out_rows = scratch.take<T>(kTileQueries<T> * padded);
    grad_q_rows = scratch.take<T>(kTileQueries<T> * padded);
    q_panel = scratch.take<T>(head_dim * kTileQueries<T>);
    grad_out_panel = scratch.take<T>(head_dim * kTileQueries<T>);
    probabilities = scratch.take<T>(kChunkKeys * kTileQueries<T>);
    grad_scores = scratch.take<T>(kChunkKeys * kTileQueries<T>);
    lse = scratch.take<T>(kTileQueries<T>);
    delta = scratch.take<T>(kTileQueries<T>);
  }

  Scratch scratch;
  T* q_rows;          // [tile_queries, padded_head_dim], rotated
  T* grad_out_rows;   // [tile_queries, padded_head_dim]
  T* grad_q_rows;     // [tile_queries, padded_head_dim]
  T* q_panel;         // [head_dim, tile_queries]
  T* grad_out_panel;  // [head_dim, tile_queries]
  T* probabilities;   // [chunk_keys, tile_queries]
  T* grad_scores;     // [chunk_keys, tile_queries]
  T* lse;             // [tile_queries], in units of log 2; +inf makes a row's probabilities 0
  T* delta;           // [tile_queries], Σ_d dO · O − grad_lse
};

template <typename T>
struct StoreProbabilities {
  T* probabilities;
  const T* lse;
  T factor;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> normaliser = load(lse + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        store(probabilities + (row + i) * kTileQueries<T> + column + j * kLanes<T>,
              exp2(block.value[i][j] * factor - normaliser));
      }
    }
  }
};

template <typename T>
struct StoreGradScores {
  T* grad_scores;
  const T* probabilities;
  const T* delta;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> offset = load(delta + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * kTileQueries<T> + column + j * kLanes<T>;
        store(grad_scores + at, load(probabilities + at) * (block.value[i][j] - offset));
      }
    }
  }
};

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void load_statistics(const BackwardTile& tile, int64_t padded, const BackwardScratch<T>& s) {
  const AttentionBackwardParams& p = *tile.params;
  const AttentionParams& f = p.forward;
  const int64_t out_stride = f.heads * f.head_dim;
  const int64_t first_row = (tile.batch * f.heads + tile.head) * f.n_queries + tile.q_begin;
  const T* lse = static_cast<const T*>(f.lse) + first_row;
  const T* grad_lse = p.grad_lse == nullptr ? nullptr : static_cast<const T*>(p.grad_lse) + first_row;
  const Storage* out = static_cast<const Storage*>(f.out) + (tile.batch * f.n_queries + tile.q_begin) * out_stride +
                       tile.head * f.head_dim;
  for (int64_t i = 0; i < kTileQueries<T>; ++i) {
    s.lse[i] = kInfinity<T>;
    s.delta[i] = 0;
    if (i >= tile.n_queries) continue;
    T* grad_out_row = s.grad_out_rows + i * padded;
    widen_row(row_of<Storage>(p.grad_out, p.grad_out_strides, tile.batch, tile.q_begin + i, tile.head), f.head_dim,
              padded, grad_out_row);
    T delta = 0;
    for (int64_t d = 0; d < f.head_dim; ++d) delta += grad_out_row[d] * widen(out[i * out_stride + d]);
    s.delta[i] = delta - (grad_lse == nullptr ? T(0) : grad_lse[i]);
    if (lse[i] != -kInfinity<T>) s.lse[i] = static_cast<T>(lse[i] * kLog2E);
  }
}

template <typename T>
ANCHOR_ATTENTION_INLINE void add_grad_q(const BackwardTile& tile, int64_t padded, const T* rows) {
  const AttentionParams& f = tile.params->forward;
  const int64_t stride = f.heads * f.head_dim;
  T* grad_q =
      static_cast<T*>(tile.grad_q) + (tile.batch * f.n_queries + tile.q_begin) * stride + tile.head * f.head_dim;
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    for (int64_t d = 0; d < f.head_dim; ++d) grad_q[i * stride + d] += rows[i * padded + d];
  }
}

template <typename Storage, typename T = Working<Storage>>
void backward_tile_of(const BackwardTile& tile) {
  const AttentionParams& f = tile.params->forward;
  const int64_t padded = round_up_to_lanes<T>(f.head_dim);
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const BackwardScratch<T> s(tile.scratch, f.head_dim);
  const T factor = static_cast<T>(f.scale * kLog2E);
  const bool needs_grad_scores = tile.grad_q != nullptr || tile.grad_k_rows != nullptr;

  load_queries<Storage>(f, tile.batch, tile.head, tile.q_begin, tile.n_queries, padded, s.q_rows);
  load_statistics<Storage>(tile, padded, s);
  transpose_to_panel(s.q_rows, tile.n_queries, padded, f.head_dim, s.q_panel);
  transpose_to_panel(s.grad_out_rows, tile.n_queries, padded, f.head_dim, s.grad_out_panel);
  std::memset(s.grad_q_rows, 0, tile.n_queries * padded * sizeof(T));

  const Broadcast<T> probabilities{s.probabilities, kTileQueries<T>, 1};
  const Broadcast<T> grad_scores{s.grad_scores, kTileQueries<T>, 1};
  const Broadcast<T> grad_scores_transposed{s.grad_scores, 1, kTileQueries<T>};
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t begin = tile.key_ranges[2 * r] > tile.key_begin ? tile.key_ranges[2 * r] : tile.key_begin;
    const int64_t end = tile.key_ranges[2 * r + 1] < tile.key_end ? tile.key_ranges[2 * r + 1] : tile.key_end;
    for (int64_t key = begin; key < end; key += kChunkKeys) {
      const int64_t n_keys = end - key < kChunkKeys ? end - key : kChunkKeys;
      const T* k_rows = static_cast<const T*>(tile.k_rows) + key * padded;
      const T* v_rows = static_cast<const T*>(tile.v_rows) + key * padded;
      outer_product(n_keys, columns, f.head_dim, Broadcast<T>{k_rows, padded, 1}, Rows<T>{s.q_panel, kTileQueries<T>},
                    StoreProbabilities<T>{s.probabilities, s.lse, factor});
      if (tile.grad_v_rows != nullptr) {
        outer_product(n_keys, padded, tile.n_queries, probabilities, Rows<T>{s.grad_out_rows, padded},
                      AddTo<T>{static_cast<T*>(tile.grad_v_rows) + key * padded, padded});
      }
      if (!needs_grad_scores) continue;
      outer_product(n_keys, columns, f.head_dim, Broadcast<T>{v_rows, padded, 1},
                    Rows<T>{s.grad_out_panel, kTileQueries<T>},
                    StoreGradScores<T>{s.grad_scores, s.probabilities, s.delta});
      if (tile.grad_k_rows != nullptr) {
        outer_product(n_keys, padded, tile.n_queries, grad_scores, Rows<T>{s.q_rows, padded},
                      AddTo<T>{static_cast<T*>(tile.grad_k_rows) + key * padded, padded});
      }
      if (tile.grad_q != nullptr) {
        outer_product(tile.n_queries, padded, n_keys, grad_scores_transposed, Rows<T>{k_rows, padded},
                      AddTo<T>{s.grad_q_rows, padded});
      }
    }
  }
  if (tile.grad_q != nullptr) add_grad_q(tile, padded, s.grad_q_rows);
}

}  // namespace

int64_t backward_scratch_bytes(int64_t head_dim, ScalarType dtype) {
  if (dtype == ScalarType::float64) return BackwardScratch<double>(nullptr, head_dim).scratch.used();
  return BackwardScratch<float>(nullptr, head_dim).scratch.used();
}

void backward_tile(const BackwardTile& tile) {
  dispatch(tile.params->forward.dtype, [&](auto storage) { backward_tile_of<decltype(storage)>(tile); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
