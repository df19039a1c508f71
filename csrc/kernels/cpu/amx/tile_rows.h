// Operands of the products on tile registers: rows in memory or scratch → bfloat16, in one part or two.
#pragma once

#include <type_traits>

#include "kernels/cpu/amx/tile_product.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// One part: bfloat16 as it is. Two: a float32 as the sum of its rounding and the rounding of the rest.
template <int kParts>
using TileStorage = std::conditional_t<kParts == 1, BFloat16, float>;

// The part's element, and the rest in its place.
ANCHOR_ATTENTION_INLINE BFloat16 take_part(float& value) {
  const BFloat16 part = narrow<BFloat16>(value);
  value -= widen(part);
  return part;
}

// Keys or values as operand A, padded to 32 elements of the head. Summed along the row: rows. Summed over the rows:
// for each 32 keys a block of [head_dim, 32 keys]. The second part follows each row, or each block.
template <int kParts>
void pack_tile_rows(const PackRows& p) {
  using Storage = TileStorage<kParts>;
  const int64_t padded = round_up_to_tile_block(p.head_dim);
  const bool stacked = p.layout == PackedLayout::stack;
  BFloat16* const packed = static_cast<BFloat16*>(p.packed);
  const int64_t step = stacked ? kTileBlock : 1;
  const int64_t part = stacked ? padded * kTileBlock : padded;
  for (int64_t i = 0; i < p.n_rows; ++i) {
    const int32_t index = p.indices[i];
    const Storage* row = index < 0 ? nullptr : static_cast<const Storage*>(p.source) + index * p.source_stride;
    BFloat16* target = stacked ? packed + (i / kTileBlock * padded * kParts * kTileBlock + i % kTileBlock)
                               : packed + i * padded * kParts;
    for (int64_t d = 0; d < padded; ++d) {
      float value = row != nullptr && d < p.head_dim ? widen(row[d]) : 0.0f;
      for (int n = 0; n < kParts; ++n) target[d * step + n * part] = take_part(value);
    }
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

// A matrix in scratch as operand A: [rows, columns] of bfloat16 with its parts one behind the other, summed along its
// columns.
inline TileOperand scratch_rows(const BFloat16* data, int64_t rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(BFloat16));
  return {data, row_bytes, kTileBlock * row_bytes, kTileRowBytes, rows * row_bytes};
}

// A matrix in scratch as operand B: [pair_rows, columns] of pairs with its parts one behind the other.
inline TileOperand scratch_pairs(const BFloat16Pair* data, int64_t pair_rows, int64_t columns) {
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(BFloat16Pair));
  return {data, row_bytes, 2 * kTileRowBytes, kTileRows * row_bytes, pair_rows * row_bytes};
}

// Rows [n_rows, padded] → pairs along the row [padded / 2, columns]: B of a product that sums along the rows.
template <int kParts>
ANCHOR_ATTENTION_INLINE void to_tile_panel(const float* rows, int64_t n_rows, int64_t padded, int64_t columns,
                                           BFloat16Pair* panel) {
  for (int64_t d = 0; d < padded; d += 2) {
    for (int64_t i = 0; i < columns; ++i) {
      float first = i < n_rows ? rows[i * padded + d] : 0.0f;
      float second = i < n_rows ? rows[i * padded + d + 1] : 0.0f;
      for (int n = 0; n < kParts; ++n) {
        BFloat16Pair& target = panel[(n * padded / 2 + d / 2) * columns + i];
        target.values[0] = take_part(first);
        target.values[1] = take_part(second);
      }
    }
  }
}

// Rows [n_rows, padded] → pairs of rows [columns / 2, padded]: B of a product that sums over the rows.
template <int kParts>
ANCHOR_ATTENTION_INLINE void to_tile_stack(const float* rows, int64_t n_rows, int64_t padded, int64_t columns,
                                           BFloat16Pair* stack) {
  for (int64_t i = 0; i < columns; i += 2) {
    for (int64_t d = 0; d < padded; ++d) {
      float first = i < n_rows ? rows[i * padded + d] : 0.0f;
      float second = i + 1 < n_rows ? rows[(i + 1) * padded + d] : 0.0f;
      for (int n = 0; n < kParts; ++n) {
        BFloat16Pair& target = stack[(n * columns / 2 + i / 2) * padded + d];
        target.values[0] = take_part(first);
        target.values[1] = take_part(second);
      }
    }
  }
}

// Stores two vectors as pairs, element by element side by side; of two parts, the second one `part` pairs behind.
template <int kParts>
ANCHOR_ATTENTION_INLINE void store_pair_parts(BFloat16Pair* target, int64_t part, Vector<float> first,
                                              Vector<float> second) {
  store_pairs(target, first, second);
  if constexpr (kParts == 2) {
    store_pairs(target + part, rounding_remainder(first), rounding_remainder(second));
  }
}

// Stores two vectors one behind the other; of two parts, the second one `part` elements behind.
template <int kParts>
ANCHOR_ATTENTION_INLINE void store_row_parts(BFloat16* target, int64_t part, Vector<float> first,
                                             Vector<float> second) {
  store_rounded(target, first, second);
  if constexpr (kParts == 2) {
    store_rounded(target + part, rounding_remainder(first), rounding_remainder(second));
  }
}

// The keys of a tile, a chunk at a time; a chunk without keys is the end.
struct KeyChunk {
  int64_t key;
  int64_t n_keys;
};

class KeyChunks {
 public:
  KeyChunks(const int32_t* ranges, int64_t n_ranges, int64_t begin, int64_t end)
      : ranges_(ranges), n_ranges_(n_ranges), begin_(begin), end_(end) {}

  KeyChunk next() {
    for (; range_ < n_ranges_; ++range_, key_ = 0) {
      const int64_t first = ranges_[2 * range_] > begin_ ? ranges_[2 * range_] : begin_;
      const int64_t last = ranges_[2 * range_ + 1] < end_ ? ranges_[2 * range_ + 1] : end_;
      if (key_ < first) key_ = first;
      if (key_ >= last) continue;
      const KeyChunk chunk{key_, last - key_ < kChunkKeys ? last - key_ : kChunkKeys};
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
  int64_t range_ = 0;
  int64_t key_ = 0;
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
