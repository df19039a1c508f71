// Backward of one tile of queries against a slice of its keys, queries in the vectors' lanes as in the forward:
//   Pᵀ = 2^(Sᵀ − lse)        dSᵀ = Pᵀ · (V dOᵀ − delta)        dV += Pᵀ dO        dK += dSᵀ Q        dQ += dS K
// `scale` is applied to dK and dQ once, at the end.
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"
#include "kernels/cpu/vector/softmax.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

template <typename Operand, typename T = Sum<Operand>>
struct BackwardScratch {
  BackwardScratch(void* base, const AttentionParams& p) : scratch(base) {
    const int64_t stride = row_stride<T>(p.head_dim), value_stride = row_stride<T>(p.value_dim);
    q_rows = scratch.take<T>(kTileQueries<T> * stride);
    grad_out_rows = scratch.take<T>(kTileQueries<T> * value_stride);
    grad_q_rows = scratch.take<T>(kTileQueries<T> * stride);
    q_panel = scratch.take<Operand>(operands<Operand>(p.head_dim) * kTileQueries<T>);
    grad_out_panel = scratch.take<Operand>(operands<Operand>(p.value_dim) * kTileQueries<T>);
    probabilities = scratch.take<T>(kChunkKeys * kTileQueries<T>);
    lse = scratch.take<T>(kTileQueries<T>);
    delta = scratch.take<T>(kTileQueries<T>);
    if constexpr (kDepth<Operand> == 1) {
      q_stack = q_rows;
      grad_out_stack = grad_out_rows;
      probability_rows = probabilities;
      grad_score_rows = grad_score_stack = scratch.take<T>(kChunkKeys * kTileQueries<T>);
    } else {
      q_stack = scratch.take<Operand>(operands<Operand>(kTileQueries<T>) * stride);
      grad_out_stack = scratch.take<Operand>(operands<Operand>(kTileQueries<T>) * value_stride);
      probability_rows = scratch.take<Operand>(kChunkKeys * kRowOperands);
      grad_score_rows = scratch.take<Operand>(kChunkKeys * kRowOperands);
      grad_score_stack = scratch.take<Operand>(operands<Operand>(kChunkKeys) * kTileQueries<T>);
    }
  }

  static constexpr int64_t kRowOperands = kTileQueries<T> / kDepth<Operand>;

  Scratch scratch;
  T* q_rows;                  // [tile_queries, row_stride of head_dim], rotated
  T* grad_out_rows;           // [tile_queries, row_stride of value_dim]
  T* grad_q_rows;             // [tile_queries, row_stride of head_dim]
  Operand* q_panel;           // [strips, operands of head_dim, strip_columns]
  Operand* grad_out_panel;    // [strips, operands of value_dim, strip_columns]
  Operand* q_stack;           // [operands of queries, row_stride of head_dim]
  Operand* grad_out_stack;    // [operands of queries, row_stride of value_dim]
  T* probabilities;           // [chunk_keys, tile_queries]
  Operand* probability_rows;  // [chunk_keys, operands of queries]
  Operand* grad_score_rows;   // [chunk_keys, operands of queries]
  Operand* grad_score_stack;  // [operands of keys, tile_queries]
  T* lse;                     // [tile_queries], in units of log 2; +inf makes a row's probabilities 0
  T* delta;                   // [tile_queries], Σ_d dO · O − grad_lse
};

// Stores rows of a block as operands along the row: for bfloat16, rounded.
template <int kVectors>
ANCHOR_ATTENTION_INLINE void store_row(BFloat16Pair* row, const Vector<float> (&values)[kVectors]) {
#if defined(__AVX512BF16__)
  for (int j = 0; j + 1 < kVectors; j += 2) {
    _mm512_storeu_si512(row + j * kLanes<float> / 2, round_to_bfloat16(values[j], values[j + 1]));
  }
  if constexpr (kVectors % 2 == 1) {
    const __m512i rounded = round_to_bfloat16(values[kVectors - 1], Vector<float>{});
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + (kVectors - 1) * kLanes<float> / 2),
                        _mm512_castsi512_si256(rounded));
  }
#else
  static_assert(kVectors == 0 || !kHasBFloat16Dot);
  (void)row, (void)values;
#endif
}

template <typename Operand, typename T = Sum<Operand>>
struct StoreProbabilities {
  const BackwardScratch<Operand>& s;
  T factor;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    Vector<T> normaliser[kVectors];
    for (int j = 0; j < kVectors; ++j) normaliser[j] = load(s.lse + column + j * kLanes<T>);
    for (int i = 0; i < kRows; ++i) {
      Vector<T> values[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        values[j] = exp2(block.value[i][j] * factor - normaliser[j]);
        store(s.probabilities + (row + i) * kTileQueries<T> + column + j * kLanes<T>, values[j]);
      }
      if constexpr (kDepth<Operand> == 2) {
        store_row<kVectors>(s.probability_rows + (row + i) * s.kRowOperands + column / 2, values);
      }
    }
  }
};

template <typename Operand, typename T = Sum<Operand>>
struct StoreGradScores {
  const BackwardScratch<Operand>& s;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    Vector<T> values[kRows][kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> offset = load(s.delta + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * kTileQueries<T> + column + j * kLanes<T>;
        values[i][j] = load(s.probabilities + at) * (block.value[i][j] - offset);
        if constexpr (kDepth<Operand> == 1) store(s.grad_score_stack + at, values[i][j]);
      }
    }
    if constexpr (kDepth<Operand> == 2) {
      for (int i = 0; i < kRows; ++i) {
        store_row<kVectors>(s.grad_score_rows + (row + i) * s.kRowOperands + column / 2, values[i]);
      }
      // Blocks begin at even rows.
      for (int i = 0; i < kRows; i += 2) {
        for (int j = 0; j < kVectors; ++j) {
          const Vector<T> next = i + 1 < kRows ? values[i + 1 < kRows ? i + 1 : i][j] : Vector<T>{};
          store(s.grad_score_stack + (row + i) / 2 * kTileQueries<T> + column + j * kLanes<T>,
                pair_up(values[i][j], next));
        }
      }
    }
  }
};

template <typename Storage, typename T = Working<Storage>>
void backward_tile_of(const BackwardTile& tile) {
  using Operand = typename OperandOf<Storage>::Type;
  const AttentionParams& f = tile.params->forward;
  const int64_t dims = round_up_to_lanes<T>(f.head_dim), value_dims = round_up_to_lanes<T>(f.value_dim);
  const int64_t stride = row_stride<T>(f.head_dim), value_stride = row_stride<T>(f.value_dim);
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const BackwardScratch<Operand> s(tile.scratch, f);
  const bool needs_grad_scores = tile.grad_q != nullptr || tile.grad_k_rows != nullptr;

  load_queries<Storage>(f, tile.batch, tile.head, tile.q_begin, tile.n_queries, stride, s.q_rows);
  load_statistics<Storage>(tile, kTileQueries<T>, value_stride, s.grad_out_rows, s.lse, s.delta);
  to_panel(s.q_rows, tile.n_queries, stride, f.head_dim, s.q_panel);
  to_panel(s.grad_out_rows, tile.n_queries, value_stride, f.value_dim, s.grad_out_panel);
  if constexpr (kDepth<Operand> > 1) {
    to_stack(s.q_rows, tile.n_queries, stride, s.q_stack);
    to_stack(s.grad_out_rows, tile.n_queries, value_stride, s.grad_out_stack);
  }
  std::memset(s.grad_q_rows, 0, tile.n_queries * stride * sizeof(T));

  const int64_t k_operands = stride / kDepth<Operand>, v_operands = value_stride / kDepth<Operand>;
  const int64_t query_operands = operands<Operand>(tile.n_queries);
  const int64_t head_operands = operands<Operand>(f.head_dim), value_operands = operands<Operand>(f.value_dim);
  const Rows<Operand> q_panel{s.q_panel, kStripColumns<T>, head_operands * kStripColumns<T>};
  const Rows<Operand> grad_out_panel{s.grad_out_panel, kStripColumns<T>, value_operands * kStripColumns<T>};
  const Broadcast<Operand> probabilities{s.probability_rows, s.kRowOperands, 1};
  const Broadcast<Operand> grad_scores{s.grad_score_rows, s.kRowOperands, 1};
  const Broadcast<Operand> grad_scores_transposed{s.grad_score_stack, 1, kTileQueries<T>};
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t begin = tile.key_ranges[2 * r] > tile.key_begin ? tile.key_ranges[2 * r] : tile.key_begin;
    const int64_t end = tile.key_ranges[2 * r + 1] < tile.key_end ? tile.key_ranges[2 * r + 1] : tile.key_end;
    for (int64_t key = begin; key < end; key += kChunkKeys) {
      const int64_t n_keys = end - key < kChunkKeys ? end - key : kChunkKeys;
      const Broadcast<Operand> k_rows{static_cast<const Operand*>(tile.k_rows) + key * k_operands, k_operands, 1};
      const Broadcast<Operand> v_rows{static_cast<const Operand*>(tile.v_rows) + key * v_operands, v_operands, 1};
      outer_product(n_keys, columns, head_operands, k_rows, q_panel,
                    StoreProbabilities<Operand>{s, static_cast<T>(f.scale * kLog2E)});
      if (tile.grad_v_rows != nullptr) {
        outer_product(n_keys, value_dims, query_operands, probabilities, Rows<Operand>{s.grad_out_stack, value_stride},
                      AddTo<T>{static_cast<T*>(tile.grad_v_rows) + key * value_stride, value_stride});
      }
      if (!needs_grad_scores) continue;
      outer_product(n_keys, columns, value_operands, v_rows, grad_out_panel, StoreGradScores<Operand>{s});
      if (tile.grad_k_rows != nullptr) {
        outer_product(n_keys, dims, query_operands, grad_scores, Rows<Operand>{s.q_stack, stride},
                      AddTo<T>{static_cast<T*>(tile.grad_k_rows) + key * stride, stride});
      }
      if (tile.grad_q != nullptr) {
        const Operand* k_stack = static_cast<const Operand*>(tile.k_stack) + key / kDepth<Operand> * stride;
        outer_product(tile.n_queries, dims, operands<Operand>(n_keys), grad_scores_transposed,
                      Rows<Operand>{k_stack, stride}, AddTo<T>{s.grad_q_rows, stride});
      }
    }
  }
  if (tile.grad_q != nullptr) add_grad_q(tile, stride, s.grad_q_rows);
}

}  // namespace

int64_t backward_scratch_bytes(const AttentionParams& p) {
  return dispatch(p.dtype, [&](auto storage) {
    return BackwardScratch<typename OperandOf<decltype(storage)>::Type>(nullptr, p).scratch.used();
  });
}

void backward_tile(const BackwardTile& tile) {
  dispatch(tile.params->forward.dtype, [&](auto storage) { backward_tile_of<decltype(storage)>(tile); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
