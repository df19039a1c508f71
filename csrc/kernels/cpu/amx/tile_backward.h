// Backward of one tile of queries on tile registers against a slice of its keys:
//   Pᵀ = 2^(Sᵀ − lse)        dSᵀ = Pᵀ · (V dOᵀ − delta)        dV += Pᵀ dO        dK += dSᵀ Q        dQᵀ += Kᵀ dSᵀ
#pragma once

#include "kernels/cpu/amx/tile_rows.h"
#include "kernels/cpu/kernel_table.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// Gradients of keys are read and written once per tile, so it is longer than the forward's.
constexpr int64_t kBackwardTileQueries = 64;

template <int kParts>
struct TileBackwardScratch {
  TileBackwardScratch(void* base, const AttentionParams& p)
      : scratch(base), padded(round_up_to_tile_block(p.head_dim)), padded_values(round_up_to_tile_block(p.value_dim)) {
    constexpr int64_t kQueries = kBackwardTileQueries;
    q_rows = scratch.take<float>(kQueries * padded);
    grad_out_rows = scratch.take<float>(kQueries * padded_values);
    q_panel = scratch.take<BFloat16Pair>(kParts * padded / 2 * kQueries);
    grad_out_panel = scratch.take<BFloat16Pair>(kParts * padded_values / 2 * kQueries);
    q_stack = scratch.take<BFloat16Pair>(kParts * kQueries / 2 * padded);
    grad_out_stack = scratch.take<BFloat16Pair>(kParts * kQueries / 2 * padded_values);
    grad_q_panel = scratch.take<float>(padded * kQueries);
    scores = scratch.take<float>(kChunkKeys * kQueries);
    grad_probabilities = scratch.take<float>(kChunkKeys * kQueries);
    probability_rows = scratch.take<BFloat16>(kParts * kChunkKeys * kQueries);
    grad_score_rows = scratch.take<BFloat16>(kParts * kChunkKeys * kQueries);
    grad_score_pairs = scratch.take<BFloat16Pair>(kParts * kChunkKeys / 2 * kQueries);
    lse = scratch.take<float>(kQueries);
    delta = scratch.take<float>(kQueries);
  }

  Scratch scratch;
  int64_t padded;                  // head_dim
  int64_t padded_values;           // value_dim
  float* q_rows;                   // [tile_queries, padded_head_dim], rotated
  float* grad_out_rows;            // [tile_queries, padded_value_dim]
  BFloat16Pair* q_panel;           // [parts, padded_head_dim / 2, tile_queries]
  BFloat16Pair* grad_out_panel;    // [parts, padded_value_dim / 2, tile_queries]
  BFloat16Pair* q_stack;           // [parts, tile_queries / 2, padded_head_dim]
  BFloat16Pair* grad_out_stack;    // [parts, tile_queries / 2, padded_value_dim]
  float* grad_q_panel;             // [padded_head_dim, tile_queries]
  float* scores;                   // [chunk_keys, tile_queries], without scale
  float* grad_probabilities;       // [chunk_keys, tile_queries]
  BFloat16* probability_rows;      // [parts, chunk_keys, tile_queries]
  BFloat16* grad_score_rows;       // [parts, chunk_keys, tile_queries]
  BFloat16Pair* grad_score_pairs;  // [parts, chunk_keys / 2, tile_queries]
  float* lse;                      // [tile_queries], in units of log 2; +inf makes a row's probabilities 0
  float* delta;                    // [tile_queries], Σ_d dO · O − grad_lse
};

// P and dS of two keys and 2 · kLanes queries. A key that does not exist has neither.
template <int kParts>
ANCHOR_ATTENTION_INLINE void grad_scores_of_pair(const TileBackwardScratch<kParts>& s, int64_t key, int64_t n_keys,
                                                 int64_t column, float factor) {
  constexpr int64_t kQueries = kBackwardTileQueries;
  constexpr int kWidth = kLanes<float>;
  Vector<float> grad_scores[2][2];
  for (int i = 0; i < 2; ++i) {
    Vector<float> probabilities[2] = {};
    grad_scores[i][0] = grad_scores[i][1] = Vector<float>{};
    const int64_t row = (key + i) * kQueries + column;
    if (key + i < n_keys) {
      for (int j = 0; j < 2; ++j) {
        const int64_t at = row + j * kWidth;
        probabilities[j] = exp2(load(s.scores + at) * factor - load(s.lse + column + j * kWidth));
        grad_scores[i][j] = probabilities[j] * (load(s.grad_probabilities + at) - load(s.delta + column + j * kWidth));
      }
    }
    store_row_parts<kParts>(s.probability_rows + row, kChunkKeys * kQueries, probabilities[0], probabilities[1]);
    store_row_parts<kParts>(s.grad_score_rows + row, kChunkKeys * kQueries, grad_scores[i][0], grad_scores[i][1]);
  }
  for (int j = 0; j < 2; ++j) {
    store_pair_parts<kParts>(s.grad_score_pairs + key / 2 * kQueries + column + j * kWidth, kChunkKeys / 2 * kQueries,
                             grad_scores[0][j], grad_scores[1][j]);
  }
}

// P and dS of a chunk for the tile's first `columns` queries.
template <int kParts>
ANCHOR_ATTENTION_NOINLINE void grad_scores_of_chunk(const TileBackwardScratch<kParts>& s, int64_t n_keys,
                                                    int64_t columns, float factor) {
  const int64_t rows = round_up_to_tile_block(n_keys);
  for (int64_t column = 0; column < columns; column += 2 * kLanes<float>) {
    for (int64_t key = 0; key < rows; key += 2) grad_scores_of_pair(s, key, n_keys, column, factor);
  }
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void add_tile_grad_q(const BackwardTile& tile, const TileBackwardScratch<kParts>& s) {
  const AttentionParams& f = tile.params->forward;
  float* grad_q = static_cast<float*>(tile.grad_q);
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    for (int64_t d = 0; d < f.head_dim; ++d)
      grad_q[i * tile.grad_q_stride + d] += s.grad_q_panel[d * kBackwardTileQueries + i];
  }
}

// The products of a tile's chunks.
template <int kParts>
struct BackwardProducts {
  const BackwardTile& tile;
  const TileBackwardScratch<kParts>& s;
  int64_t column_blocks;  // of the tile's queries

  static constexpr int64_t kQueries = kBackwardTileQueries;

  // `padded` is the length of the rows.
  TileProduct sum_over_head(const void* rows, const BFloat16Pair* panel, int64_t padded, const KeyChunk& chunk,
                            float* out) const {
    return {key_rows<kParts>(rows, chunk.key, padded),
            scratch_pairs(panel, padded / 2, kQueries),
            out,
            kQueries * 4,
            tile_blocks(chunk.n_keys),
            column_blocks,
            padded / kTileBlock,
            false};
  }

  TileProduct sum_over_queries(const BFloat16* rows, const BFloat16Pair* stack, int64_t padded, const KeyChunk& chunk,
                               void* grad_rows) const {
    return {scratch_rows(rows, kChunkKeys, kQueries),
            scratch_pairs(stack, kQueries / 2, padded),
            static_cast<float*>(grad_rows) + chunk.key * padded,
            padded * 4,
            tile_blocks(chunk.n_keys),
            padded / kTileBlock,
            column_blocks,
            true};
  }

  TileProduct grad_q(const KeyChunk& chunk) const {
    return {key_stack<kParts>(tile.k_stack, chunk.key, s.padded),
            scratch_pairs(s.grad_score_pairs, kChunkKeys / 2, kQueries),
            s.grad_q_panel,
            kQueries * 4,
            s.padded / kTileBlock,
            column_blocks,
            tile_blocks(chunk.n_keys),
            true};
  }

  template <typename Tiles>
  void form_scores(const KeyChunk& chunk) const {
    multiply_tiles<Tiles, kParts>(sum_over_head(tile.k_rows, s.q_panel, s.padded, chunk, s.scores));
    if (tile.grad_q == nullptr && tile.grad_k_rows == nullptr) return;
    multiply_tiles<Tiles, kParts>(
        sum_over_head(tile.v_rows, s.grad_out_panel, s.padded_values, chunk, s.grad_probabilities));
  }

  template <typename Tiles>
  void add_gradients(const KeyChunk& chunk) const {
    if (tile.grad_v_rows != nullptr) {
      multiply_tiles<Tiles, kParts>(
          sum_over_queries(s.probability_rows, s.grad_out_stack, s.padded_values, chunk, tile.grad_v_rows));
    }
    if (tile.grad_k_rows != nullptr) {
      multiply_tiles<Tiles, kParts>(sum_over_queries(s.grad_score_rows, s.q_stack, s.padded, chunk, tile.grad_k_rows));
    }
    if (tile.grad_q != nullptr) multiply_tiles<Tiles, kParts>(grad_q(chunk));
  }
};

template <typename Tiles, int kParts>
void tile_backward(const BackwardTile& tile) {
  using Storage = TileStorage<kParts>;
  constexpr double kLog2E = 1.4426950408889634;
  const AttentionParams& f = tile.params->forward;
  const int64_t columns = round_up_to_tile_block(tile.n_queries);
  const TileBackwardScratch<kParts> s(tile.scratch, f);
  KeyChunks chunks(tile.key_ranges, tile.n_key_ranges, tile.key_begin, tile.key_end, kChunkKeys);
  KeyChunk chunk = chunks.next();
  if (chunk.n_keys == 0) return;

  load_queries<Storage>(f, tile.batch, tile.head, tile.q_begin, tile.n_queries, s.padded, s.q_rows);
  load_statistics<Storage>(tile, columns, s.padded_values, s.grad_out_rows, s.lse, s.delta);
  to_tile_panel<kParts>(s.q_rows, tile.n_queries, s.padded, kBackwardTileQueries, s.q_panel);
  to_tile_panel<kParts>(s.grad_out_rows, tile.n_queries, s.padded_values, kBackwardTileQueries, s.grad_out_panel);
  to_tile_stack<kParts>(s.q_rows, tile.n_queries, s.padded, kBackwardTileQueries, s.q_stack);
  to_tile_stack<kParts>(s.grad_out_rows, tile.n_queries, s.padded_values, kBackwardTileQueries, s.grad_out_stack);
  std::memset(s.grad_q_panel, 0, s.padded * kBackwardTileQueries * sizeof(float));

  const float factor = static_cast<float>(f.scale * kLog2E);
  const BackwardProducts<kParts> products{tile, s, columns / kTileBlock};
  Tiles::configure(full_tiles());
  for (; chunk.n_keys > 0; chunk = chunks.next()) {
    products.template form_scores<Tiles>(chunk);
    grad_scores_of_chunk(s, chunk.n_keys, columns, factor);
    products.template add_gradients<Tiles>(chunk);
  }
  Tiles::release();
  if (tile.grad_q != nullptr) add_tile_grad_q(tile, s);
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
