// Asynchronous copies from global to shared memory, in commit groups.
#pragma once

#include <cstdint>

namespace anchor_attention::ptx {

// Copies kBytes; where `read` is false it writes zeros and does not touch `global`, which may then point anywhere.
// `.cg` keeps streamed tiles out of L1.
template <int kBytes>
__device__ inline void cp_async_or_zero(uint32_t shared, const void* global, bool read) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int source_bytes = read ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  static_assert(kPending >= 0 && kPending < 8, "a pipeline deeper than its stages waits for nothing");
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace anchor_attention::ptx
