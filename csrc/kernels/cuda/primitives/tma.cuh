// Bulk copies of the tensor memory accelerator (sm_90). One thread issues a copy for all.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/tensor_map.h"

namespace anchor_attention::ptx {

// Coordinates of a box's first element, fastest axis first. What lies outside of the tensor reads as zero.
struct Coordinates {
  int32_t channel;
  int32_t token;
  int32_t head;
  int32_t batch;
};

__device__ inline void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of a rank-4 tensor → shared memory; its bytes count towards the phase of `barrier`.
__device__ inline void tma_load(uint32_t shared, const TensorMap& map, const Coordinates& at, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4,%5}], "
      "[%6];" ::"r"(shared),
      "l"(&map), "r"(at.channel), "r"(at.token), "r"(at.head), "r"(at.batch), "r"(barrier)
      : "memory");
}

// Shared memory → a box of a rank-4 tensor, in the current bulk group of this thread. Outside of the tensor nothing is
// written.
__device__ inline void tma_store(const TensorMap& map, const Coordinates& at, uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1,%2,%3,%4}], [%5];" ::"l"(&map),
               "r"(at.channel), "r"(at.token), "r"(at.head), "r"(at.batch), "r"(shared)
               : "memory");
}

// Neighbouring bytes; both addresses and the count are multiples of 16.
__device__ inline void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}

// global[i] += shared[i] for neighbouring floats, each addition atomic at the scope of the device.
__device__ inline void bulk_add(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest bulk groups are incomplete.
template <int kPending>
__device__ inline void bulk_wait() {
  static_assert(kPending >= 0 && kPending < 8, "a pipeline deeper than its buffers waits for nothing");
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// As bulk_wait, but only until the groups have read their shared memory, which may then be overwritten.
template <int kPending>
__device__ inline void bulk_wait_read() {
  static_assert(kPending >= 0 && kPending < 8, "a pipeline deeper than its buffers waits for nothing");
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace anchor_attention::ptx
