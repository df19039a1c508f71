// The running softmax of a warpgroup: a thread holds columns 8n + 2t and 8n + 2t + 1, t = lane % 4, of two rows that
// are eight apart.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/softmax.cuh"

namespace anchor_attention::sm90 {

using namespace cuda;

// Running maximum (of unscaled scores) and this thread's part of the sum of its two rows.
struct SoftmaxState {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

// What output and sums have to be multiplied by; `moved` is the same in all lanes of a warp.
struct Rescaling {
  bool moved;
  float factor[2];
};

// Scores of keys that take no part become −inf.
template <int kRegisters>
__device__ inline void mask_scores(float (&scores)[kRegisters], const uint32_t (&valid)[4]) {
#pragma unroll
  for (int word = 0; word < kRegisters / 16; ++word) {
    const uint32_t mine = valid[word] >> threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if ((mine >> (i / 4 * 8 + i % 2) & 1) == 0) scores[16 * word + i] = -INFINITY;
    }
  }
}

template <int kRegisters>
__device__ inline Rescaling move_maximum(const float (&scores)[kRegisters], SoftmaxState& state, float scale_log2) {
  Rescaling rescaling{false, {1.0f, 1.0f}};
  float previous[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float maximum = -INFINITY;
#pragma unroll
    for (int n = 0; n < kRegisters; n += 4) {
      maximum = fmaxf(maximum, fmaxf(scores[n + 2 * row], scores[n + 2 * row + 1]));
    }
    maximum = maximum_over_quad(maximum);
    previous[row] = state.maximum[row];
    const bool moves = (maximum - previous[row]) * scale_log2 > kMaximumLag;
    state.maximum[row] = moves ? maximum : previous[row];
    rescaling.moved |= moves;
  }
  rescaling.moved = __any_sync(kFullWarp, rescaling.moved);
  if (rescaling.moved) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float shift = softmax_shift(state.maximum[row], scale_log2);
      rescaling.factor[row] = ptx::exp2_approx(fmaf(previous[row], scale_log2, -shift));
    }
  }
  return rescaling;
}

// Scores → probabilities, added to the sums.
template <int kPolynomialEvery, int kRegisters>
__device__ inline void exponentiate(float (&scores)[kRegisters], SoftmaxState& state, const Rescaling& rescaling,
                                    float scale_log2) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float shift = softmax_shift(state.maximum[row], scale_log2);
    state.sum[row] *= rescaling.factor[row];
#pragma unroll
    for (int n = 0; n < kRegisters; n += 4) {
#pragma unroll
      for (int i = n + 2 * row; i < n + 2 * row + 2; ++i) {
        const float argument = fmaf(scores[i], scale_log2, -shift);
        const bool polynomial = kPolynomialEvery != 0 && i / 4 % (kPolynomialEvery + (kPolynomialEvery == 0)) == 0;
        scores[i] = polynomial ? ptx::exp2_polynomial(argument) : ptx::exp2_approx(argument);
        state.sum[row] += scores[i];
      }
    }
  }
}

template <int kRegisters>
__device__ inline void rescale(float (&output)[kRegisters], const Rescaling& rescaling) {
  if (!rescaling.moved) return;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) output[i] *= rescaling.factor[i / 2 % 2];
}

}  // namespace anchor_attention::sm90
