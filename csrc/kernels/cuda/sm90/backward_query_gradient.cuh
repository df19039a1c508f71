// Float32 sums of the gradient of the queries, as the backward leaves them, → the gradient.
#pragma once

#include "kernels/cuda/common/range_walk.cuh"
#include "kernels/cuda/common/rows.cuh"
#include "kernels/cuda/sm90/backward_params.h"
#include "kernels/cuda/sm90/backward_products.cuh"

namespace anchor_attention::sm90 {

// Where the four lanes of a row keep block `block` of eight channels of rows `row` and `row` + 8, of which `row` % 16
// is below 8: the accumulators of the two warpgroups, 16 bytes a thread.
template <class Traits>
__device__ inline int fragment_index(int row, int block) {
  constexpr int kBlocks = Traits::kQueryGradientChannels / 8;
  const int warpgroup = Traits::kQueries == 128 ? row / 64 : block / kBlocks;
  return block % kBlocks * kBackwardConsumers + warpgroup * kWarpgroupThreads + row % 64 / 16 * 32 + row % 8 * 4;
}

// A block handles a tile of queries, a thread eight channels of two rows at a time.
template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim>>
__global__ void __launch_bounds__(kQueryGradientThreads)
    attention_query_gradient(const __grid_constant__ QueryGradientKernelParams p) {
  constexpr int kQueries = Traits::kQueries;
  constexpr int kBlocks = kHeadDim / 8;
  const WorkItem work = find_work_item(p.schedule, blockIdx.x, p.heads, kQueries);
  const bool has_keys = work.first_range < work.last_range;
  const int64_t tile =
      static_cast<int64_t>(blockIdx.x / p.schedule.n_items) * p.n_query_tiles + blockIdx.x % p.schedule.n_items;
  const auto* sums = reinterpret_cast<const float4*>(p.query_gradients) + tile * (kQueries * kHeadDim / 4);
  for (int i = threadIdx.x; i < kQueries / 2 * kBlocks; i += kQueryGradientThreads) {
    const int block = i / 8 % kBlocks;
    const int row = i / 8 / kBlocks * 16 + i % 8;
    if (8 * block >= p.head_dim) continue;
    float values[2][8] = {};
    if (has_keys) {
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        const float4 fragment = sums[fragment_index<Traits>(row, block) + lane];
        values[0][2 * lane] = p.scale * fragment.x;
        values[0][2 * lane + 1] = p.scale * fragment.y;
        values[1][2 * lane] = p.scale * fragment.z;
        values[1][2 * lane + 1] = p.scale * fragment.w;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t token = work.begin + row + 8 * half;
      if (token >= work.end) continue;
      if (p.q_freqs != nullptr) {
        const int64_t factors = work.batch * p.q_freqs_strides.batch + token * p.q_freqs_strides.token;
        rotate<P>(values[half], p.q_freqs + 2 * factors, 8 * block, -1.0f);
      }
      auto* out = static_cast<typename P::Storage*>(p.grad_q) +
                  ((static_cast<int64_t>(work.batch) * p.n_queries + token) * p.heads + work.head) * p.head_dim;
      *reinterpret_cast<Chunk*>(out + 8 * block) = pack<P>(values[half]);
    }
  }
}

template <class P, int kHeadDim>
const void* query_gradient_kernel() {
  return reinterpret_cast<const void*>(&attention_query_gradient<P, kHeadDim>);
}

}  // namespace anchor_attention::sm90
