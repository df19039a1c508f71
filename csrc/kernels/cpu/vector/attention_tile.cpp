// Forward of one tile of queries, with the queries in the vectors' lanes: scores Sᵀ[key, query] and outputs
// Oᵀ[dim, query], so that the softmax needs no reduction across lanes and keys may begin and end anywhere.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <typename Operand, typename T = Sum<Operand>>
struct ForwardScratch {
  ForwardScratch(void* base, int64_t head_dim) : scratch(base) {
    const int64_t padded = round_up_to_lanes<T>(head_dim);
    rows = scratch.take<T>(kTileQueries<T> * padded);
    q_panel = scratch.take<Operand>(operands<Operand>(head_dim) * kTileQueries<T>);
    out_panel = scratch.take<T>(head_dim * kTileQueries<T>);
    scores = scratch.take<T>(kChunkKeys * kTileQueries<T>);
    row_max = scratch.take<T>(kTileQueries<T>);
    chunk_max = scratch.take<T>(kTileQueries<T>);
    row_sum = scratch.take<T>(kTileQueries<T>);
    correction = scratch.take<T>(kTileQueries<T>);
  }

  Scratch scratch;
  T* rows;           // [tile_queries, padded_head_dim]
  Operand* q_panel;  // [operands of head_dim, tile_queries]
  T* out_panel;      // [head_dim, tile_queries], not yet divided by row_sum
  T* scores;      // [chunk_keys, tile_queries], in units of log 2; then probabilities [operands of keys, tile_queries]
  T* row_max;     // [tile_queries]
  T* chunk_max;   // [tile_queries]
  T* row_sum;     // [tile_queries]
  T* correction;  // [tile_queries], what the earlier sums are multiplied by
};

// Multiplies scores by a factor, stores them and keeps the maximum of every column.
template <typename T>
struct StoreScores {
  T* scores;
  T* chunk_max;
  T factor;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      T* max_of_column = chunk_max + column + j * kLanes<T>;
      Vector<T> max = load(max_of_column);
      for (int i = 0; i < kRows; ++i) {
        const Vector<T> score = block.value[i][j] * factor;
        max = maximum(score, max);
        store(scores + (row + i) * kTileQueries<T> + column + j * kLanes<T>, score);
      }
      store(max_of_column, max);
    }
  }
};

template <typename T>
struct RescaleAndAdd {
  T* out_panel;
  const T* correction;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> factor = load(correction + column + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        T* out = out_panel + (row + i) * kTileQueries<T> + column + j * kLanes<T>;
        store(out, load(out) * factor + block.value[i][j]);
      }
    }
  }
};

// Takes the chunk's maximum into the running one and turns scores into probabilities, relative to it. They overwrite
// the scores: an operand lies no later than the first of its scores.
template <typename Operand, typename T = Sum<Operand>>
ANCHOR_ATTENTION_INLINE void online_softmax(const ForwardScratch<Operand>& s, int64_t n_keys, int64_t columns) {
  Operand* const probabilities = reinterpret_cast<Operand*>(s.scores);
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    const Vector<T> old_max = load(s.row_max + column);
    const Vector<T> max = maximum(load(s.chunk_max + column), old_max);
    const Vector<T> correction = exp2(old_max - max);
    // The chunk is summed by itself: one long chain would round each small term at the size of the whole sum.
    Vector<T> sum{};
    const T* scores = s.scores + column;
    if constexpr (kDepth<Operand> == 1) {
      for (int64_t key = 0; key < n_keys; ++key) {
        const Vector<T> probability = exp2(load(scores + key * kTileQueries<T>) - max);
        store(probabilities + key * kTileQueries<T> + column, probability);
        sum += probability;
      }
    } else {
      for (int64_t key = 0; key < n_keys; key += 2) {
        const Vector<T> first = exp2(load(scores + key * kTileQueries<T>) - max);
        Vector<T> second{};
        if (key + 1 < n_keys) second = exp2(load(scores + (key + 1) * kTileQueries<T>) - max);
        store(probabilities + key / 2 * kTileQueries<T> + column, pair_up(first, second));
        sum += first + second;
      }
    }
    store(s.row_max + column, max);
    store(s.row_sum + column, load(s.row_sum + column) * correction + sum);
    store(s.correction + column, correction);
  }
}

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void store_outputs(const ForwardTile& tile,
                                           const ForwardScratch<typename OperandOf<Storage>::Type>& s) {
  const AttentionParams& p = *tile.params;
  const int64_t out_stride = p.heads * p.head_dim;
  Storage* out =
      static_cast<Storage*>(p.out) + (tile.batch * p.n_queries + tile.q_begin) * out_stride + tile.head * p.head_dim;
  T* lse = static_cast<T*>(p.lse) + (tile.batch * p.heads + tile.head) * p.n_queries + tile.q_begin;
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    // A sum of 0 says that every score was −inf: the output is 0, as without keys.
    const T inverse = s.row_sum[i] == 0 ? T(0) : 1 / s.row_sum[i];
    for (int64_t d = 0; d < p.head_dim; ++d) {
      out[i * out_stride + d] = narrow<Storage>(s.out_panel[d * kTileQueries<T> + i] * inverse);
    }
    lse[i] = static_cast<T>((s.row_max[i] + log2(s.row_sum[i])) * kLn2);
  }
}

template <typename Storage, typename T = Working<Storage>>
void forward_tile_of(const ForwardTile& tile) {
  using Operand = typename OperandOf<Storage>::Type;
  const AttentionParams& p = *tile.params;
  const int64_t padded = round_up_to_lanes<T>(p.head_dim);
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const ForwardScratch<Operand> s(tile.scratch, p.head_dim);
  const T factor = static_cast<T>(p.scale * kLog2E);

  load_queries<Storage>(p, tile.batch, tile.head, tile.q_begin, tile.n_queries, padded, s.rows);
  to_panel(s.rows, tile.n_queries, padded, p.head_dim, s.q_panel);
  std::memset(s.out_panel, 0, p.head_dim * kTileQueries<T> * sizeof(T));
  // A finite start keeps −inf − (−inf) out of the exponent when every score so far is −inf.
  constexpr T kLowest = static_cast<T>(-1e38);
  for (int64_t column = 0; column < kTileQueries<T>; column += kLanes<T>) {
    store(s.row_max + column, splat(kLowest));
    store(s.row_sum + column, Vector<T>{});
  }

  const int64_t k_stride = padded / kDepth<Operand>;
  const Operand* const probabilities = reinterpret_cast<const Operand*>(s.scores);
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t range_end = tile.key_ranges[2 * r + 1];
    for (int64_t key = tile.key_ranges[2 * r]; key < range_end; key += kChunkKeys) {
      const int64_t n_keys = range_end - key < kChunkKeys ? range_end - key : kChunkKeys;
      const Operand* k_rows = static_cast<const Operand*>(tile.k_rows) + key * k_stride;
      const Operand* v_stack = static_cast<const Operand*>(tile.v_stack) + key / kDepth<Operand> * padded;
      std::memcpy(s.chunk_max, s.row_max, columns * sizeof(T));
      outer_product(n_keys, columns, operands<Operand>(p.head_dim), Broadcast<Operand>{k_rows, k_stride, 1},
                    Rows<Operand>{s.q_panel, kTileQueries<T>}, StoreScores<T>{s.scores, s.chunk_max, factor});
      online_softmax(s, n_keys, columns);
      outer_product(p.head_dim, columns, operands<Operand>(n_keys), Broadcast<Operand>{v_stack, 1, padded},
                    Rows<Operand>{probabilities, kTileQueries<T>}, RescaleAndAdd<T>{s.out_panel, s.correction});
    }
  }
  store_outputs<Storage>(tile, s);
}

}  // namespace

int64_t forward_scratch_bytes(int64_t head_dim, ScalarType dtype) {
  return dispatch(dtype, [&](auto storage) {
    return ForwardScratch<typename OperandOf<decltype(storage)>::Type>(nullptr, head_dim).scratch.used();
  });
}

void forward_tile(const ForwardTile& tile) {
  dispatch(tile.params->dtype, [&](auto storage) { forward_tile_of<decltype(storage)>(tile); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
