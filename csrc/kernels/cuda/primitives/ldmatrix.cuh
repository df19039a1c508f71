// Loads of four 8 × 16-byte matrices from shared memory into fragments. Lane l gives the address of row l % 8 of
// matrix l / 8, which must be 16-byte aligned.
#pragma once

#include <cstdint>

namespace anchor_attention::ptx {

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}

__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}

}  // namespace anchor_attention::ptx
