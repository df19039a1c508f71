// What every generation of kernels shares: precisions, head sizes, kinds of gradients. Plain C++.
#pragma once

#include <array>
#include <cstdint>

namespace anchor_attention::cuda {

// How products are formed. Both tf32 forms read and write float32.
enum class Precision : int32_t { bfloat16, float16, tf32, tf32x3 };

// Which gradients a block of sm80's key pass accumulates. The widest heads leave no registers for both at once.
enum class KeyGradients : int32_t { both, key, value };
constexpr int kWidestHeadOfBothGradients = 128;

constexpr int bytes_per_element(Precision precision) {
  return precision == Precision::bfloat16 || precision == Precision::float16 ? 2 : 4;
}

constexpr uint32_t kFullWarp = 0xffffffffu;

// Of the memory-bound kernels. Row statistics are computed by eight threads per row, 128 bytes per load.
constexpr int kElementwiseThreads = 256;
constexpr int kThreadsPerRow = 8;
// Of the merge of partial results, one warp per row.
constexpr int kMergeThreads = 128;

inline constexpr std::array<int, 6> kHeadDims = {32, 48, 64, 96, 128, 256};

// The first native size that holds `head_dim`, or 0.
constexpr int native_head_dim(int64_t head_dim) {
  for (const int native : kHeadDims) {
    if (head_dim > 0 && head_dim <= native) return native;
  }
  return 0;
}

}  // namespace anchor_attention::cuda
