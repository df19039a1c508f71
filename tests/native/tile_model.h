// The tile registers of AMX in software, as Intel's manual defines them (volume 2, LDTILECFG and TDPBF16PS): shapes
// come from the configuration, and what the processor would refuse is an exception. Everything has internal linkage:
// the instruction sets that include it must share no function.
#pragma once

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

#include "kernels/cpu/amx/tile_config.h"

namespace anchor_attention::tile_model {
namespace {

struct Register {
  unsigned char bytes[cpu::kTileRows][cpu::kTileRowBytes];
};

struct State {
  bool configured = false;
  cpu::TileConfig config;
  Register registers[cpu::kTileRegisters];
};

inline State& state() {
  static thread_local State instance;
  return instance;
}

inline void require(bool holds, const char* reason) {
  if (!holds) throw std::logic_error(reason);
}

inline const cpu::TileConfig& shapes() {
  require(state().configured, "a tile is used while no tiles are configured");
  return state().config;
}

inline void require_shape(int tile) {
  require(shapes().rows[tile] > 0, "a tile is used that the configuration leaves out");
}

inline void configure(const cpu::TileConfig& config) {
  require(config.palette == 1, "the palette is not 1");
  for (unsigned char byte : config.reserved) require(byte == 0, "a reserved byte of the configuration is not 0");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
    require(tile < cpu::kTileRegisters || (rows == 0 && row_bytes == 0), "a tile above 7 has a shape");
    require(rows <= cpu::kTileRows && row_bytes <= cpu::kTileRowBytes, "a tile is larger than 16 rows × 64 bytes");
    require((rows == 0) == (row_bytes == 0), "a tile has rows without bytes, or bytes without rows");
  }
  state() = State{true, config, {}};
}

inline void release() { state() = State{}; }

inline void zero(int tile) {
  require_shape(tile);
  state().registers[tile] = {};
}

inline void load(int tile, const void* rows, int64_t row_bytes) {
  require_shape(tile);
  state().registers[tile] = {};
  for (int row = 0; row < shapes().rows[tile]; ++row) {
    std::memcpy(state().registers[tile].bytes[row], static_cast<const char*>(rows) + row * row_bytes,
                shapes().row_bytes[tile]);
  }
}

inline void store(int tile, void* rows, int64_t row_bytes) {
  require_shape(tile);
  for (int row = 0; row < shapes().rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(rows) + row * row_bytes, state().registers[tile].bytes[row],
                shapes().row_bytes[tile]);
  }
}

// Denormals count as zero, whatever the processor's control register says.
inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

inline float element(const Register& tile, int row, int index) {
  unsigned short bits;
  std::memcpy(&bits, tile.bytes[row] + 2 * index, 2);
  const unsigned wide = static_cast<unsigned>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return flushed(value);
}

// The even and the odd elements of the summed axis are summed apart, by fused multiply-adds, and C is added last.
inline void multiply_add(int c, int a, int b) {
  for (int tile : {c, a, b}) require_shape(tile);
  require(c != a && c != b && a != b, "a product's three tiles are not different");
  require(shapes().row_bytes[c] % 4 == 0 && shapes().row_bytes[a] % 4 == 0 && shapes().row_bytes[b] % 4 == 0,
          "a row of a product's tile is not made of whole numbers");
  require(shapes().rows[c] == shapes().rows[a], "C and A differ in rows");
  require(shapes().row_bytes[c] == shapes().row_bytes[b], "C and B differ in columns");
  require(shapes().row_bytes[a] / 4 == shapes().rows[b], "A's columns are not B's rows");
  const Register& left = state().registers[a];
  const Register& right = state().registers[b];
  for (int m = 0; m < shapes().rows[c]; ++m) {
    for (int n = 0; n < shapes().row_bytes[c] / 4; ++n) {
      float sums[2] = {0.0f, 0.0f};
      for (int k = 0; k < shapes().rows[b]; ++k) {
        for (int i = 0; i < 2; ++i) {
          sums[i] = flushed(std::fma(element(left, m, 2 * k + i), element(right, k, 2 * n + i), sums[i]));
        }
      }
      float total;
      std::memcpy(&total, state().registers[c].bytes[m] + 4 * n, 4);
      total = flushed(flushed(total) + flushed(sums[0] + sums[1]));
      std::memcpy(state().registers[c].bytes[m] + 4 * n, &total, 4);
    }
  }
}

// The interface of the kernels.
struct Tiles {
  static void configure(const cpu::TileConfig& config) { tile_model::configure(config); }
  static void release() { tile_model::release(); }
  template <int kTile>
  static void zero() {
    tile_model::zero(kTile);
  }
  template <int kTile>
  static void load(const void* rows, int64_t row_bytes) {
    tile_model::load(kTile, rows, row_bytes);
  }
  template <int kTile>
  static void store(void* rows, int64_t row_bytes) {
    tile_model::store(kTile, rows, row_bytes);
  }
  template <int kC, int kA, int kB>
  static void multiply_add() {
    tile_model::multiply_add(kC, kA, kB);
  }
};

}  // namespace
}  // namespace anchor_attention::tile_model
