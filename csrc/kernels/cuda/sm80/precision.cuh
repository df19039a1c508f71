// The operand types of the kernels: storage, conversions and fragments of each.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives/convert.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/sm80/config.h"

namespace anchor_attention::sm80 {

struct alignas(16) Chunk {
  uint32_t words[4];
};

struct Bfloat16 {
  using Storage = uint16_t;
  static constexpr Precision kPrecision = Precision::bfloat16;
  static __device__ float to_float(Storage bits) { return ptx::bf16_to_float(bits); }
  static __device__ uint32_t pack(float low, float high) { return ptx::pack_bf16x2(low, high); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr Precision kPrecision = Precision::float16;
  static __device__ float to_float(Storage bits) { return ptx::f16_to_float(bits); }
  static __device__ uint32_t pack(float low, float high) { return ptx::pack_f16x2(low, high); }
};

struct Tf32 {
  using Storage = float;
  static constexpr Precision kPrecision = Precision::tf32;
};

// Each operand is split into two tf32 numbers; the product of the two small parts, 2^-22 of the whole, is left out.
struct Tf32x3 {
  using Storage = float;
  static constexpr Precision kPrecision = Precision::tf32x3;
};

template <class P>
inline constexpr int kBytes = static_cast<int>(sizeof(typename P::Storage));
template <class P>
inline constexpr int kChunkElements = 16 / kBytes<P>;
// Both operand widths take 32 bytes of the contracted axis per product.
template <class P>
inline constexpr int kMmaK = 32 / kBytes<P>;

// Bytes between rows of a tile in shared memory.
template <class P, int kHeadDim>
inline constexpr int kRowStride = row_bytes(P::kPrecision, kHeadDim);

template <class P>
__device__ inline void unpack(const Chunk& chunk, float (&values)[kChunkElements<P>]) {
  if constexpr (kBytes<P> == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = P::to_float(static_cast<uint16_t>(chunk.words[i]));
      values[2 * i + 1] = P::to_float(static_cast<uint16_t>(chunk.words[i] >> 16));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(chunk.words[i]);
  }
}

template <class P>
__device__ inline Chunk pack(const float (&values)[kChunkElements<P>]) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBytes<P> == 2) {
      chunk.words[i] = P::pack(values[2 * i], values[2 * i + 1]);
    } else {
      chunk.words[i] = __float_as_uint(values[i]);
    }
  }
  return chunk;
}

// Two neighbouring elements of a row whose address is a multiple of their size.
template <class P>
__device__ inline void store_pair(typename P::Storage* address, float first, float second) {
  if constexpr (kBytes<P> == 2) {
    *reinterpret_cast<uint32_t*>(address) = P::pack(first, second);
  } else {
    *reinterpret_cast<float2*>(address) = make_float2(first, second);
  }
}

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
    // The matrix unit cuts its sums toward zero: over thousands of steps that bias would exceed what the three products
    // gain. So a step starts from zero, small terms first, and the long sum is rounded to nearest.
    float step[4] = {};
    ptx::mma_m16n8k8_tf32(step, a.remainders, b.words);
    ptx::mma_m16n8k8_tf32(step, a.words, b.remainders);
    ptx::mma_m16n8k8_tf32(step, a.words, b.words);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  }
}

}  // namespace anchor_attention::sm80
