// Tile shapes of the sm_90a kernels. Plain C++: the launch plans and the kernels read the same tables.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/cuda/common/config.h"

namespace anchor_attention::sm90 {

using namespace cuda;

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;  // of every wgmma

// What the hardware grants a block, and what aligning dynamic shared memory to the widest swizzle may cost.
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kSharedAlignment = 1024;

// A block keeps 64 queries per consumer warpgroup and streams tiles of `keys` keys through `stages` buffers, which a
// warpgroup of producers fills. Rows in shared memory are cut into slabs of `slab_channels`, the span of a swizzle.
struct ForwardTile {
  int head_dim;
  int slab_channels;
  int consumers;
  int keys;
  int stages;
  int producer_registers;
  int consumer_registers;
  // One probability in this many is computed on the FMA units instead of the special-function units; 0: none.
  int polynomial_every;
  // Warpgroups issue their products in turns, so that one's softmax runs under the others' products.
  bool ping_pong;

  constexpr int threads() const { return (1 + consumers) * kWarpgroupThreads; }
  constexpr int queries() const { return consumers * kWarpgroupRows; }
  constexpr int slabs() const { return (head_dim + slab_channels - 1) / slab_channels; }
  constexpr int row_bytes() const { return 2 * slab_channels * slabs(); }
  constexpr int query_bytes() const { return kWarpgroupRows * row_bytes(); }  // of a warpgroup
  constexpr int tile_bytes() const { return keys * row_bytes(); }             // of keys or of values
};

// Registers of a consumer thread: scores (keys / 2), probabilities (keys / 4), output (head_dim / 2). A tile's
// exponentials take keys · 64 / 16 cycles of a multiprocessor, its products keys · 64 · head_dim · 4 / 4096: as long at
// head_dim 64, half as long at 32. There one exponential in sixteen goes to the FMA units; with one in eight, the
// instructions issued would take longer than the exponentials. The effect of polynomial_every and of ping_pong is not
// measured.
inline constexpr std::array<ForwardTile, 5> kForwardTiles = {{
    {32, 32, 3, 128, 4, 56, 152, 16, true},  // 64 + 32 + 16 registers; bound by exp2
    {48, 64, 3, 128, 3, 56, 152, 16, true},  // as 32; slabs of 64 channels whose last 16 the copies fill with zeros
    {64, 64, 3, 128, 3, 32, 160, 16, true},  // 64 + 32 + 32 registers let three warpgroups share a tile; 152 spill
    {96, 32, 2, 128, 3, 56, 224, 0, true},   // 64 + 32 + 48 registers exceed 160; 96 channels are three slabs of 32
    {128, 64, 2, 128, 3, 56, 224, 0, true},  // 64 + 32 + 64 registers; three stages fill shared memory
}};

constexpr ForwardTile forward_tile(int native_head_dim) {
  for (const ForwardTile& tile : kForwardTiles) {
    if (tile.head_dim == native_head_dim) return tile;
  }
  return {};
}

// Dynamic shared memory, in this order: queries, output, keys, values, then what ForwardShared in forward_stream.cuh
// describes.
constexpr int kForwardControlBytes = 256;
constexpr int forward_shared_bytes(const ForwardTile& tile, bool output_buffer) {
  return kSharedAlignment + (output_buffer ? 2 : 1) * tile.consumers * tile.query_bytes() +
         2 * tile.stages * tile.tile_bytes() + kForwardControlBytes;
}

// The output leaves through memory of its own, so that the next queries can be written while it is copied; where there
// is no room, at head size 128, through that of the queries.
constexpr bool has_output_buffer(const ForwardTile& tile) {
  return forward_shared_bytes(tile, true) <= kMaxSharedBytes;
}

constexpr int forward_shared_bytes(int native_head_dim) {
  const ForwardTile tile = forward_tile(native_head_dim);
  return forward_shared_bytes(tile, has_output_buffer(tile));
}

constexpr bool forward_tiles_are_consistent() {
  for (const ForwardTile& tile : kForwardTiles) {
    if ((tile.keys & (tile.keys - 1)) != 0) return false;  // schedules count tiles by shifts
    if (tile.keys % 32 != 0 || tile.stages < 2 || tile.head_dim % 16 != 0) return false;
    if (tile.slab_channels != 32 && tile.slab_channels != 64) return false;
    if (tile.query_bytes() % 1024 != 0 || tile.tile_bytes() % 1024 != 0) return false;
    if (forward_shared_bytes(tile.head_dim) > kMaxSharedBytes) return false;
    // Warpgroups redistribute the registers of the launch, 64 Ki in total, in multiples of eight per thread.
    const int at_launch = 65536 / tile.threads() / 8 * 8;
    if (tile.producer_registers + tile.consumers * tile.consumer_registers > (1 + tile.consumers) * at_launch)
      return false;
  }
  return true;
}
static_assert(forward_tiles_are_consistent(), "a tile shape breaks what the kernels assume");

}  // namespace anchor_attention::sm90
