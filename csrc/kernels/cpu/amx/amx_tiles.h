// AMX's tile registers: eight of 16 rows × 64 bytes, and a product of bfloat16 that adds to float32.
// Plain assembly, because GCC 12's intrinsics don't tell the compiler that configuring and loading read memory: stores
// before them may be dropped or come too late.
#pragma once

#include <cstdint>

#include "kernels/cpu/amx/tile_config.h"
#include "kernels/cpu/vector/simd.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

struct AmxTiles {
  static ANCHOR_ATTENTION_INLINE void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config));
  }

  static ANCHOR_ATTENTION_INLINE void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static ANCHOR_ATTENTION_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }

  // `row_bytes` lie between the starts of two rows.
  template <int kTile>
  static ANCHOR_ATTENTION_INLINE void load(const void* rows, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
  }

  template <int kTile>
  static ANCHOR_ATTENTION_INLINE void store(void* rows, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
  }

  // C[m, n] += Σ over pairs k of A[m, 2k] · B[k, 2n] + A[m, 2k + 1] · B[k, 2n + 1]
  template <int kC, int kA, int kB>
  static ANCHOR_ATTENTION_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
