// Rows of channels in global memory: addresses, chunks, rotation.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/kernel_params.h"
#include "kernels/cuda/common/precision.cuh"

namespace anchor_attention::cuda {

template <class P>
__device__ inline const typename P::Storage* head_pointer(const TensorView& tensor, int32_t batch, int32_t head) {
  return static_cast<const typename P::Storage*>(tensor.data) + batch * tensor.strides.batch +
         head * tensor.strides.head;
}

template <class P>
__device__ inline Chunk load_chunk(const typename P::Storage* address, bool vectorised) {
  if (vectorised) return *reinterpret_cast<const Chunk*>(address);
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBytes<P> == 2) {
      chunk.words[i] = address[2 * i] | static_cast<uint32_t>(address[2 * i + 1]) << 16;
    } else {
      chunk.words[i] = __float_as_uint(address[i]);
    }
  }
  return chunk;
}

struct KeptRows {
  const uint8_t* mask;  // of the first row, may be null
  int32_t count;
  __device__ bool operator()(int32_t row) const { return row < count && (mask == nullptr || mask[row] != 0); }
  __device__ KeptRows from(int32_t row) const { return {mask == nullptr ? nullptr : mask + row, count - row}; }
};

// (a + ib) · (c + id) on interleaved pairs of a chunk that starts at `channel`. `factors` is a token's row.
template <class P>
__device__ inline void rotate(float (&values)[kChunkElements<P>], const float* factors, int32_t channel,
                              float imaginary_sign) {
#pragma unroll
  for (int i = 0; i < kChunkElements<P>; i += 2) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + channel + i);
    const float imaginary = imaginary_sign * factor.y;
    const float real_part = values[i] * factor.x - values[i + 1] * imaginary;
    values[i + 1] = values[i] * imaginary + values[i + 1] * factor.x;
    values[i] = real_part;
  }
}

}  // namespace anchor_attention::cuda
