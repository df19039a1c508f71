// Products on tile registers that are issued step by step, so that a caller can put its vector instructions between.
#pragma once

#include <cstdint>

#include "kernels/cpu/amx/tile_config.h"
#include "kernels/cpu/vector/simd.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// Rows, columns and summed elements of a block: two by two registers of C, one register deep.
constexpr int64_t kTileBlock = 32;

constexpr int64_t tile_blocks(int64_t n) { return (n + kTileBlock - 1) / kTileBlock; }
constexpr int64_t round_up_to_tile_block(int64_t n) { return tile_blocks(n) * kTileBlock; }

// An operand of `tile_products` in memory. The rows of A lie along the summed axis; a row of B holds, for each column,
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

// A queue of products. A step multiplies one 32 × 32 × 32 block: four products of registers to four loads, which
// depend on nothing that the steps around them do, but for the C that they add to.
template <typename Tiles, int kParts>
class TileQueue {
 public:
  void clear() { first_ = last_ = 0; }

  ANCHOR_ATTENTION_INLINE void add(const TileProduct& product) {
    if (product.row_blocks * product.column_blocks * product.steps == 0) return;
    queue_[last_++] = product;
    if (last_ == first_ + 1) begin_product();
  }

  int64_t steps() const {
    int64_t n = 0;
    for (int i = first_; i < last_; ++i) n += queue_[i].row_blocks * queue_[i].column_blocks * queue_[i].steps;
    return n;
  }

  ANCHOR_ATTENTION_INLINE void step() {
    if (first_ == last_) return;
    const TileProduct& p = queue_[first_];
    if (step_ == 0) begin_block(p);
    multiply(p);
    if (++step_ < p.steps) return;
    end_block(p);
    step_ = 0;
    if (++column_ < p.column_blocks) return;
    column_ = 0;
    if (++row_ < p.row_blocks) return;
    ++first_;
    begin_product();
  }

  ANCHOR_ATTENTION_INLINE void finish() {
    while (first_ < last_) step();
  }

 private:
  static constexpr int kCapacity = 5;

  void begin_product() { row_ = column_ = step_ = 0; }

  static const char* at(const TileOperand& x, int64_t block, int64_t step) {
    return static_cast<const char*>(x.data) + block * x.block_bytes + step * x.step_bytes;
  }

  char* block_of_c(const TileProduct& p) const {
    return reinterpret_cast<char*>(p.c) + row_ * kTileBlock * p.c_row_bytes + column_ * 2 * kTileRowBytes;
  }

  ANCHOR_ATTENTION_INLINE void begin_block(const TileProduct& p) {
    if (!p.accumulate) {
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      Tiles::template zero<2>();
      Tiles::template zero<3>();
      return;
    }
    const char* c = block_of_c(p);
    Tiles::template load<0>(c, p.c_row_bytes);
    Tiles::template load<1>(c + kTileRowBytes, p.c_row_bytes);
    Tiles::template load<2>(c + kTileRows * p.c_row_bytes, p.c_row_bytes);
    Tiles::template load<3>(c + kTileRows * p.c_row_bytes + kTileRowBytes, p.c_row_bytes);
  }

  ANCHOR_ATTENTION_INLINE void end_block(const TileProduct& p) {
    char* c = block_of_c(p);
    Tiles::template store<0>(c, p.c_row_bytes);
    Tiles::template store<1>(c + kTileRowBytes, p.c_row_bytes);
    Tiles::template store<2>(c + kTileRows * p.c_row_bytes, p.c_row_bytes);
    Tiles::template store<3>(c + kTileRows * p.c_row_bytes + kTileRowBytes, p.c_row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void load_a(const TileOperand& x, const char* rows) {
    Tiles::template load<4>(rows, x.row_bytes);
    Tiles::template load<5>(rows + kTileRows * x.row_bytes, x.row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void load_b(const TileOperand& x, const char* rows) {
    Tiles::template load<6>(rows, x.row_bytes);
    Tiles::template load<7>(rows + kTileRowBytes, x.row_bytes);
  }

  static ANCHOR_ATTENTION_INLINE void multiply_registers() {
    Tiles::template multiply_add<0, 4, 6>();
    Tiles::template multiply_add<1, 4, 7>();
    Tiles::template multiply_add<2, 5, 6>();
    Tiles::template multiply_add<3, 5, 7>();
  }

  ANCHOR_ATTENTION_INLINE void multiply(const TileProduct& p) {
    const char* a = at(p.a, row_, step_);
    const char* b = at(p.b, column_, step_);
    load_a(p.a, a);
    if constexpr (kParts == 2) {
      // high · low + high · high + low · high: low · low is no larger than what two parts leave of a float32.
      load_b(p.b, b + p.b.low_part_bytes);
      multiply_registers();
      load_b(p.b, b);
      multiply_registers();
      load_a(p.a, a + p.a.low_part_bytes);
    } else {
      load_b(p.b, b);
    }
    multiply_registers();
  }

  TileProduct queue_[kCapacity];
  int first_ = 0;
  int last_ = 0;
  int64_t row_ = 0;
  int64_t column_ = 0;
  int64_t step_ = 0;
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
