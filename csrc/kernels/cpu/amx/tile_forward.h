// Forward of one tile of queries on tile registers, queries in the columns as everywhere: Sᵀ[key, query], Oᵀ[dim,
// query]. A chunk of keys is used by the tile's queries 32 at a time, so that it is read from the second-level cache
// once.
#pragma once

#include "kernels/cpu/amx/tile_rows.h"
#include "kernels/cpu/kernel_table.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// Queries whose scores and probabilities exist at a time.
constexpr int64_t kBlockQueries = 32;

// With long rows the keys come from further away, so that more queries share them; and a block's outputs do not stay in
// the first-level cache: they are fetched once per chunk, so that it is longer.
constexpr int64_t forward_tile_queries(int64_t padded) { return padded <= 64 ? 64 : 128; }
constexpr int64_t forward_chunk_keys(int64_t padded) { return padded <= 64 ? 64 : 128; }
inline int64_t longer_row(const AttentionParams& p) {
  return round_up_to_tile_block(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
}

template <int kParts>
struct TileForwardScratch {
  TileForwardScratch(void* base, const AttentionParams& p)
      : scratch(base),
        padded(round_up_to_tile_block(p.head_dim)),
        padded_values(round_up_to_tile_block(p.value_dim)),
        chunk_keys(forward_chunk_keys(longer_row(p))) {
    const int64_t n_queries = forward_tile_queries(longer_row(p));
    rows = scratch.take<float>(n_queries * padded);
    scores = scratch.take<float>(chunk_keys * kBlockQueries);
    probabilities = scratch.take<BFloat16Pair>(kParts * chunk_keys / 2 * kBlockQueries);
    q_panel = scratch.take<BFloat16Pair>(kParts * padded / 2 * n_queries);
    out_panel = scratch.take<float>(padded_values * n_queries);
    row_max = scratch.take<float>(n_queries);
    row_sum = scratch.take<float>(n_queries);
    correction = scratch.take<float>(kBlockQueries);
  }

  Scratch scratch;
  int64_t padded;         // head_dim
  int64_t padded_values;  // value_dim
  int64_t chunk_keys;
  float* rows;                  // [tile_queries, padded_head_dim]
  float* scores;                // [chunk_keys, block_queries], without scale
  BFloat16Pair* probabilities;  // [parts, chunk_keys / 2, block_queries]
  BFloat16Pair* q_panel;        // [blocks, parts, padded_head_dim / 2, block_queries]
  float* out_panel;             // [blocks, padded_value_dim, block_queries], not yet divided by row_sum
  float* row_max;               // [tile_queries], in units of log 2
  float* row_sum;               // [tile_queries]
  float* correction;            // [block_queries], what the earlier sums are multiplied by

  BFloat16Pair* q_panel_of(int64_t block) const { return q_panel + block * kParts * padded / 2 * kBlockQueries; }
  float* out_panel_of(int64_t block) const { return out_panel + block * padded_values * kBlockQueries; }
};

// Turns the scores of a chunk for a block of queries into probabilities relative to the running maximum, in pairs of
// keys. Returns whether the maximum has grown anywhere. factor ≥ 0.
template <int kParts>
ANCHOR_ATTENTION_NOINLINE bool softmax_of_chunk(const TileForwardScratch<kParts>& s, int64_t block, int64_t n_keys,
                                                float factor) {
  const int64_t part = s.chunk_keys / 2 * kBlockQueries;
  bool grown = false;
  for (int64_t column = 0; column < kBlockQueries; column += kLanes<float>) {
    const float* scores = s.scores + column;
    BFloat16Pair* probabilities = s.probabilities + column;
    float* const row_max = s.row_max + block * kBlockQueries + column;
    float* const row_sum = s.row_sum + block * kBlockQueries + column;
    // Four chains: one would wait for its own last maximum.
    Vector<float> maxima[4] = {splat(-kInfinity<float>), splat(-kInfinity<float>), splat(-kInfinity<float>),
                               splat(-kInfinity<float>)};
    int64_t key = 0;
    for (; key + 4 <= n_keys; key += 4) {
      for (int i = 0; i < 4; ++i) maxima[i] = maximum(load(scores + (key + i) * kBlockQueries), maxima[i]);
    }
    for (; key < n_keys; ++key) maxima[0] = maximum(load(scores + key * kBlockQueries), maxima[0]);
    const Vector<float> chunk_max = maximum(maximum(maxima[0], maxima[1]), maximum(maxima[2], maxima[3]));
    const Vector<float> old_max = load(row_max);
    const Vector<float> max = maximum(chunk_max * factor, old_max);
    const Vector<float> correction = exp2(old_max - max);
    Vector<float> sums[2] = {};
    for (key = 0; key + 2 <= n_keys; key += 2) {
      const Vector<float> first = exp2(load(scores + key * kBlockQueries) * factor - max);
      const Vector<float> second = exp2(load(scores + (key + 1) * kBlockQueries) * factor - max);
      store_pair_parts<kParts>(probabilities + key / 2 * kBlockQueries, part, first, second);
      sums[0] += first;
      sums[1] += second;
    }
    if (key < n_keys) {
      const Vector<float> last = exp2(load(scores + key * kBlockQueries) * factor - max);
      store_pair_parts<kParts>(probabilities + key / 2 * kBlockQueries, part, last, Vector<float>{});
      sums[0] += last;
    }
    // The products run over whole blocks of 32 keys.
    for (key = (n_keys + 1) / 2 * 2; key < round_up_to_tile_block(n_keys); key += 2) {
      store_pair_parts<kParts>(probabilities + key / 2 * kBlockQueries, part, Vector<float>{}, Vector<float>{});
    }
    store(row_max, max);
    store(row_sum, load(row_sum) * correction + (sums[0] + sums[1]));
    store(s.correction + column, correction);
    grown |= any_differs(max, old_max);
  }
  return grown;
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void rescale_outputs(const TileForwardScratch<kParts>& s, int64_t block, int64_t value_dim) {
  for (int64_t column = 0; column < kBlockQueries; column += kLanes<float>) {
    const Vector<float> correction = load(s.correction + column);
    for (int64_t d = 0; d < value_dim; ++d) {
      float* out = s.out_panel_of(block) + d * kBlockQueries + column;
      store(out, load(out) * correction);
    }
  }
}

template <typename Target, int kParts>
ANCHOR_ATTENTION_INLINE void store_tile_rows(const ForwardTile& tile, const TileForwardScratch<kParts>& s, Target* out,
                                             int64_t out_stride, float* lse) {
  constexpr double kLn2 = 0.6931471805599453;
  constexpr int64_t kWidth = kLanes<float>;
  const int64_t value_dim = tile.params->value_dim;
  for (int64_t first = 0; first < tile.n_queries; first += kWidth) {
    const float* panel = s.out_panel_of(first / kBlockQueries) + first % kBlockQueries;
    const int64_t n = tile.n_queries - first < kWidth ? tile.n_queries - first : kWidth;
    for (int64_t d = 0; d < value_dim; d += kWidth) {
      Vector<float> square[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) square[i] = load(panel + (d + i) * kBlockQueries);
      transpose_block<float>(square);
      const int64_t length = value_dim - d < kWidth ? value_dim - d : kWidth;
      for (int64_t i = 0; i < n; ++i) {
        const float sum = s.row_sum[first + i];
        const Vector<float> row = square[i] * (sum == 0 ? 0.0f : 1 / sum);
        Target* target = out + (first + i) * out_stride + d;
        if (length == kWidth) {
          store_narrow(target, row);
        } else {
          Target piece[kWidth];
          store_narrow(piece, row);
          std::memcpy(target, piece, length * sizeof(Target));
        }
      }
    }
  }
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    lse[i] = static_cast<float>((s.row_max[i] + log2(s.row_sum[i])) * kLn2);
  }
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void store_tile_outputs(const ForwardTile& tile, const TileForwardScratch<kParts>& s) {
  using Storage = TileStorage<kParts>;
  const AttentionParams& p = *tile.params;
  if (tile.partial_out != nullptr) {
    store_tile_rows(tile, s, static_cast<float*>(tile.partial_out), p.value_dim, static_cast<float*>(tile.partial_lse));
    return;
  }
  const int64_t out_stride = p.heads * p.value_dim;
  Storage* out =
      static_cast<Storage*>(p.out) + (tile.batch * p.n_queries + tile.q_begin) * out_stride + tile.head * p.value_dim;
  float* lse = static_cast<float*>(p.lse) + (tile.batch * p.heads + tile.head) * p.n_queries + tile.q_begin;
  store_tile_rows(tile, s, out, out_stride, lse);
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void begin_forward_tile(const ForwardTile& tile, int64_t blocks,
                                                const TileForwardScratch<kParts>& s) {
  const AttentionParams& p = *tile.params;
  load_queries<TileStorage<kParts>>(p, tile.batch, tile.head, tile.q_begin, tile.n_queries, s.padded, s.rows);
  // The maximum is taken of unscaled scores, so the factor must not turn their order round.
  if (p.scale < 0) {
    for (int64_t i = 0; i < tile.n_queries * s.padded; ++i) s.rows[i] = -s.rows[i];
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlockQueries;
    to_tile_panel<kParts>(s.rows + begin * s.padded, tile.n_queries - begin, s.padded, kBlockQueries,
                          s.q_panel_of(block));
  }
  // A finite start keeps −inf − (−inf) out of the exponent when every score so far is −inf.
  constexpr float kLowest = -1e38f;
  for (int64_t column = 0; column < blocks * kBlockQueries; column += kLanes<float>) {
    store(s.row_max + column, splat(kLowest));
    store(s.row_sum + column, Vector<float>{});
  }
}

template <typename Tiles, int kParts>
void tile_forward(const ForwardTile& tile) {
  constexpr double kLog2E = 1.4426950408889634;
  const AttentionParams& p = *tile.params;
  const TileForwardScratch<kParts> s(tile.scratch, p);
  const int64_t blocks = (tile.n_queries + kBlockQueries - 1) / kBlockQueries;

  const float factor = static_cast<float>((p.scale < 0 ? -p.scale : p.scale) * kLog2E);
  if (tile.first) begin_forward_tile(tile, blocks, s);

  Tiles::configure(full_tiles());
  KeyChunks chunks(tile.key_ranges, tile.n_key_ranges, 0, INT32_MAX, s.chunk_keys);
  bool has_outputs = !tile.first;
  for (KeyChunk chunk = chunks.next(); chunk.n_keys > 0; chunk = chunks.next()) {
    const TileOperand keys = key_rows<kParts>(tile.k_rows, chunk.key, s.padded);
    const TileOperand values = key_stack<kParts>(tile.v_stack, chunk.key, s.padded_values);
    const TileOperand probabilities = scratch_pairs(s.probabilities, s.chunk_keys / 2, kBlockQueries);
    const int64_t key_blocks = tile_blocks(chunk.n_keys);
    const int64_t head_blocks = s.padded / kTileBlock, value_blocks = s.padded_values / kTileBlock;
    constexpr int64_t kRowBytes = kBlockQueries * sizeof(float);
    for (int64_t block = 0; block < blocks; ++block) {
      const TileOperand queries = scratch_pairs(s.q_panel_of(block), s.padded / 2, kBlockQueries);
      multiply_tiles<Tiles, kParts>({keys, queries, s.scores, kRowBytes, key_blocks, 1, head_blocks, false});
      const bool grown = softmax_of_chunk(s, block, chunk.n_keys, factor);
      if (grown && has_outputs) rescale_outputs(s, block, p.value_dim);
      multiply_tiles<Tiles, kParts>(
          {values, probabilities, s.out_panel_of(block), kRowBytes, value_blocks, 1, key_blocks, has_outputs});
    }
    has_outputs = true;
  }
  Tiles::release();
  if (!has_outputs) std::memset(s.out_panel, 0, blocks * s.padded_values * kBlockQueries * sizeof(float));
  if (tile.last) store_tile_outputs(tile, s);
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
