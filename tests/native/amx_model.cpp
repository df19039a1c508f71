// The kernels for AMX on a model of its registers: an instruction set for tests, which runs everywhere.
#include "kernels/cpu/amx/tile_kernels.h"
#include "tile_model.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

extern const TileKernels kTileKernels{
    .name = "amx_model",
    .needs_amx = false,
    .bfloat16 = tile_product_kernels<tile_model::Tiles, 1>(),
    .split_float32 = tile_product_kernels<tile_model::Tiles, 2>(),
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
