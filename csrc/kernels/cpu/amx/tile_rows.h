// Operands of the products on tile registers: rows in memory or scratch → bfloat16, in one part or two.
#pragma once

#include <type_traits>

#include "kernels/cpu/amx/tile_product.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// One part: bfloat16 as it is. Two: a float32 as the sum of its rounding and the rounding of the rest.
template <int kParts>
using TileStorage = std::conditional_t<kParts == 1, BFloat16, float>;

// kLanes elements of a row from d on; beyond its n elements, zeros.
template <typename Storage>
ANCHOR_ATTENTION_INLINE Vector<float> load_widened(const Storage* row, int64_t d, int64_t n) {
  float piece[kLanes<float>];
  if (row != nullptr && d + kLanes<float> <= n) {
    for (int i = 0; i < kLanes<float>; ++i) piece[i] = widen(row[d + i]);
  } else {
    for (int i = 0; i < kLanes<float>; ++i) piece[i] = row != nullptr && d + i < n ? widen(row[d + i]) : 0.0f;
  }
  return load(piece);
}

// Stores two vectors as pairs, element by element side by side; of two parts, the second one `part` pairs further on.
template <int kParts>
ANCHOR_ATTENTION_INLINE void store_pair_parts(BFloat16Pair* target, int64_t part, Vector<float> first,
                                              Vector<float> second) {
  store_pairs(target, first, second);
  if constexpr (kParts == 2) {
    store_pairs(target + part, rounding_remainder(first), rounding_remainder(second));
  }
}

// Stores two vectors one after the other; of two parts, the second one `part` elements further on.
template <int kParts>
ANCHOR_ATTENTION_INLINE void store_row_parts(BFloat16* target, int64_t part, Vector<float> first,
                                             Vector<float> second) {
  store_rounded(target, first, second);
  if constexpr (kParts == 2) {
    store_rounded(target + part, rounding_remainder(first), rounding_remainder(second));
  }
}

// A square of pairs, as many as a vector has lanes along both axes.
constexpr int64_t kPairs = kLanes<float>;
using PairSquare = BFloat16Pair[kPairs][kPairs];

// Its columns become rows of `target`, `target_stride` pairs apart.
ANCHOR_ATTENTION_INLINE void store_transposed(const PairSquare& square, BFloat16Pair* target, int64_t target_stride) {
  Vector<float> block[kPairs];
  for (int i = 0; i < kPairs; ++i) block[i] = load(reinterpret_cast<const float*>(square[i]));
  transpose_block<float>(block);
  for (int i = 0; i < kPairs; ++i) store(reinterpret_cast<float*>(target + i * target_stride), block[i]);
}

template <int kParts>
ANCHOR_ATTENTION_INLINE void pack_tile_row(const TileStorage<kParts>* row, int64_t head_dim, int64_t padded,
                                           BFloat16* target) {
  if (kParts == 1 && row != nullptr) {
    std::memcpy(target, row, head_dim * sizeof(BFloat16));
    std::memset(target + head_dim, 0, (padded - head_dim) * sizeof(BFloat16));
    return;
  }
  for (int64_t d = 0; d < padded; d += 2 * kPairs) {
    store_row_parts<kParts>(target + d, padded, load_widened(row, d, head_dim),
                            load_widened(row, d + kPairs, head_dim));
  }
}

// 32 keys → [padded, 32 keys].
template <int kParts>
ANCHOR_ATTENTION_INLINE void pack_tile_stack(const TileStorage<kParts>* const (&rows)[kTileBlock], int64_t head_dim,
                                             int64_t padded, BFloat16* target) {
  constexpr int64_t kBlockPairs = kTileBlock / 2;
  auto* const pairs = reinterpret_cast<BFloat16Pair*>(target);  // [parts, padded, kBlockPairs]
  PairSquare squares[kParts];
  for (int64_t d = 0; d < padded; d += kPairs) {
    for (int64_t first = 0; first < kBlockPairs; first += kPairs) {
      for (int64_t i = 0; i < kPairs; ++i) {
        store_pair_parts<kParts>(squares[0][i], kPairs * kPairs, load_widened(rows[2 * (first + i)], d, head_dim),
                                 load_widened(rows[2 * (first + i) + 1], d, head_dim));
      }
      for (int64_t n = 0; n < kParts; ++n) {
        store_transposed(squares[n], pairs + (n * padded + d) * kBlockPairs + first, kBlockPairs);
      }
    }
  }
}

// Keys or values as operand A, padded to 32 elements of the head. Summed along the row: rows. Summed over the rows:
// for each 32 keys a block of [head_dim, 32 keys]. The second part follows each row, or each block.
template <int kParts>
void pack_tile_rows(const PackRows& p) {
  using Storage = TileStorage<kParts>;
  const int64_t padded = round_up_to_tile_block(p.head_dim);
  BFloat16* const packed = static_cast<BFloat16*>(p.packed);
  const auto source = [&](int64_t i) {
    const int32_t index = p.indices[i];
    return index < 0 ? nullptr : static_cast<const Storage*>(p.source) + index * p.source_stride;
  };
  if (p.layout == PackedLayout::rows) {
    for (int64_t i = 0; i < p.n_rows; ++i)
      pack_tile_row<kParts>(source(i), p.head_dim, padded, packed + i * padded * kParts);
    return;
  }
  for (int64_t block = 0; block < p.n_rows; block += kTileBlock) {
    const Storage* rows[kTileBlock];
    for (int64_t i = 0; i < kTileBlock; ++i) rows[i] = source(block + i);
    pack_tile_stack<kParts>(rows, p.head_dim, padded, packed + block * padded * kParts);
  }
}

// The packed keys from `key` on, as operand A of a product that sums along their rows, or over them.
template <int kParts>
TileOperand key_rows(const void* rows, int64_t key, int64_t padded) {
  const int64_t row_bytes = padded * kParts * static_cast<int64_t>(sizeof(BFloat16));
  return {static_cast<const char*>(rows) + key * row_bytes, row_bytes, kTileBlock * row_bytes, kTileRowBytes,
          padded * static_cast<int64_t>(sizeof(BFloat16))};
}

template <int kParts>
TileOperand key_stack(const void* stack, int64_t key, int64_t padded) {
  const int64_t row_bytes = padded * kParts * static_cast<int64_t>(sizeof(BFloat16));
  return {static_cast<const char*>(stack) + key * row_bytes, kTileRowBytes, kTileBlock * kTileRowBytes,
          kTileBlock * row_bytes, padded * kTileRowBytes};
}

// A matrix in scratch as operand A: [rows, columns] of bfloat16 with its parts one after the other, summed along its
// columns.
inline TileOperand scratch_rows(const BFloat16* data, int64_t rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(BFloat16));
  return {data, row_bytes, kTileBlock * row_bytes, kTileRowBytes, rows * row_bytes};
}

// A matrix in scratch as operand B: [pair_rows, columns] of pairs with its parts one after the other.
inline TileOperand scratch_pairs(const BFloat16Pair* data, int64_t pair_rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(BFloat16Pair));
  return {data, row_bytes, 2 * kTileRowBytes, kTileRows * row_bytes, pair_rows * row_bytes};
}

// Rows [n_rows, padded] → pairs along the row [padded / 2, columns]: B of a product that sums along the rows.
template <int kParts>
ANCHOR_ATTENTION_INLINE void to_tile_panel(const float* rows, int64_t n_rows, int64_t padded, int64_t columns,
                                           BFloat16Pair* panel) {
  PairSquare squares[kParts];
  for (int64_t column = 0; column < columns; column += kPairs) {
    for (int64_t d = 0; d < padded; d += 2 * kPairs) {
      for (int64_t i = 0; i < kPairs; ++i) {
        const float* row = rows + (column + i) * padded + d;
        const bool exists = column + i < n_rows;
        store_row_parts<kParts>(squares[0][i][0].values, 2 * kPairs * kPairs, exists ? load(row) : Vector<float>{},
                                exists ? load(row + kPairs) : Vector<float>{});
      }
      for (int64_t n = 0; n < kParts; ++n) {
        store_transposed(squares[n], panel + (n * padded + d) / 2 * columns + column, columns);
      }
    }
  }
}

// Rows [n_rows, padded] → pairs of rows [columns / 2, padded]: B of a product that sums over the rows.
template <int kParts>
ANCHOR_ATTENTION_INLINE void to_tile_stack(const float* rows, int64_t n_rows, int64_t padded, int64_t columns,
                                           BFloat16Pair* stack) {
  for (int64_t i = 0; i < columns; i += 2) {
    for (int64_t d = 0; d < padded; d += kPairs) {
      store_pair_parts<kParts>(stack + i / 2 * padded + d, columns / 2 * padded,
                               i < n_rows ? load(rows + i * padded + d) : Vector<float>{},
                               i + 1 < n_rows ? load(rows + (i + 1) * padded + d) : Vector<float>{});
    }
  }
}

// The keys of a tile, a chunk at a time; a chunk without keys is the end.
struct KeyChunk {
  int64_t key;
  int64_t n_keys;
};

class KeyChunks {
 public:
  KeyChunks(const int32_t* ranges, int64_t n_ranges, int64_t begin, int64_t end, int64_t chunk_keys)
      : ranges_(ranges), n_ranges_(n_ranges), begin_(begin), end_(end), chunk_keys_(chunk_keys) {}

  KeyChunk next() {
    for (; range_ < n_ranges_; ++range_, key_ = 0) {
      const int64_t first = ranges_[2 * range_] > begin_ ? ranges_[2 * range_] : begin_;
      const int64_t last = ranges_[2 * range_ + 1] < end_ ? ranges_[2 * range_ + 1] : end_;
      if (key_ < first) key_ = first;
      if (key_ >= last) continue;
      const KeyChunk chunk{key_, last - key_ < chunk_keys_ ? last - key_ : chunk_keys_};
      key_ += chunk.n_keys;
      return chunk;
    }
    return {0, 0};
  }

 private:
  const int32_t* ranges_;
  int64_t n_ranges_;
  int64_t begin_;
  int64_t end_;
  int64_t chunk_keys_;
  int64_t range_ = 0;
  int64_t key_ = 0;
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
