// Tiles in shared memory as bulk tensor copies write them and wgmma reads them: slabs of rows, kSpan bytes long, whose
// 16-byte chunks are permuted.
#pragma once

#include <cstdint>

namespace anchor_attention::sm90 {

// Address bits from 4 up are XORed with those from 7 up, as many as number the chunks of a span; slabs begin at a
// multiple of 1024 bytes.
template <int kSpan>
__device__ constexpr uint32_t swizzled(uint32_t offset) {
  static_assert(kSpan == 32 || kSpan == 64 || kSpan == 128, "a swizzle of the hardware");
  return offset ^ (offset & (kSpan / 16 - 1) << 7) >> 3;
}

// Of 16-byte chunk `chunk` of a row, in a tile of slabs with kRows rows.
template <int kSpan, int kRows>
__device__ constexpr uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  constexpr uint32_t kChunks = kSpan / 16;
  return chunk / kChunks * (kRows * kSpan) + swizzled<kSpan>(row * kSpan + chunk % kChunks * 16);
}

}  // namespace anchor_attention::sm90
