// Tile shapes of the sm_80 kernels. Plain C++: the launch plans and the kernels read the same tables.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/cuda/common/config.h"

namespace anchor_attention::sm80 {

using namespace cuda;

enum class Pass : int32_t { forward, backward_query, backward_key, jvp };

constexpr int kPipelineStages = 2;

// A block keeps `rows` tokens of one axis (queries in the forward and in the query pass, keys in the key pass) and
// streams `columns` tokens of the other per pipeline stage; a warp holds the scores of `step` columns at once.
struct TileShape {
  int head_dim;
  int rows;
  int columns;
  int step;
  int warps;
  static constexpr int max_registers = 255;  // of a thread: lets two blocks of four warps share a multiprocessor

  constexpr int threads() const { return 32 * warps; }
  constexpr int rows_per_warp() const { return rows / warps; }
};

using TileTable = std::array<TileShape, kHeadDims.size()>;

// 32 rows per warp let every key and value fragment feed two products, which halves shared-memory traffic; it is given
// up where accumulators (rows · head_dim / 32 registers a thread) leave no room. All shapes stay within the 99 KiB of
// shared memory that the smallest of the supported architectures grants a block.
inline constexpr TileTable kForward16 = {{
    {32, 128, 64, 64, 4},   // accumulators are small: bound by exp2
    {48, 128, 64, 64, 4},   // as 64
    {64, 128, 64, 64, 4},   // 64 + 64 registers of output and scores, two blocks per multiprocessor
    {96, 128, 32, 32, 4},   // 96 + 32 registers; 64 columns spill
    {128, 128, 32, 32, 4},  // 128 + 32 registers: one block, but 32 rows per warp
    {256, 64, 32, 32, 4},   // 16 rows per warp: 128 registers of output
}};
inline constexpr TileTable kForwardTf32 = {{
    {32, 128, 32, 32, 4},  // as 64
    {48, 128, 32, 32, 4},  // as 64
    {64, 128, 32, 32, 4},  // 64 + 32 registers; shared memory for two blocks
    {96, 64, 32, 32, 4},   // shared memory: 128 rows would need 102 KiB
    {128, 64, 32, 32, 4},  // exactly 99 KiB
    {256, 32, 16, 16, 2},  // 98 KiB; 16 rows per warp
}};
// Scores, once split, take twice the registers: half the columns. Three products per step make up for the barriers.
inline constexpr TileTable kForwardTf32x3 = {{
    {32, 128, 32, 32, 4},  // accumulators are small enough for 32 columns
    {48, 128, 16, 16, 4},  // as 64
    {64, 128, 16, 16, 4},  // 64 + 16 registers; 32 columns spill 180 bytes
    {96, 64, 16, 16, 4},   // as 64
    {128, 64, 16, 16, 4},  // as 64
    {256, 32, 16, 16, 2},  // 98 KiB; 16 rows per warp
}};

// Query pass: S, dP and dQ live together, so the scores are worked through in steps. So do S, its tangent and the
// tangent of the output, which is why jvp has the same tiles.
inline constexpr TileTable kBackwardQuery16 = {{
    {32, 128, 64, 32, 4},  // as 64
    {48, 128, 64, 32, 4},  // as 64
    {64, 128, 64, 32, 4},  // 64 + 2 · 32 registers
    {96, 64, 64, 32, 4},   // 16 rows per warp: 48 + 2 · 16 registers
    {128, 64, 32, 32, 4},  // 16 rows per warp: 64 + 2 · 16 registers
    {256, 32, 16, 16, 2},  // q, dO, k and v of 256 channels: 66 KiB
}};
inline constexpr TileTable kBackwardQuery32 = {{
    {32, 64, 32, 32, 4},   // 16 rows per warp: the split operands of three products need the registers
    {48, 64, 32, 32, 4},   // as 32
    {64, 64, 32, 32, 4},   // 70 KiB
    {96, 64, 16, 16, 4},   // 77 KiB
    {128, 32, 32, 16, 2},  // 101,376 bytes, all that is granted
    {256, 16, 16, 16, 1},  // q, dO and two stages of k, v: 98 KiB
}};

// Key pass: two accumulators of rows · head_dim.
inline constexpr TileTable kBackwardKey16 = {{
    {32, 128, 64, 32, 4},  // 2 · 32 + 2 · 32 registers
    {48, 128, 64, 16, 4},  // 2 · 48 + 2 · 16 registers
    {64, 128, 64, 16, 4},  // 2 · 64 + 2 · 16 registers
    {96, 64, 64, 16, 4},   // 16 rows per warp: 2 · 48 + 2 · 8 registers
    {128, 64, 32, 16, 4},  // 16 rows per warp: 2 · 64 + 2 · 8 registers
    {256, 32, 16, 16, 2},  // one gradient at a time: 128 registers
}};
inline constexpr TileTable kBackwardKey32 = {{
    {32, 64, 32, 16, 4},   // 16 rows per warp, as all of this table
    {48, 64, 32, 16, 4},   // as 64
    {64, 64, 32, 16, 4},   // 2 · 32 + 2 · 8 registers and the split operands
    {96, 64, 16, 16, 4},   // 77 KiB
    {128, 48, 16, 16, 3},  // 83 KiB; with 64 rows the row statistics pass 99 KiB
    {256, 16, 16, 16, 1},  // one gradient at a time: 128 registers
}};

constexpr const TileTable& tile_table(Pass pass, Precision precision) {
  const bool wide = bytes_per_element(precision) == 4;
  switch (pass) {
    case Pass::forward:
      if (precision == Precision::tf32x3) return kForwardTf32x3;
      return wide ? kForwardTf32 : kForward16;
    case Pass::backward_query:
    case Pass::jvp:
      return wide ? kBackwardQuery32 : kBackwardQuery16;
    default:
      return wide ? kBackwardKey32 : kBackwardKey16;
  }
}

constexpr TileShape tile_shape(Pass pass, Precision precision, int native_head_dim) {
  for (const TileShape& shape : tile_table(pass, precision)) {
    if (shape.head_dim == native_head_dim) return shape;
  }
  return {};
}

// One 16-byte chunk of padding makes the row stride an odd number of chunks, so that the eight rows of an ldmatrix (and
// the rows 2t of a transposed float32 operand) fall into different banks.
constexpr int row_bytes(Precision precision, int native_head_dim) {
  return native_head_dim * bytes_per_element(precision) + 16;
}

// Shared memory: `n_row_tiles` stationary tiles, two streamed tiles per stage (of jvp four in one stage where keys or
// values move), per-column statistics in the key pass.
constexpr int shared_bytes(Pass pass, Precision precision, int native_head_dim) {
  const TileShape shape = tile_shape(pass, precision, native_head_dim);
  const int n_row_tiles = pass == Pass::forward ? 1 : 2;
  const int statistics = pass == Pass::backward_key ? kPipelineStages * shape.columns * 8 : 0;
  return (n_row_tiles * shape.rows + 2 * kPipelineStages * shape.columns) * row_bytes(precision, native_head_dim) +
         statistics;
}

// Shared memory that a kernel declares statically; only the key pass does.
constexpr int static_shared_bytes(Pass pass) { return pass == Pass::backward_key ? 64 : 0; }

constexpr bool tables_are_consistent() {
  for (const Precision precision : {Precision::bfloat16, Precision::tf32, Precision::tf32x3}) {
    for (const Pass pass : {Pass::forward, Pass::backward_query, Pass::backward_key, Pass::jvp}) {
      for (const int head_dim : kHeadDims) {
        const TileShape shape = tile_shape(pass, precision, head_dim);
        if (shape.rows % (16 * shape.warps) != 0 || shape.columns % shape.step != 0 || shape.step % 16 != 0)
          return false;
        if ((shape.columns & (shape.columns - 1)) != 0) return false;  // schedules count tiles by shifts
        if (shape.columns > 64 || shape.rows_per_warp() > 32) return false;
        if (pass == Pass::forward && shape.step != shape.columns) return false;
        if (shared_bytes(pass, precision, head_dim) + static_shared_bytes(pass) > 99 * 1024) return false;
      }
    }
  }
  return true;
}
static_assert(tables_are_consistent(), "a tile shape breaks what the kernels assume");

}  // namespace anchor_attention::sm80
