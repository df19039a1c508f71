// The table of the steps on tile registers. `Tiles` has the operations of AmxTiles.
#pragma once

#include "kernels/cpu/amx/tile_backward.h"
#include "kernels/cpu/amx/tile_forward.h"
#include "kernels/cpu/kernel_table.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

template <typename Tiles, int kParts>
constexpr ProductKernels tile_product_kernels() {
  return {
      .packing =
          {
              .key_alignment = [](ScalarType) { return kTileBlock; },
              .packed_row_bytes =
                  [](int64_t head_dim, ScalarType) {
                    return round_up_to_tile_block(head_dim) * kParts * static_cast<int64_t>(sizeof(BFloat16));
                  },
              .sum_row_bytes =
                  [](int64_t head_dim, ScalarType) {
                    return round_up_to_tile_block(head_dim) * static_cast<int64_t>(sizeof(float));
                  },
              .pack_rows = pack_tile_rows<kParts>,
          },
      .forward_tile_queries = [](const AttentionParams& p) { return forward_tile_queries(longer_row(p)); },
      .backward_tile_queries = [](ScalarType) { return kBackwardTileQueries; },
      .forward_scratch_bytes =
          [](const AttentionParams& p) { return TileForwardScratch<kParts>(nullptr, p).scratch.used(); },
      .backward_scratch_bytes =
          [](const AttentionParams& p) { return TileBackwardScratch<kParts>(nullptr, p).scratch.used(); },
      .forward_tile = tile_forward<Tiles, kParts>,
      .backward_tile = tile_backward<Tiles, kParts>,
  };
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
