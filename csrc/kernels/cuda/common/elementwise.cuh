// The memory-bound kernels around the attention passes: row statistics of the backward, rotations, upload of schedules.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/rows.cuh"
#include "kernels/cuda/common/shared_kernels.h"
#include "kernels/cuda/common/softmax.cuh"

namespace anchor_attention::cuda {

struct TokenRow {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// Rows in the order [batch, tokens, heads], which is the order in memory of a contiguous tensor.
__device__ inline TokenRow token_row(int64_t row, int32_t tokens, int32_t heads) {
  const int64_t batch_token = row / heads;
  return {batch_token / tokens, batch_token % tokens, row % heads};
}

template <class P>
__device__ inline const typename P::Storage* row_pointer(const TensorView& tensor, const TokenRow& row) {
  return static_cast<const typename P::Storage*>(tensor.data) + row.batch * tensor.strides.batch +
         row.token * tensor.strides.token + row.head * tensor.strides.head;
}

// Of a row's channels that belong to one of the threads that share it.
template <class P>
__device__ inline float partial_dot(const TensorView& x, const TensorView& y, const TokenRow& at, int32_t part,
                                    int32_t channels) {
  const auto* x_row = row_pointer<P>(x, at);
  const auto* y_row = row_pointer<P>(y, at);
  float sum = 0.0f;
  for (int32_t channel = part * kChunkElements<P>; channel < channels; channel += kThreadsPerRow * kChunkElements<P>) {
    float a[kChunkElements<P>];
    float b[kChunkElements<P>];
    unpack<P>(load_chunk<P>(x_row + channel, x.vectorised), a);
    unpack<P>(load_chunk<P>(y_row + channel, y.vectorised), b);
#pragma unroll
    for (int i = 0; i < kChunkElements<P>; ++i) sum = fmaf(a[i], b[i], sum);
  }
  return sum;
}

__device__ inline float sum_over_row_threads(float value) {
#pragma unroll
  for (int distance = 1; distance < kThreadsPerRow; distance *= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

template <class P>
__global__ void __launch_bounds__(kElementwiseThreads)
    attention_row_statistics(const __grid_constant__ StatisticsKernelParams p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  for (int64_t i = thread; i < p.n_counters; i += static_cast<int64_t>(gridDim.x) * kElementwiseThreads) {
    p.counters[i] = 0;
  }
  const int64_t row = thread / kThreadsPerRow;
  const int32_t part = static_cast<int32_t>(thread % kThreadsPerRow);
  // Threads without a row do not return early: the shuffles need whole warps.
  const bool has_tangent = p.out_tangent.data != nullptr;
  float sum = 0.0f;
  float tangent_sum = 0.0f;
  TokenRow at{};
  if (row < p.n_rows) {
    at = token_row(row, p.n_queries, p.heads);
    sum = partial_dot<P>(p.out, p.grad_out, at, part, p.value_dim);
    if (has_tangent) tangent_sum = partial_dot<P>(p.out_tangent, p.grad_out, at, part, p.value_dim);
  }
  sum = sum_over_row_threads(sum);
  tangent_sum = sum_over_row_threads(tangent_sum);
  if (row >= p.n_rows || part != 0) return;
  const int64_t index = (at.batch * p.heads + at.head) * p.n_queries + at.token;
  const float lse = p.lse[index];
  // A row without keys has no gradient: with lse = +inf all its probabilities are 0.
  const bool empty = lse == -INFINITY;
  const float grad_lse = p.grad_lse == nullptr ? 0.0f : p.grad_lse[index];
  const float2 first = empty ? make_float2(INFINITY, 0.0f) : make_float2(lse * kLog2E, sum - grad_lse);
  if (has_tangent) {
    reinterpret_cast<float4*>(p.row_statistics)[index] =
        make_float4(first.x, first.y, p.lse_tangent[index], tangent_sum);
  } else {
    reinterpret_cast<float2*>(p.row_statistics)[index] = first;
  }
}

template <class P>
__global__ void __launch_bounds__(kElementwiseThreads) rope(const __grid_constant__ RopeKernelParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  const int32_t chunks_per_row = p.head_dim / kChunkElements<P>;
  const int64_t row = index / chunks_per_row;
  if (row >= p.n_rows) return;
  const int32_t channel = static_cast<int32_t>(index % chunks_per_row) * kChunkElements<P>;
  const TokenRow at = token_row(row, p.tokens, p.heads);
  float values[kChunkElements<P>];
  unpack<P>(load_chunk<P>(row_pointer<P>(p.x, at) + channel, p.x.vectorised), values);
  const int64_t factors = at.batch * p.freqs_strides.batch + at.token * p.freqs_strides.token;
  rotate<P>(values, p.freqs + 2 * factors, channel, p.imaginary_sign);
  reinterpret_cast<Chunk*>(p.out)[index] = pack<P>(values);
}

template <class P>
__device__ inline float to_float(typename P::Storage value) {
  if constexpr (kBytes<P> == 2) return P::to_float(value);
  return value;
}

// One thread per factor sums in a fixed order: the same bits in every run.
template <class P>
__global__ void __launch_bounds__(kElementwiseThreads)
    rope_freqs_gradient(const __grid_constant__ RopeFreqsKernelParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  if (index >= p.n_pairs) return;
  const int32_t pairs = p.head_dim / 2;
  const int64_t batch_token = index / pairs;
  const int32_t channel = static_cast<int32_t>(index % pairs) * 2;
  const int64_t first_batch = batch_token / p.tokens;
  float2 sum = make_float2(0.0f, 0.0f);
  for (int32_t batch = 0; batch < p.summed_batch; ++batch) {
    for (int32_t head = 0; head < p.heads; ++head) {
      const TokenRow at{first_batch + batch, batch_token % p.tokens, head};
      const auto* x = row_pointer<P>(p.x, at) + channel;
      const auto* grad_out = row_pointer<P>(p.grad_out, at) + channel;
      const float2 a = make_float2(to_float<P>(x[0]), to_float<P>(x[1]));
      const float2 b = make_float2(to_float<P>(grad_out[0]), to_float<P>(grad_out[1]));
      sum.x += b.x * a.x + b.y * a.y;
      sum.y += b.y * a.x - b.x * a.y;
    }
  }
  reinterpret_cast<float2*>(p.grad_freqs)[index] = sum;
}

template <class P>
const void* statistics_kernel() {
  return reinterpret_cast<const void*>(&attention_row_statistics<P>);
}

template <class P>
const void* rope_kernel() {
  return reinterpret_cast<const void*>(&rope<P>);
}

template <class P>
const void* rope_freqs_kernel() {
  return reinterpret_cast<const void*>(&rope_freqs_gradient<P>);
}

}  // namespace anchor_attention::cuda
