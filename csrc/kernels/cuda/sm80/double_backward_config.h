// Tile shapes and parameters of the kernels of the second derivative. Plain C++.
#pragma once

#include "kernels/cuda/sm80/config.h"
#include "kernels/cuda/sm80/kernel_params.h"

namespace anchor_attention::sm80 {

enum class SecondPass : int32_t { query, key };

// 16 rows per warp: three scores of a step live beside the gradients. One stage, so that tangents of keys and values
// have room; other blocks compute meanwhile.
inline constexpr TileTable kSecondQuery16 = {{
    {32, 64, 32, 32, 4},
    {48, 64, 32, 32, 4},
    {64, 64, 32, 32, 4},   // 32 + 3 · 16 registers
    {96, 64, 32, 32, 4},   // 48 + 3 · 16 registers
    {128, 64, 32, 32, 4},  // 85 KiB where keys move
    {256, 32, 16, 16, 2},  // 128 + 3 · 8 registers
}};
inline constexpr TileTable kSecondQuery32 = {{
    {32, 64, 32, 16, 4},   // steps of 16: the split operands of three products need the registers
    {48, 64, 32, 16, 4},   // as 32
    {64, 64, 32, 16, 4},   // 85 KiB where keys move
    {96, 32, 16, 16, 2},   // 64 rows would need 100 KiB
    {128, 32, 16, 16, 2},  // 83 KiB where keys move
    {256, 16, 16, 16, 1},  // 81 KiB; 114 KiB where keys move
}};
inline constexpr TileTable kSecondKey16 = {{
    {32, 64, 32, 16, 4},
    {48, 64, 32, 16, 4},
    {64, 64, 32, 16, 4},   // 2 · 32 + 3 · 8 registers
    {96, 64, 32, 16, 4},   // 2 · 48 + 3 · 8 registers
    {128, 64, 32, 16, 4},  // 2 · 64 + 3 · 8 registers, 94 KiB where keys move
    {256, 32, 16, 16, 2},  // one gradient at a time: 128 registers
}};
inline constexpr TileTable kSecondKey32 = {{
    {32, 64, 32, 16, 4},
    {48, 64, 32, 16, 4},
    {64, 64, 32, 16, 4},   // 94 KiB where keys move
    {96, 48, 16, 16, 3},   // 94 KiB where keys move
    {128, 32, 16, 16, 2},  // one gradient at a time: both spill; 91 KiB where keys move
    {256, 16, 16, 16, 1},  // one gradient at a time; 81 KiB, 114 KiB where keys move
}};

// The widest heads whose gradients of keys and values fit the registers of a thread together.
constexpr int widest_head_of_both_second_gradients(Precision precision) {
  return bytes_per_element(precision) == 4 ? 96 : kWidestHeadOfBothGradients;
}

constexpr TileShape second_tile_shape(SecondPass pass, Precision precision, int native_head_dim) {
  const bool wide = bytes_per_element(precision) == 4;
  const TileTable& table =
      pass == SecondPass::query ? (wide ? kSecondQuery32 : kSecondQuery16) : (wide ? kSecondKey32 : kSecondKey16);
  for (const TileShape& shape : table) {
    if (shape.head_dim == native_head_dim) return shape;
  }
  return {};
}

// Tiles of the query pass: q, its tangent, dO; k, v and their tangents. Of the key pass: k, v and their tangents; q,
// its tangent, dO and four numbers for each query.
constexpr int second_shared_bytes(SecondPass pass, Precision precision, int native_head_dim, bool keys_move) {
  const TileShape shape = second_tile_shape(pass, precision, native_head_dim);
  const int of_keys = keys_move ? 4 : 2;
  const int rows = (pass == SecondPass::query ? 3 : of_keys) * shape.rows;
  const int columns = (pass == SecondPass::query ? of_keys : 3) * shape.columns;
  const int statistics = pass == SecondPass::key ? shape.columns * 16 : 0;
  return (rows + columns) * row_bytes(precision, native_head_dim) + statistics;
}

// The widest heads of float32, where keys or values move, need more than every architecture grants: 114 KiB.
constexpr bool second_tables_are_consistent() {
  for (const Precision precision : {Precision::bfloat16, Precision::tf32x3}) {
    for (const SecondPass pass : {SecondPass::query, SecondPass::key}) {
      for (const int head_dim : kHeadDims) {
        const TileShape shape = second_tile_shape(pass, precision, head_dim);
        if (shape.rows != 16 * shape.warps || shape.columns % shape.step != 0 || shape.step % 16 != 0) return false;
        const bool widest = precision == Precision::tf32x3 && head_dim == 256;
        if (second_shared_bytes(pass, precision, head_dim, !widest) > 99 * 1024) return false;
      }
    }
  }
  return true;
}
static_assert(second_tables_are_consistent(), "a tile shape breaks what the kernels assume");

struct DoubleBackwardKernelParams {
  TensorView q_tangent;  // data is null where the tensor does not move
  TensorView k_tangent;
  TensorView v_tangent;
  BackwardKernelParams backward;  // row_statistics: [batch, heads, n_queries, 4], see attention_row_statistics
};

}  // namespace anchor_attention::sm80
