// Hand-over of global memory between blocks, at the scope of the device.
#pragma once

#include <cstdint>

namespace anchor_attention::ptx {

__device__ inline int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void store_release(int32_t* address, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Returns the value before the addition.
__device__ inline int32_t fetch_add_relaxed(int32_t* address, int32_t addend) {
  int32_t before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(addend) : "memory");
  return before;
}

}  // namespace anchor_attention::ptx
