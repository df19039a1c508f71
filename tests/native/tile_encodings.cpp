// Every operation of AmxTiles beside the compiler's own intrinsic: the same instructions must come out.
#include <immintrin.h>

#include "kernels/cpu/amx/amx_tiles.h"

using Tiles = anchor_attention::cpu::ANCHOR_ATTENTION_ISA::AmxTiles;
using anchor_attention::cpu::TileConfig;

extern "C" {
void ours_configure(const TileConfig& config) { Tiles::configure(config); }
void theirs_configure(const TileConfig& config) { _tile_loadconfig(&config); }
void ours_release() { Tiles::release(); }
void theirs_release() { _tile_release(); }
void ours_zero() { Tiles::zero<5>(); }
void theirs_zero() { _tile_zero(5); }
void ours_load(const void* rows, long row_bytes) { Tiles::load<3>(rows, row_bytes); }
void theirs_load(const void* rows, long row_bytes) { _tile_loadd(3, rows, row_bytes); }
void ours_store(void* rows, long row_bytes) { Tiles::store<2>(rows, row_bytes); }
void theirs_store(void* rows, long row_bytes) { _tile_stored(2, rows, row_bytes); }
void ours_multiply_add() { Tiles::multiply_add<0, 4, 6>(); }
void theirs_multiply_add() { _tile_dpbf16ps(0, 4, 6); }
}
