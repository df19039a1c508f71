// Merges the partial results of the items that share the keys of a tile of queries.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/precision.cuh"
#include "kernels/cuda/common/range_walk.cuh"
#include "kernels/cuda/common/shared_kernels.h"
#include "kernels/cuda/common/softmax.cuh"

namespace anchor_attention::cuda {

// Every lane gets the result; the order of the additions is that of the lanes.
__device__ inline float maximum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

__device__ inline float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// One block per item, one warp per row: the items of a tile divide its rows as they divided its keys, so that a few
// rows with many splits occupy as many multiprocessors as in the forward.
template <class P>
__global__ void __launch_bounds__(kMergeThreads) attention_merge(const __grid_constant__ MergeKernelParams p) {
  constexpr int kWarps = kMergeThreads / 32;
  const WorkItem work = find_work_item(p.schedule, blockIdx.x, p.heads, p.rows);
  if (work.n_splits == 1) return;
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  const auto* statistics = reinterpret_cast<const float2*>(p.partial.statistics);
  const int32_t first_row = work.split + static_cast<int32_t>(threadIdx.x / 32) * work.n_splits;
  for (int32_t row = first_row; row < work.end - work.begin; row += kWarps * work.n_splits) {
    const auto at = [&](int32_t split) { return partial_row(p.schedule, work, p.heads, p.rows, split) + row; };
    float maximum = -INFINITY;
    for (int32_t split = lane; split < work.n_splits; split += 32) maximum = fmaxf(maximum, statistics[at(split)].x);
    maximum = maximum_over_warp(maximum);
    const float shift = softmax_shift(maximum, 1.0f);
    float sum = 0.0f;
    for (int32_t split = lane; split < work.n_splits; split += 32) {
      const float2 of_split = statistics[at(split)];
      sum += ptx::exp2_approx(of_split.x - shift) * of_split.y;
    }
    sum = sum_over_warp(sum);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int64_t token = work.begin + row;
    if (lane == 0) {
      const int64_t batch_head = static_cast<int64_t>(work.batch) * p.heads + work.head;
      p.lse[batch_head * p.n_queries + token] = sum == 0.0f ? -INFINITY : (shift + ptx::log2_approx(sum)) * kLn2;
    }
    auto* out = static_cast<typename P::Storage*>(p.out) +
                ((static_cast<int64_t>(work.batch) * p.n_queries + token) * p.heads + work.head) * p.value_dim;
    for (int32_t channel = 2 * lane; channel < p.value_dim; channel += 64) {
      float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 4
      for (int32_t split = 0; split < work.n_splits; ++split) {
        const float factor = ptx::exp2_approx(statistics[at(split)].x - shift);
        const float2 of_split = *reinterpret_cast<const float2*>(p.partial.out + at(split) * p.value_dim + channel);
        total.x = fmaf(factor, of_split.x, total.x);
        total.y = fmaf(factor, of_split.y, total.y);
      }
      store_pair<P>(out + channel, total.x * inverse, total.y * inverse);
    }
  }
}

template <class P>
const void* merge_kernel() {
  return reinterpret_cast<const void*>(&attention_merge<P>);
}

}  // namespace anchor_attention::cuda
