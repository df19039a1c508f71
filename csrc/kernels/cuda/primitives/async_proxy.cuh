// Ordering between ordinary accesses and those of the tensor cores and of bulk copies (the asynchronous proxy), sm_90.
#pragma once

namespace anchor_attention::ptx {

// What this thread has written to shared memory becomes visible to wgmma and bulk copies. Each writing thread executes
// it before the barrier that the reader waits for.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory: between accesses of this thread, and those that it has synchronised with, and bulk
// copies.
__device__ inline void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace anchor_attention::ptx
