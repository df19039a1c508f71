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

// One or two blocks handle a tile of queries, a thread eight channels of two rows. The sums of a tile add up in order.
template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim>>
__global__ void __launch_bounds__(kQueryGradientThreads)
    attention_query_gradient(const __grid_constant__ QueryGradientKernelParams p) {
  constexpr int kQueries = Traits::kQueries;
  constexpr int kBlocks = kHeadDim / kChannelsPerThread;
  constexpr int kSumFloats = kQueries * kHeadDim;
  const uint32_t item = blockIdx.x / Traits::kQueryGradientBlocks;
  const WorkItem work = find_work_item(p.schedule, item, p.heads, kQueries);
  const int32_t word = work.group * kWordsPerGroup + 5;
  const int32_t first_sum = schedule_word(p.schedule, word);
  const int32_t n_sums = (schedule_word(p.schedule, word + kWordsPerGroup) - first_sum) / work.n_tiles;
  const int64_t sum =
      static_cast<int64_t>(item / p.schedule.n_items) * p.n_sums + first_sum + (work.accumulator - first_sum) * n_sums;

  const int i = static_cast<int>(blockIdx.x % Traits::kQueryGradientBlocks * kQueryGradientThreads + threadIdx.x);
  const int block = i / 8 % kBlocks;
  const int row = i / 8 / kBlocks * 16 + i % 8;
  if (row >= kQueries || 8 * block >= p.head_dim) return;
  float values[2][8] = {};
  const float4* fragments =
      reinterpret_cast<const float4*>(p.query_gradients + sum * kSumFloats) + fragment_index<Traits>(row, block);
#pragma unroll 4
  for (int32_t n = 0; n < n_sums; ++n) {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const float4 fragment = fragments[n * (kSumFloats / 4) + lane];
      values[0][2 * lane] += fragment.x;
      values[0][2 * lane + 1] += fragment.y;
      values[1][2 * lane] += fragment.z;
      values[1][2 * lane + 1] += fragment.w;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t token = work.begin + row + 8 * half;
    if (token >= work.end) continue;
#pragma unroll
    for (float& value : values[half]) value *= p.scale;
    if (p.q_freqs != nullptr) {
      const int64_t factors = work.batch * p.q_freqs_strides.batch + token * p.q_freqs_strides.token;
      rotate<P>(values[half], p.q_freqs + 2 * factors, 8 * block, -1.0f);
    }
    auto* out = static_cast<typename P::Storage*>(p.grad_q) +
                ((static_cast<int64_t>(work.batch) * p.n_queries + token) * p.heads + work.head) * p.head_dim;
    *reinterpret_cast<Chunk*>(out + 8 * block) = pack<P>(values[half]);
  }
}

template <class P, int kHeadDim>
const void* query_gradient_kernel() {
  return reinterpret_cast<const void*>(&attention_query_gradient<P, kHeadDim>);
}

}  // namespace anchor_attention::sm90
