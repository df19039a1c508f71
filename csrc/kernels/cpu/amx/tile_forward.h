// Forward of one tile of queries on tile registers, queries in the columns as everywhere: Sᵀ[key, query], Oᵀ[dim,
// query]. Three chunks of keys are in flight: while the vectors turn the scores of one into probabilities, the tile
// registers form the scores of the next and add the products of the last to the outputs.
#pragma once

#include "kernels/cpu/amx/tile_rows.h"
#include "kernels/cpu/kernels.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// Scores, probabilities and outputs of a tile stay in the first-level cache.
constexpr int64_t kForwardTileQueries = 32;

template <int kParts>
struct TileForwardScratch {
  TileForwardScratch(void* base, int64_t padded) : scratch(base) {
    rows = scratch.take<float>(kForwardTileQueries * padded);
    q_panel = scratch.take<BFloat16Pair>(kParts * padded / 2 * kForwardTileQueries);
    out_panel = scratch.take<float>(padded * kForwardTileQueries);
    for (int i = 0; i < 2; ++i) {
      scores[i] = scratch.take<float>(kChunkKeys * kForwardTileQueries);
      probabilities[i] = scratch.take<BFloat16Pair>(kParts * kChunkKeys / 2 * kForwardTileQueries);
    }
    row_max = scratch.take<float>(kForwardTileQueries);
    row_sum = scratch.take<float>(kForwardTileQueries);
    correction = scratch.take<float>(kForwardTileQueries);
  }

  Scratch scratch;
  float* rows;                     // [tile_queries, padded_head_dim]
  BFloat16Pair* q_panel;           // [parts, padded_head_dim / 2, tile_queries]
  float* out_panel;                // [padded_head_dim, tile_queries], not yet divided by row_sum
  float* scores[2];                // [chunk_keys, tile_queries], without scale
  BFloat16Pair* probabilities[2];  // [parts, chunk_keys / 2, tile_queries]
  float* row_max;                  // [tile_queries], in units of log 2
  float* row_sum;                  // [tile_queries]
  float* correction;               // [tile_queries], what the earlier sums are multiplied by
};

// Turns the scores of a chunk into probabilities relative to the running maximum, in pairs of keys, and steps through
// the queue meanwhile. Returns whether the maximum has grown anywhere. factor ≥ 0.
template <typename Queue, int kParts>
ANCHOR_ATTENTION_INLINE bool softmax_of_chunk(const TileForwardScratch<kParts>& s, int buffer, int64_t n_keys,
                                              float factor, Queue& queue) {
  constexpr int64_t kGroupKeys = 16;
  constexpr int64_t kQueries = kForwardTileQueries;
  const int64_t groups = kQueries / kLanes<float> * (tile_blocks(n_keys) * kTileBlock / kGroupKeys);
  const int64_t steps_per_group = (queue.steps() + groups - 1) / groups;
  float grown = 0;
  for (int64_t column = 0; column < kQueries; column += kLanes<float>) {
    const float* scores = s.scores[buffer] + column;
    BFloat16Pair* probabilities = s.probabilities[buffer] + column;
    queue.step();
    // Four chains: one would wait for its own last maximum.
    Vector<float> maxima[4] = {splat(-kInfinity<float>), splat(-kInfinity<float>), splat(-kInfinity<float>),
                               splat(-kInfinity<float>)};
    int64_t key = 0;
    for (; key + 4 <= n_keys; key += 4) {
      for (int i = 0; i < 4; ++i) maxima[i] = maximum(load(scores + (key + i) * kQueries), maxima[i]);
    }
    for (; key < n_keys; ++key) maxima[0] = maximum(load(scores + key * kQueries), maxima[0]);
    const Vector<float> chunk_max = maximum(maximum(maxima[0], maxima[1]), maximum(maxima[2], maxima[3]));
    const Vector<float> old_max = load(s.row_max + column);
    const Vector<float> max = maximum(chunk_max * factor, old_max);
    const Vector<float> correction = exp2(old_max - max);
    Vector<float> sum{};
    for (int64_t group = 0; group < n_keys; group += kGroupKeys) {
      for (int64_t i = 0; i < steps_per_group; ++i) queue.step();
      const int64_t group_end = n_keys - group < kGroupKeys ? n_keys : group + kGroupKeys;
      for (key = group; key + 2 <= group_end; key += 2) {
        const Vector<float> first = exp2(load(scores + key * kQueries) * factor - max);
        const Vector<float> second = exp2(load(scores + (key + 1) * kQueries) * factor - max);
        store_pair_parts<kParts>(probabilities + key / 2 * kQueries, kChunkKeys / 2 * kQueries, first, second);
        sum += first + second;
      }
      if (key < group_end) {
        const Vector<float> last = exp2(load(scores + key * kQueries) * factor - max);
        store_pair_parts<kParts>(probabilities + key / 2 * kQueries, kChunkKeys / 2 * kQueries, last, Vector<float>{});
        sum += last;
      }
    }
    // The products run over whole blocks of 32 keys.
    for (key = (n_keys + 1) / 2 * 2; key < round_up_to_tile_block(n_keys); key += 2) {
      store_pair_parts<kParts>(probabilities + key / 2 * kQueries, kChunkKeys / 2 * kQueries, Vector<float>{},
                               Vector<float>{});
    }
    store(s.row_max + column, max);
    store(s.row_sum + column, load(s.row_sum + column) * correction + sum);
    store(s.correction + column, correction);
    for (int lane = 0; lane < kLanes<float>; ++lane) grown += correction[lane] != 1.0f;
  }
  return grown > 0;
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void rescale_outputs(const TileForwardScratch<kParts>& s, int64_t head_dim) {
  for (int64_t column = 0; column < kForwardTileQueries; column += kLanes<float>) {
    const Vector<float> correction = load(s.correction + column);
    for (int64_t d = 0; d < head_dim; ++d) {
      float* out = s.out_panel + d * kForwardTileQueries + column;
      store(out, load(out) * correction);
    }
  }
}

template <typename Target, int kParts>
ANCHOR_ATTENTION_INLINE void store_tile_rows(const ForwardTile& tile, const TileForwardScratch<kParts>& s, Target* out,
                                             int64_t out_stride, float* lse) {
  constexpr double kLn2 = 0.6931471805599453;
  const int64_t head_dim = tile.params->head_dim;
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    const float inverse = s.row_sum[i] == 0 ? 0.0f : 1 / s.row_sum[i];
    for (int64_t d = 0; d < head_dim; ++d) {
      out[i * out_stride + d] = narrow<Target>(s.out_panel[d * kForwardTileQueries + i] * inverse);
    }
    lse[i] = static_cast<float>((s.row_max[i] + log2(s.row_sum[i])) * kLn2);
  }
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void store_tile_outputs(const ForwardTile& tile, const TileForwardScratch<kParts>& s) {
  using Storage = TileStorage<kParts>;
  const AttentionParams& p = *tile.params;
  if (tile.partial_out != nullptr) {
    store_tile_rows(tile, s, static_cast<float*>(tile.partial_out), p.head_dim, static_cast<float*>(tile.partial_lse));
    return;
  }
  const int64_t out_stride = p.heads * p.head_dim;
  Storage* out =
      static_cast<Storage*>(p.out) + (tile.batch * p.n_queries + tile.q_begin) * out_stride + tile.head * p.head_dim;
  float* lse = static_cast<float*>(p.lse) + (tile.batch * p.heads + tile.head) * p.n_queries + tile.q_begin;
  store_tile_rows(tile, s, out, out_stride, lse);
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void begin_forward_tile(const ForwardTile& tile, int64_t padded,
                                                const TileForwardScratch<kParts>& s) {
  constexpr int64_t kQueries = kForwardTileQueries;
  const AttentionParams& p = *tile.params;
  load_queries<TileStorage<kParts>>(p, tile.batch, tile.head, tile.q_begin, tile.n_queries, padded, s.rows);
  // The maximum is taken of unscaled scores, so the factor must not turn their order round.
  if (p.scale < 0) {
    for (int64_t i = 0; i < tile.n_queries * padded; ++i) s.rows[i] = -s.rows[i];
  }
  to_tile_panel<kParts>(s.rows, tile.n_queries, padded, kQueries, s.q_panel);
  std::memset(s.out_panel, 0, padded * kQueries * sizeof(float));
  // A finite start keeps −inf − (−inf) out of the exponent when every score so far is −inf.
  constexpr float kLowest = -1e38f;
  for (int64_t column = 0; column < kQueries; column += kLanes<float>) {
    store(s.row_max + column, splat(kLowest));
    store(s.row_sum + column, Vector<float>{});
  }
}

template <typename Tiles, int kParts>
void tile_forward(const ForwardTile& tile) {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr int64_t kQueries = kForwardTileQueries;
  const AttentionParams& p = *tile.params;
  const int64_t padded = round_up_to_tile_block(p.head_dim);
  const TileForwardScratch<kParts> s(tile.scratch, padded);

  const float factor = static_cast<float>((p.scale < 0 ? -p.scale : p.scale) * kLog2E);
  if (tile.first) begin_forward_tile(tile, padded, s);

  const auto scores = [&](const KeyChunk& chunk, int buffer) {
    return TileProduct{key_rows<kParts>(tile.k_rows, chunk.key, padded),
                       scratch_pairs(s.q_panel, padded / 2, kQueries),
                       s.scores[buffer],
                       kQueries * 4,
                       tile_blocks(chunk.n_keys),
                       kQueries / kTileBlock,
                       padded / kTileBlock,
                       false};
  };
  const auto outputs = [&](const KeyChunk& chunk, int buffer) {
    return TileProduct{key_stack<kParts>(tile.v_stack, chunk.key, padded),
                       scratch_pairs(s.probabilities[buffer], kChunkKeys / 2, kQueries),
                       s.out_panel,
                       kQueries * 4,
                       padded / kTileBlock,
                       kQueries / kTileBlock,
                       tile_blocks(chunk.n_keys),
                       true};
  };

  Tiles::configure(full_tiles());
  TileQueue<Tiles, kParts> queue;
  KeyChunks chunks(tile.key_ranges, tile.n_key_ranges, 0, INT32_MAX);
  KeyChunk last{0, 0};
  KeyChunk current = chunks.next();
  int buffer = 0;
  queue.add(scores(current, buffer));
  queue.finish();
  while (current.n_keys > 0) {
    const KeyChunk next = chunks.next();
    queue.clear();
    queue.add(scores(next, 1 - buffer));
    queue.add(outputs(last, 1 - buffer));
    const bool grown = softmax_of_chunk(s, buffer, current.n_keys, factor, queue);
    queue.finish();
    if (grown) rescale_outputs(s, p.head_dim);
    last = current;
    current = next;
    buffer = 1 - buffer;
  }
  queue.clear();
  queue.add(outputs(last, 1 - buffer));
  queue.finish();
  Tiles::release();
  if (tile.last) store_tile_outputs(tile, s);
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
