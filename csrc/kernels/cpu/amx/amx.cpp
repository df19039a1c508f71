// The steps on the tile registers of the processor.
#include "kernels/cpu/amx/amx_tiles.h"
#include "kernels/cpu/amx/tile_kernels.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

extern const TileKernels kTileKernels{
    .name = "amx",
    .needs_amx = true,
    .bfloat16 = tile_product_kernels<AmxTiles, 1>(),
    .split_float32 = tile_product_kernels<AmxTiles, 2>(),
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
