// Building blocks of the running softmax, shared by all generations.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/config.h"
#include "kernels/cuda/primitives/exp2.cuh"

namespace anchor_attention::cuda {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896341f;

// The subtracted maximum may lag behind the true one by this many powers of two: probabilities up to 256 fit every
// type, and the output needs rescaling in a few tiles only.
constexpr float kMaximumLag = 8.0f;

// Over the four lanes that hold a row of accumulators.
__device__ inline float maximum_over_quad(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullWarp, value, 2));
}

__device__ inline float sum_over_quad(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// What is subtracted from scaled scores: the maximum, or 0 while a row has seen no key (−inf − −inf would be NaN).
__device__ inline float softmax_shift(float maximum, float scale_log2) {
  return maximum == -INFINITY ? 0.0f : maximum * scale_log2;
}

}  // namespace anchor_attention::cuda
