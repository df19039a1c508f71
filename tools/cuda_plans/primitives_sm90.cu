// Kernels around the PTX primitives of sm_90a, for one warpgroup unless they say otherwise.
#include <cstdint>

#include "kernels/cuda/primitives/async_proxy.cuh"
#include "kernels/cuda/primitives/mbarrier.cuh"
#include "kernels/cuda/primitives/shared_memory.cuh"
#include "kernels/cuda/primitives/stmatrix.cuh"
#include "kernels/cuda/primitives/tma.cuh"
#include "kernels/cuda/primitives/warpgroup.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"

namespace ptx = anchor_attention::ptx;
using anchor_attention::TensorMap;

namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;

// A barrier for one arrival that every thread may wait for.
__device__ uint32_t make_barrier() {
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t address = ptx::shared_address(&barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(address, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return address;
}

// The pointers to the tensors are in their maps. at: coordinates of the box to load, then of the box to store. The tile
// is 2 KiB.
__device__ void copy_box(const int32_t* at, const TensorMap& source, const TensorMap& target) {
  __shared__ alignas(1024) uint8_t tile[2048];
  const uint32_t barrier = make_barrier();
  if (threadIdx.x != 0) return;
  ptx::prefetch_tensor_map(source);
  ptx::mbarrier_arrive_expect(barrier, sizeof(tile));
  ptx::tma_load(ptx::shared_address(tile), source, {at[0], at[1], at[2], at[3]}, barrier);
  ptx::mbarrier_wait(barrier, 0);
  ptx::tma_store(target, {at[4], at[5], at[6], at[7]}, ptx::shared_address(tile));
  ptx::bulk_commit();
  ptx::bulk_wait<0>();
}

// 128 floats, doubled on the way.
template <bool kAdds>
__device__ void copy_bytes(const float* in, float* out) {
  __shared__ alignas(16) float tile[kThreads];
  const uint32_t address = ptx::shared_address(tile);
  tile[threadIdx.x] = 2.0f * in[threadIdx.x];
  ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kAdds) {
      ptx::bulk_add(out, address, sizeof(tile));
    } else {
      ptx::bulk_store(out, address, sizeof(tile));
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// a, b: tiles as they lie in shared memory, kSpan / 2 long along K; with kFromRegisters, a is row by row. d: [64, kN].
template <int kN, int kSpan, ptx::MatrixType kType, ptx::Major kMajorA, ptx::Major kMajorB, bool kFromRegisters>
__device__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  constexpr int kDepth = kSpan / 2;
  constexpr int kWordsA = kRows * kDepth / 2;
  constexpr int kWordsB = kN * kDepth / 2;
  __shared__ alignas(1024) uint32_t tile_a[kWordsA];
  __shared__ alignas(1024) uint32_t tile_b[kWordsB];
  for (int i = threadIdx.x; i < kWordsA; i += kThreads) tile_a[i] = a[i];
  for (int i = threadIdx.x; i < kWordsB; i += kThreads) tile_b[i] = b[i];
  ptx::fence_async_proxy();
  __syncthreads();

  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first_row = threadIdx.x / 32 * 16 + lane / 4;
  float sums[kN / 2];
  for (int i = 0; i < kN / 2; ++i) {
    sums[i] = d[(first_row + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2];
  }
  uint32_t fragments[kDepth / 16][4];
  for (int i = 0; i < kDepth / 4; ++i) {
    fragments[i / 4][i % 4] = a[(first_row + i % 2 * 8) * kDepth / 2 + i / 4 * 8 + i / 2 % 2 * 4 + lane % 4];
  }
  ptx::keep_order(sums);
  ptx::keep_order(fragments);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    const auto descriptor = [&](const uint32_t* tile, ptx::Major major) {
      const uint32_t step = major == ptx::Major::contracted ? k * 2 : k * kSpan;
      return ptx::matrix_descriptor<kSpan>(ptx::shared_address(tile) + step, 8 * kSpan, kDepth * kSpan);
    };
    if constexpr (kFromRegisters) {
      ptx::Wgmma<kN>::template multiply<kType, kMajorB>(sums, fragments[k / 16], descriptor(tile_b, kMajorB), true);
    } else {
      ptx::Wgmma<kN>::template multiply<kType, kMajorA, kMajorB>(sums, descriptor(tile_a, kMajorA),
                                                                 descriptor(tile_b, kMajorB), true);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep_order(sums);
  for (int i = 0; i < kN / 2; ++i) {
    d[(first_row + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace

#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name

KERNEL(kThreads, tma_store)
(const int32_t* at, const float*, float*, const __grid_constant__ TensorMap source,
 const __grid_constant__ TensorMap target) {
  copy_box(at, source, target);
}
KERNEL(kThreads, bulk_store)(const float* in, float* out) { copy_bytes<false>(in, out); }
KERNEL(kThreads, bulk_add)(const float* in, float* out) { copy_bytes<true>(in, out); }
// in: one row of registers after the other; out: four 8 × 16-byte matrices.
KERNEL(32, stmatrix)(const uint32_t* in, uint32_t* out) {
  __shared__ alignas(16) uint32_t tile[128];
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in[32 * i + threadIdx.x];
  ptx::stmatrix_x4(ptx::shared_address(tile) + 16 * threadIdx.x, r);
  __syncwarp();
  for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = tile[32 * i + threadIdx.x];
}
// The first two warps hand values to the last two and do not wait for them.
KERNEL(kThreads, named_barriers)(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t values[64];
  if (threadIdx.x < 64) {
    values[threadIdx.x] = in[threadIdx.x];
    ptx::named_barrier_arrive(3, kThreads);
  } else {
    ptx::named_barrier_sync(3, kThreads);
    out[threadIdx.x - 64] = values[threadIdx.x - 64];
  }
}
// One warpgroup of three gives its registers to the others.
KERNEL(3 * kThreads, registers)(uint32_t* out) {
  if (threadIdx.x < kThreads) {
    ptx::release_registers<24>();
  } else {
    ptx::acquire_registers<240>();
  }
  out[threadIdx.x] = threadIdx.x;
}

#define MULTIPLY(n, span)                                                                                     \
  KERNEL(kThreads, wgmma_##n##_kk)(const uint32_t* a, const uint32_t* b, float* d) {                          \
    multiply<n, span, ptx::MatrixType::bf16, ptx::Major::contracted, ptx::Major::contracted, false>(a, b, d); \
  }                                                                                                           \
  KERNEL(kThreads, wgmma_##n##_mn)(const uint32_t* a, const uint32_t* b, float* d) {                          \
    multiply<n, span, ptx::MatrixType::f16, ptx::Major::outer, ptx::Major::outer, false>(a, b, d);            \
  }                                                                                                           \
  KERNEL(kThreads, wgmma_##n##_rk)(const uint32_t* a, const uint32_t* b, float* d) {                          \
    multiply<n, span, ptx::MatrixType::f16, ptx::Major::contracted, ptx::Major::contracted, true>(a, b, d);   \
  }                                                                                                           \
  KERNEL(kThreads, wgmma_##n##_rn)(const uint32_t* a, const uint32_t* b, float* d) {                          \
    multiply<n, span, ptx::MatrixType::bf16, ptx::Major::contracted, ptx::Major::outer, true>(a, b, d);       \
  }

MULTIPLY(32, 64)
MULTIPLY(48, 32)
MULTIPLY(64, 128)
MULTIPLY(96, 64)
MULTIPLY(128, 128)

#undef MULTIPLY
#undef KERNEL
