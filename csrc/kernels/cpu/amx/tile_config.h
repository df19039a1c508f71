// The shapes of the tile registers, as the processor reads them: palette 1.
#pragma once

#include <cstdint>

namespace anchor_attention::cpu {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int kTileRegisters = 8;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Every register of full size.
constexpr TileConfig full_tiles() {
  TileConfig config;
  for (int tile = 0; tile < kTileRegisters; ++tile) {
    config.row_bytes[tile] = kTileRowBytes;
    config.rows[tile] = kTileRows;
  }
  return config;
}

}  // namespace anchor_attention::cpu
