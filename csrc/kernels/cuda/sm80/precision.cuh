// Fragments of the matrix units and their products, for each operand type.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/precision.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/sm80/config.h"

namespace anchor_attention::sm80 {

// Both operand widths take 32 bytes of the contracted axis per product.
template <class P>
inline constexpr int kMmaK = 32 / kBytes<P>;

// Bytes between rows of a tile in shared memory.
template <class P, int kHeadDim>
inline constexpr int kRowStride = row_bytes(P::kPrecision, kHeadDim);

// Registers of one operand of a product: N = 4 for a (16 rows), 2 for b (8 columns).
template <class P, int N>
struct Fragment {
  uint32_t words[N];
};

template <int N>
struct Fragment<Tf32x3, N> {
  uint32_t words[N];
  uint32_t remainders[N];
};

// Raw loaded words → what the matrix unit takes.
template <class P, int N>
__device__ inline void set_fragment(Fragment<P, N>& fragment, int i, uint32_t word) {
  if constexpr (kBytes<P> == 2) {
    fragment.words[i] = word;
  } else {
    fragment.words[i] = ptx::round_to_tf32(__uint_as_float(word));
    if constexpr (P::kPrecision == Precision::tf32x3) {
      fragment.remainders[i] = ptx::round_to_tf32(__uint_as_float(word) - __uint_as_float(fragment.words[i]));
    }
  }
}

template <class P>
__device__ inline void mma(float (&d)[4], const Fragment<P, 4>& a, const Fragment<P, 2>& b) {
  if constexpr (P::kPrecision == Precision::bfloat16) {
    ptx::mma_m16n8k16_bf16(d, a.words, b.words);
  } else if constexpr (P::kPrecision == Precision::float16) {
    ptx::mma_m16n8k16_f16(d, a.words, b.words);
  } else if constexpr (P::kPrecision == Precision::tf32) {
    ptx::mma_m16n8k8_tf32(d, a.words, b.words);
  } else {
    // The matrix unit rounds its sums toward zero: over thousands of steps that bias would exceed what the three
    // products gain. So a step starts from zero, small terms first, and the long sum is rounded to nearest.
    float step[4] = {};
    ptx::mma_m16n8k8_tf32(step, a.remainders, b.words);
    ptx::mma_m16n8k8_tf32(step, a.words, b.remainders);
    ptx::mma_m16n8k8_tf32(step, a.words, b.words);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  }
}

}  // namespace anchor_attention::sm80
