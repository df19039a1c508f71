// Forward of one tile of queries, with the queries in the vectors' lanes: scores Sᵀ[key, query] and outputs
// Oᵀ[dim, query], so that the softmax needs no reduction across lanes and keys may begin and end anywhere.
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"
#include "kernels/cpu/vector/softmax.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
namespace {

// Panels lie strip by strip: [strips, ·, strip_columns].
template <typename Operand, typename T = Sum<Operand>>
struct ForwardScratch {
  ForwardScratch(void* base, const AttentionParams& p) : scratch(base) {
    const int64_t stride = row_stride<T>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
    q_panel = scratch.take<Operand>(operands<Operand>(p.head_dim) * kTileQueries<T>);
    out_panel = scratch.take<T>(p.value_dim * kTileQueries<T>);
    scores = scratch.take<T>(kChunkKeys * kStripColumns<T>);
    chunk_max = scratch.take<T>(kStripColumns<T>);
    correction = scratch.take<T>(kStripColumns<T>);
    row_max = scratch.take<T>(kTileQueries<T>);
    row_sum = scratch.take<T>(kTileQueries<T>);
    rows = scratch.take<T>(kTileQueries<T> * stride);
  }

  Scratch scratch;
  Operand* q_panel;  // [strips, operands of head_dim, strip_columns]
  T* out_panel;      // [strips, value_dim, strip_columns], not yet divided by row_sum
  T* scores;         // [chunk_keys, strip_columns], without scale; then probabilities [operands of keys, strip_columns]
  T* chunk_max;      // [strip_columns]
  T* correction;     // [strip_columns], what the earlier sums are multiplied by
  T* row_max;        // [tile_queries], in units of log 2
  T* row_sum;        // [tile_queries]
  T* rows;           // [tile_queries, row_stride of head_dim or value_dim], queries and then outputs
};

template <typename Target, typename Operand, typename T = Sum<Operand>>
ANCHOR_ATTENTION_INLINE void store_rows(const ForwardTile& tile, const ForwardScratch<Operand>& s, Target* out,
                                        int64_t out_stride, T* lse) {
  const int64_t value_dim = tile.params->value_dim;
  const int64_t stride = row_stride<T>(value_dim);
  from_panel(s.out_panel, s.row_sum, tile.n_queries, value_dim, stride, s.rows);
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    const T* row = s.rows + i * stride;
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
ANCHOR_ATTENTION_INLINE void begin_tile(const ForwardTile& tile, int64_t stride,
                                        const ForwardScratch<typename OperandOf<Storage>::Type>& s) {
  const AttentionParams& p = *tile.params;
  load_queries<Storage>(p, tile.batch, tile.head, tile.q_begin, tile.n_queries, stride, s.rows);
  // The maximum is taken of unscaled scores, so the factor must not turn their order round: its sign goes into q.
  if (p.scale < 0) {
    for (int64_t i = 0; i < tile.n_queries * stride; ++i) s.rows[i] = -s.rows[i];
  }
  to_panel(s.rows, tile.n_queries, stride, p.head_dim, s.q_panel);
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
  const int64_t columns = round_up_to_lanes<T>(tile.n_queries);
  const int64_t stride = row_stride<T>(p.head_dim), k_stride = stride / kDepth<Operand>;
  const int64_t v_stride = row_stride<T>(p.value_dim);
  const ForwardScratch<Operand> s(tile.scratch, p);
  const T factor = static_cast<T>((p.scale < 0 ? -p.scale : p.scale) * kLog2E);

  if (tile.first) begin_tile<Storage>(tile, stride, s);

  constexpr int64_t kStrip = kStripColumns<T>;
  const int64_t head_operands = operands<Operand>(p.head_dim);
  const Rows<Operand> probabilities{reinterpret_cast<const Operand*>(s.scores), kStrip};
  for (int64_t r = 0; r < tile.n_key_ranges; ++r) {
    const int64_t range_end = tile.key_ranges[2 * r + 1];
    for (int64_t key = tile.key_ranges[2 * r]; key < range_end; key += kChunkKeys) {
      const int64_t n_keys = range_end - key < kChunkKeys ? range_end - key : kChunkKeys;
      const Broadcast<Operand> k_rows{static_cast<const Operand*>(tile.k_rows) + key * k_stride, k_stride, 1};
      const Broadcast<Operand> v_columns{static_cast<const Operand*>(tile.v_stack) + key / kDepth<Operand> * v_stride,
                                         1, v_stride};
      for (int64_t strip = 0; strip < columns; strip += kStrip) {
        const int64_t vectors = (columns - strip < kStrip ? columns - strip : kStrip) / kLanes<T>;
        for (int64_t column = 0; column < kStrip; column += kLanes<T>) {
          store(s.chunk_max + column, splat(-kInfinity<T>));
        }
        strip_product(vectors, n_keys, head_operands, k_rows, Rows<Operand>{s.q_panel + strip * head_operands, kStrip},
                      strip, StoreScores<T>{s.scores, s.chunk_max});
        online_softmax<Operand>(s, n_keys, vectors, strip, factor);
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
