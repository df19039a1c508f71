// Forward of one tile of queries, with the queries in the vectors' lanes: scores Sᵀ[key, query] and outputs
// Oᵀ[dim, query], so that the softmax needs no reduction across lanes and keys may begin and end anywhere.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Panels lie strip by strip: [strips, ·, strip_columns].
template <typename Operand, typename T = Sum<Operand>>
struct ForwardScratch {
  ForwardScratch(void* base, const AttentionParams& p) : scratch(base) {
    const int64_t padded = round_up_to_lanes<T>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
    q_panel = scratch.take<Operand>(operands<Operand>(p.head_dim) * kTileQueries<T>);
    out_panel = scratch.take<T>(p.value_dim * kTileQueries<T>);
    scores = scratch.take<T>(kChunkKeys * kStripColumns<T>);
    chunk_max = scratch.take<T>(kStripColumns<T>);
    correction = scratch.take<T>(kStripColumns<T>);
    row_max = scratch.take<T>(kTileQueries<T>);
    row_sum = scratch.take<T>(kTileQueries<T>);
    rows = scratch.take<T>(kTileQueries<T> * padded);
  }

  Scratch scratch;
  Operand* q_panel;  // [strips, operands of head_dim, strip_columns]
  T* out_panel;      // [strips, value_dim, strip_columns], not yet divided by row_sum
  T* scores;         // [chunk_keys, strip_columns], without scale; then probabilities [operands of keys, strip_columns]
  T* chunk_max;      // [strip_columns]
  T* correction;     // [strip_columns], what the earlier sums are multiplied by
  T* row_max;        // [tile_queries], in units of log 2
  T* row_sum;        // [tile_queries]
  T* rows;           // [tile_queries, padded head_dim or value_dim], queries and then outputs
};

// Stores scores and keeps the maximum of every column.
template <typename T>
struct StoreScores {
  T* scores;
  T* chunk_max;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t) const {
    T* out = scores + row * kStripColumns<T>;
    for (int j = 0; j < kVectors; ++j) {
      Vector<T> max = load(chunk_max + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        max = maximum(block.value[i][j], max);
        store(out + i * kStripColumns<T> + j * kLanes<T>, block.value[i][j]);
      }
      store(chunk_max + j * kLanes<T>, max);
    }
  }
};

template <typename T>
struct RescaleAndAdd {
  T* out_strip;
  const T* correction;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> factor = load(correction + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        T* out = out_strip + (row + i) * kStripColumns<T> + j * kLanes<T>;
        store(out, load(out) * factor + block.value[i][j]);
      }
    }
  }
};

// Takes the chunk's maximum into the running one and turns scores into probabilities, relative to it. They overwrite
// the scores: an operand lies no later than the first of its scores. factor ≥ 0.
template <typename Operand, typename T = Sum<Operand>>
static ANCHOR_ATTENTION_NOINLINE void online_softmax(const ForwardScratch<Operand>& s, int64_t n_keys, int64_t vectors,
                                                     int64_t strip_begin, T factor) {
  constexpr int64_t kStride = kStripColumns<T>;
  for (int64_t column = 0; column < vectors * kLanes<T>; column += kLanes<T>) {
    const Vector<T> old_max = load(s.row_max + strip_begin + column);
    const Vector<T> max = maximum(load(s.chunk_max + column) * factor, old_max);
    const Vector<T> correction = exp2(old_max - max);
    // The chunk is summed by itself: one long chain would round each small term at the size of the whole sum.
    Vector<T> sum{};
    const T* scores = s.scores + column;
    Operand* probabilities = reinterpret_cast<Operand*>(s.scores) + column;
    if constexpr (kDepth<Operand> == 1) {
      int64_t key = 0;
      for (; key + 4 <= n_keys; key += 4) {
        Vector<T> p[4];
        for (int i = 0; i < 4; ++i) p[i] = load(scores + (key + i) * kStride) * factor - max;
        for (int i = 0; i < 4; ++i) p[i] = exp2(p[i]);
        for (int i = 0; i < 4; ++i) store(probabilities + (key + i) * kStride, p[i]);
        sum += (p[0] + p[1]) + (p[2] + p[3]);
      }
      for (; key < n_keys; ++key) {
        const Vector<T> probability = exp2(load(scores + key * kStride) * factor - max);
        store(probabilities + key * kStride, probability);
        sum += probability;
      }
    } else {
      for (int64_t key = 0; key < n_keys; key += 2) {
        const Vector<T> first = exp2(load(scores + key * kStride) * factor - max);
        Vector<T> second{};
        if (key + 1 < n_keys) second = exp2(load(scores + (key + 1) * kStride) * factor - max);
        store(probabilities + key / 2 * kStride, pair_up(first, second));
        sum += first + second;
      }
    }
    store(s.row_max + strip_begin + column, max);
    store(s.row_sum + strip_begin + column, load(s.row_sum + strip_begin + column) * correction + sum);
    store(s.correction + column, correction);
  }
}

template <typename Target, typename Operand, typename T = Sum<Operand>>
ANCHOR_ATTENTION_INLINE void store_rows(const ForwardTile& tile, const ForwardScratch<Operand>& s, Target* out,
                                        int64_t out_stride, T* lse) {
  const int64_t value_dim = tile.params->value_dim;
  const int64_t padded = round_up_to_lanes<T>(value_dim);
  for (int64_t column = 0; column < tile.n_queries; column += kLanes<T>) {
    const T* out_columns =
        s.out_panel + column / kStripColumns<T> * kStripColumns<T> * value_dim + column % kStripColumns<T>;
    // A sum of 0 says that every score was −inf: the output is 0, as without keys.
    const Vector<T> sum = load(s.row_sum + column);
    const Vector<T> inverse = sum == T(0) ? Vector<T>{} : 1 / sum;
    for (int64_t d = 0; d < padded; d += kLanes<T>) {
      Vector<T> block[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        block[i] = d + i < value_dim ? load(out_columns + (d + i) * kStripColumns<T>) * inverse : Vector<T>{};
      }
      transpose_block<T>(block);
      for (int i = 0; i < kLanes<T>; ++i) store(s.rows + (column + i) * padded + d, block[i]);
    }
  }
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    const T* row = s.rows + i * padded;
    for (int64_t d = 0; d < value_dim; ++d) out[i * out_stride + d] = narrow<Target>(row[d]);
    lse[i] = static_cast<T>((s.row_max[i] + log2(s.row_sum[i])) * kLn2);
  }
}

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void store_outputs(const ForwardTile& tile,
                                           const ForwardScratch<typename OperandOf<Storage>::Type>& s) {
  const AttentionParams& p = *tile.params;
  if (tile.partial_out != nullptr) {
    store_rows(tile, s, static_cast<T*>(tile.partial_out), p.value_dim, static_cast<T*>(tile.partial_lse));
    return;
  }
  const int64_t out_stride = p.heads * p.value_dim;
  Storage* out =
      static_cast<Storage*>(p.out) + (tile.batch * p.n_queries + tile.q_begin) * out_stride + tile.head * p.value_dim;
  T* lse = static_cast<T*>(p.lse) + (tile.batch * p.heads + tile.head) * p.n_queries + tile.q_begin;
  store_rows(tile, s, out, out_stride, lse);
}

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void begin_tile(const ForwardTile& tile, int64_t padded,
                                        const ForwardScratch<typename OperandOf<Storage>::Type>& s) {
  const AttentionParams& p = *tile.params;
  load_queries<Storage>(p, tile.batch, tile.head, tile.q_begin, tile.n_queries, padded, s.rows);
  // The maximum is taken of unscaled scores, so the factor must not turn their order round: its sign goes into q.
  if (p.scale < 0) {
    for (int64_t i = 0; i < tile.n_queries * padded; ++i) s.rows[i] = -s.rows[i];
  }
  to_panel(s.rows, tile.n_queries, padded, p.head_dim, s.q_panel);
  std::memset(s.out_panel, 0, p.value_dim * kTileQueries<T> * sizeof(T));
  // A finite start keeps −inf − (−inf) out of the exponent when every score so far is −inf.
  constexpr T kLowest = static_cast<T>(-1e38);
  for (int64_t column = 0; column < kTileQueries<T>; column += kLanes<T>) {
    store(s.row_max + column, splat(kLowest));
    store(s.row_sum + column, Vector<T>{});
  }
}

template <typename Storage, typename T = Working<Storage>>
void forward_tile_of(const ForwardTile& tile) {
  using Operand = typename OperandOf<Storage>::Type;
  const AttentionParams& p = *tile.params;
  const int64_t padded = round_up_to_lanes<T>(p.head_dim);
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const int64_t padded_values = round_up_to_lanes<T>(p.value_dim);
  const ForwardScratch<Operand> s(tile.scratch, p);
  const T factor = static_cast<T>((p.scale < 0 ? -p.scale : p.scale) * kLog2E);

  if (tile.first) begin_tile<Storage>(tile, padded, s);

  constexpr int64_t kStrip = kStripColumns<T>;
  const int64_t k_stride = padded / kDepth<Operand>;
  const int64_t head_operands = operands<Operand>(p.head_dim);
  const Rows<Operand> probabilities{reinterpret_cast<const Operand*>(s.scores), kStrip};
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t range_end = tile.key_ranges[2 * r + 1];
    for (int64_t key = tile.key_ranges[2 * r]; key < range_end; key += kChunkKeys) {
      const int64_t n_keys = range_end - key < kChunkKeys ? range_end - key : kChunkKeys;
      const Broadcast<Operand> k_rows{static_cast<const Operand*>(tile.k_rows) + key * k_stride, k_stride, 1};
      const Broadcast<Operand> v_columns{
          static_cast<const Operand*>(tile.v_stack) + key / kDepth<Operand> * padded_values, 1, padded_values};
      for (int64_t strip = 0; strip < columns; strip += kStrip) {
        const int64_t vectors = (columns - strip < kStrip ? columns - strip : kStrip) / kLanes<T>;
        for (int64_t column = 0; column < kStrip; column += kLanes<T>) {
          store(s.chunk_max + column, splat(-kInfinity<T>));
        }
        strip_product(vectors, n_keys, head_operands, k_rows, Rows<Operand>{s.q_panel + strip * head_operands, kStrip},
                      strip, StoreScores<T>{s.scores, s.chunk_max});
        online_softmax(s, n_keys, vectors, strip, factor);
        strip_product(vectors, p.value_dim, operands<Operand>(n_keys), v_columns, probabilities, strip,
                      RescaleAndAdd<T>{s.out_panel + strip * p.value_dim, s.correction});
      }
    }
  }
  if (tile.last) store_outputs<Storage>(tile, s);
}

}  // namespace

int64_t forward_scratch_bytes(const AttentionParams& p) {
  return dispatch(p.dtype, [&](auto storage) {
    return ForwardScratch<typename OperandOf<decltype(storage)>::Type>(nullptr, p).scratch.used();
  });
}

void forward_tile(const ForwardTile& tile) {
  dispatch(tile.params->dtype, [&](auto storage) { forward_tile_of<decltype(storage)>(tile); });
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
