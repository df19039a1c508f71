// Tiles of tokens between global and shared memory.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/range_walk.cuh"
#include "kernels/cuda/common/rows.cuh"
#include "kernels/cuda/primitives/cp_async.cuh"
#include "kernels/cuda/primitives/shared_memory.cuh"
#include "kernels/cuda/sm80/kernel_params.h"
#include "kernels/cuda/sm80/precision.cuh"

namespace anchor_attention::sm80 {

// Starts copying `kRows` tokens from `first` on to shared memory. Tokens that `is_valid` leaves out and channels beyond
// `head_dim` become zeros, so that nothing masked, not even a NaN, enters a product.
template <class P, int kHeadDim, int kRows, int kThreads, class IsValid>
__device__ inline void load_tile(uint32_t shared, const TensorView& tensor, const typename P::Storage* head,
                                 int32_t first, int32_t head_dim, IsValid is_valid) {
  constexpr int kStride = kRowStride<P, kHeadDim>;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (tensor.vectorised) {
    // A thread keeps to its column of chunks and steps down the rows, so that one pointer is all it holds. Where the
    // row's chunks do not divide the threads, the last threads have nothing to do.
    constexpr int kChunksPerRow = kHeadDim / kChunkElements<P>;
    constexpr int kChunksAtOnce = kChunksPerRow < kThreads ? kChunksPerRow : kThreads;
    constexpr int kRowsAtOnce = kThreads / kChunksAtOnce;
    static_assert(kChunksPerRow % kChunksAtOnce == 0, "a pass covers whole rows or a fraction of one");
    const int32_t thread_row = thread / kChunksAtOnce;
    const auto thread_valid = is_valid.from(thread_row);
    if (kThreads % kChunksAtOnce != 0 && thread_row >= kRowsAtOnce) return;
#pragma unroll
    for (int pass = 0; pass < kChunksPerRow / kChunksAtOnce; ++pass) {
      const int32_t channel = (thread % kChunksAtOnce + pass * kChunksAtOnce) * kChunkElements<P>;
      const typename P::Storage* source = head + (first + thread_row) * tensor.strides.token + channel;
      const int64_t step = tensor.strides.token * kRowsAtOnce;
      const uint32_t destination = shared + thread_row * kStride + channel * kBytes<P>;
#pragma unroll
      for (int row = 0; row < kRows; row += kRowsAtOnce) {
        if (kRows % kRowsAtOnce != 0 && thread_row + row >= kRows) break;
        ptx::cp_async_or_zero<16>(destination + row * kStride, source, thread_valid(row) && channel < head_dim);
        source += step;
      }
    }
    return;
  }
  // Unaligned rows are rare: one element at a time, and not unrolled, which keeps registers for the products.
#pragma unroll 1
  for (int32_t index = thread; index < kRows * kHeadDim; index += kThreads) {
    const int32_t row = index / kHeadDim;
    const int32_t channel = index % kHeadDim;
    const bool read = is_valid(row) && channel < head_dim;
    const typename P::Storage* source = head + (first + row) * tensor.strides.token + channel;
    const uint32_t destination = shared + row * kStride + channel * kBytes<P>;
    if constexpr (kBytes<P> == 4) {
      ptx::cp_async_or_zero<4>(destination, source, read);
    } else {
      ptx::store_shared(destination, read ? *source : typename P::Storage{0});
    }
  }
}

// Which tokens of a tile take part; `from` moves the origin to a thread's first token, after which the others are at
// constant distances and cost one bit test each.
struct FirstRows {
  int32_t count;
  __device__ bool operator()(int32_t row) const { return row < count; }
  __device__ FirstRows from(int32_t row) const { return {count - row}; }
};

struct ValidColumns {
  uint64_t valid;
  __device__ bool operator()(int32_t column) const { return (valid >> column & 1) != 0; }
  __device__ ValidColumns from(int32_t column) const { return {valid >> column}; }
};

}  // namespace anchor_attention::sm80
