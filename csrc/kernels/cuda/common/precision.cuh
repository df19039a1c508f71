// The operand types of the kernels: storage, conversions, 16-byte chunks of each.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/config.h"
#include "kernels/cuda/primitives/convert.cuh"

namespace anchor_attention::cuda {

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
__device__ inline float2 load_pair(const typename P::Storage* address) {
  if constexpr (kBytes<P> == 2) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(address);
    return make_float2(P::to_float(static_cast<uint16_t>(pair)), P::to_float(static_cast<uint16_t>(pair >> 16)));
  } else {
    return *reinterpret_cast<const float2*>(address);
  }
}

template <class P>
__device__ inline void store_pair(typename P::Storage* address, float first, float second) {
  if constexpr (kBytes<P> == 2) {
    *reinterpret_cast<uint32_t*>(address) = P::pack(first, second);
  } else {
    *reinterpret_cast<float2*>(address) = make_float2(first, second);
  }
}

}  // namespace anchor_attention::cuda
