// The emulator's own encoding of a tensor map, in place of the driver's opaque 128 bytes: tensor_map.py writes it.
#pragma once

#include <array>
#include <cstdint>

namespace emulator {

constexpr uint32_t kTensorMapBytes = 128;
constexpr uint32_t kTensorMapAlignment = 64;
constexpr uint32_t kTensorMapMagic = 0x544d4150;
constexpr int kMaxRank = 5;

struct TensorMap {
  uint32_t magic;
  uint8_t element_bytes;
  uint8_t is_float32;
  uint8_t rank;
  uint8_t swizzle_mask;  // which of the address bits 7 to 9 are added, without carry, to the bits 4 to 6
  uint64_t address;
  std::array<uint64_t, kMaxRank - 1> strides;  // bytes, of the dimensions behind the innermost
  std::array<uint32_t, kMaxRank> dims;         // elements − 1
  std::array<uint16_t, kMaxRank> box;          // elements
};
static_assert(sizeof(TensorMap) <= kTensorMapBytes);

}  // namespace emulator
