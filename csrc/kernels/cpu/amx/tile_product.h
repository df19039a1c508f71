// Products on tile registers.
#pragma once

#include <cstdint>

#include "kernels/cpu/amx/tile_config.h"
#include "kernels/cpu/vector/simd.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// Rows, columns and summed elements of a block: two by two registers of C, one register deep.
constexpr int64_t kTileBlock = 32;

constexpr int64_t tile_blocks(int64_t n) { return (n + kTileBlock - 1) / kTileBlock; }
constexpr int64_t round_up_to_tile_block(int64_t n) { return tile_blocks(n) * kTileBlock; }

// An operand of `multiply_tiles` in memory. The rows of A lie along the summed axis; a row of B holds, for each column,
// two elements that are neighbours on the summed axis. Where float32 is split into two parts of bfloat16, the part of
// the lower bits lies `low_part_bytes` behind the other one.
struct TileOperand {
  const void* data;
  int64_t row_bytes;    // from row to row of a register
  int64_t block_bytes;  // to the next 32 rows of C for A, to the next 32 columns for B
  int64_t step_bytes;   // to the next 32 elements of the summed axis
  int64_t low_part_bytes;
};

// C[32 · row_blocks, 32 · column_blocks] = A · B, or += where `accumulate` is set, summed over 32 · steps elements.
struct TileProduct {
  TileOperand a;
  TileOperand b;
  float* c;
  int64_t c_row_bytes;
  int64_t row_blocks;
  int64_t column_blocks;
  int64_t steps;
  bool accumulate;
};

// One 32 × 32 block of C in four registers, and the four products of registers that a step of the summed axis adds.
template <typename Tiles, int kParts>
struct TileBlock {
  static ANCHOR_ATTENTION_INLINE void begin(const char* c, const TileProduct& p) {
    if (!p.accumulate) {
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      Tiles::template zero<2>();
      Tiles::template zero<3>();
      return;
    }
    Tiles::template load<0>(c, p.c_row_bytes);
    Tiles::template load<1>(c + kTileRowBytes, p.c_row_bytes);
    Tiles::template load<2>(c + kTileRows * p.c_row_bytes, p.c_row_bytes);
    Tiles::template load<3>(c + kTileRows * p.c_row_bytes + kTileRowBytes, p.c_row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void end(char* c, const TileProduct& p) {
    Tiles::template store<0>(c, p.c_row_bytes);
    Tiles::template store<1>(c + kTileRowBytes, p.c_row_bytes);
    Tiles::template store<2>(c + kTileRows * p.c_row_bytes, p.c_row_bytes);
    Tiles::template store<3>(c + kTileRows * p.c_row_bytes + kTileRowBytes, p.c_row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void step(const char* a, const char* b, const TileProduct& p) {
    load_a(a, p.a.row_bytes);
    if constexpr (kParts == 2) {
      // high · low + high · high + low · high: low · low is no larger than what two parts leave of a float32.
      load_b(b + p.b.low_part_bytes, p.b.row_bytes);
      multiply_registers();
      load_b(b, p.b.row_bytes);
      multiply_registers();
      load_a(a + p.a.low_part_bytes, p.a.row_bytes);
    } else {
      load_b(b, p.b.row_bytes);
    }
    multiply_registers();
  }

 private:
  static ANCHOR_ATTENTION_INLINE void load_a(const char* rows, int64_t row_bytes) {
    Tiles::template load<4>(rows, row_bytes);
    Tiles::template load<5>(rows + kTileRows * row_bytes, row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void load_b(const char* rows, int64_t row_bytes) {
    Tiles::template load<6>(rows, row_bytes);
    Tiles::template load<7>(rows + kTileRowBytes, row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void multiply_registers() {
    Tiles::template multiply_add<0, 4, 6>();
    Tiles::template multiply_add<1, 4, 7>();
    Tiles::template multiply_add<2, 5, 6>();
    Tiles::template multiply_add<3, 5, 7>();
  }
};

template <typename Tiles, int kParts>
ANCHOR_ATTENTION_NOINLINE void multiply_tiles(const TileProduct& p) {
  using Block = TileBlock<Tiles, kParts>;
  for (int64_t row = 0; row < p.row_blocks; ++row) {
    for (int64_t column = 0; column < p.column_blocks; ++column) {
      char* c = reinterpret_cast<char*>(p.c) + row * kTileBlock * p.c_row_bytes + column * 2 * kTileRowBytes;
      const char* a = static_cast<const char*>(p.a.data) + row * p.a.block_bytes;
      const char* b = static_cast<const char*>(p.b.data) + column * p.b.block_bytes;
      Block::begin(c, p);
      for (int64_t step = 0; step < p.steps; ++step)
        Block::step(a + step * p.a.step_bytes, b + step * p.b.step_bytes, p);
      Block::end(c, p);
    }
  }
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
