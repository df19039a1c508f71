// Stores of four 8 × 16-byte matrices from fragments to shared memory (sm_90). Lane l gives the address of row l % 8 of
// matrix l / 8, which must be 16-byte aligned.
#pragma once

#include <cstdint>

namespace anchor_attention::ptx {

__device__ inline void stmatrix_x4(uint32_t shared_address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace anchor_attention::ptx
