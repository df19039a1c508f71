// Tiles of the sm_90 backward. Plain C++: the launch plans and the kernels read the same table.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/cuda/sm90/config.h"

namespace anchor_attention::sm90 {

// One warpgroup moves data, two multiply; each of the two keeps 64 keys, the rows of one wgmma.
constexpr int kBackwardKeys = 128;
constexpr int kBackwardConsumers = 256;
constexpr int kBackwardThreads = kWarpgroupThreads + kBackwardConsumers;
// 24 + 2 · 240 = 3 · 168, the registers that 384 threads are launched with.
constexpr int kBackwardProducerRegisters = 24;
constexpr int kBackwardConsumerRegisters = 240;
constexpr int kBackwardStages = 2;
constexpr int kQueryGradientThreads = 256;
constexpr int kChannelsPerThread = 8;  // of the gradient of the queries, for two rows

// A block keeps 128 keys and streams tiles of `queries`. Rows in shared memory are cut into blocks of `channels`, whose
// bytes are the span of a swizzle.
struct BackwardTile {
  int head_dim;
  int queries;
  int channels;

  // dQ of a tile, queries × head_dim, is shared by queries or, where these are 64, by channels.
  constexpr int channels_of_query_gradient() const { return queries == 128 ? head_dim : head_dim / 2; }
  constexpr int swizzle_bytes() const { return 2 * channels; }
  constexpr int key_tile_bytes() const { return kBackwardKeys * head_dim * 2; }
  constexpr int query_tile_bytes() const { return queries * head_dim * 2; }
  constexpr int score_tile_bytes() const { return kBackwardKeys * queries * 2; }
  constexpr int query_gradient_bytes() const { return queries * head_dim * 4; }
  // Of the launch that rounds the sums of a tile.
  constexpr int query_gradient_blocks() const {
    return (queries / 2 * head_dim / kChannelsPerThread + kQueryGradientThreads - 1) / kQueryGradientThreads;
  }
};

// Registers of a multiplying thread: two tiles of scores (queries), dK and dV (head_dim).
inline constexpr std::array<BackwardTile, 5> kBackwardTiles = {{
    {32, 128, 32},  // 128 + 32: bound by exp2
    {48, 128, 16},  // 128 + 48; 48 channels are no multiple of a wider swizzle
    {64, 128, 64},  // 128 + 64
    {96, 64, 16},   // 64 + 96; 128 queries would leave no other registers; dQ is cut in halves of 48 channels
    {128, 64, 64},  // 64 + 128
}};

constexpr BackwardTile backward_tile(int native_head_dim) {
  for (const BackwardTile& tile : kBackwardTiles) {
    if (tile.head_dim == native_head_dim) return tile;
  }
  return {};
}

// The first native size that holds `head_dim`, or 0.
constexpr int backward_native_head_dim(int64_t head_dim) {
  for (const BackwardTile& tile : kBackwardTiles) {
    if (head_dim > 0 && head_dim <= tile.head_dim) return tile.head_dim;
  }
  return 0;
}

// Dynamic shared memory, in this order; every tile begins at a multiple of 1024 bytes, the period of the widest
// swizzle. Two tiles of score gradients, so that one barrier per tile of queries is enough.
struct BackwardShared {
  int k;
  int v;
  int q;
  int grad_out;
  int score_gradients;
  int query_gradients;
  int statistics;
  int total;
};

constexpr BackwardShared backward_shared(int native_head_dim) {
  const BackwardTile tile = backward_tile(native_head_dim);
  BackwardShared at{};
  at.v = tile.key_tile_bytes();
  at.q = at.v + tile.key_tile_bytes();
  at.grad_out = at.q + kBackwardStages * tile.query_tile_bytes();
  at.score_gradients = at.grad_out + kBackwardStages * tile.query_tile_bytes();
  at.query_gradients = at.score_gradients + 2 * tile.score_tile_bytes();
  at.statistics = at.query_gradients + tile.query_gradient_bytes();
  at.total = at.statistics + kBackwardStages * tile.queries * 8;
  return at;
}

// Shared memory that the kernel declares statically.
constexpr int kBackwardStaticSharedBytes = 256;

constexpr int backward_shared_bytes(int native_head_dim) {
  return backward_shared(native_head_dim).total + kSharedAlignment;
}

constexpr bool backward_tiles_are_consistent() {
  for (const BackwardTile& tile : kBackwardTiles) {
    if (tile.queries % 64 != 0 || tile.queries > 128 || tile.head_dim % tile.channels != 0) return false;
    if (tile.channels != 64 && tile.channels != 32 && tile.channels != 16) return false;
    if (tile.key_tile_bytes() % 1024 != 0 || tile.query_tile_bytes() % 1024 != 0) return false;
    if (backward_shared_bytes(tile.head_dim) + kBackwardStaticSharedBytes > kMaxSharedBytes) return false;
  }
  return true;
}
static_assert(backward_tiles_are_consistent(), "a tile breaks what the kernel assumes");

}  // namespace anchor_attention::sm90
