// What the passes after the forward share.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives/exp2.cuh"
#include "kernels/cuda/sm80/fragments.cuh"
#include "kernels/cuda/sm80/kernels_sm80.h"
#include "kernels/cuda/sm80/tile_io.cuh"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim, Pass kPass>
struct BackwardTraits {
  static constexpr TileShape kShape = tile_shape(kPass, P::kPrecision, kHeadDim);
  static constexpr int kStride = kRowStride<P, kHeadDim>;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kRowBlocks = kShape.rows_per_warp() / 16;
  static constexpr int kStepBlocks = kShape.step / 8;
  static constexpr int kHeadBlocks = kHeadDim / 8;
  static constexpr int kRowTileBytes = kShape.rows * kStride;
  static constexpr int kColumnTileBytes = kShape.columns * kStride;
};

__device__ inline const float2* head_statistics(const BackwardKernelParams& p, int32_t batch, int32_t head) {
  const int64_t batch_head = static_cast<int64_t>(batch) * p.heads + head;
  return reinterpret_cast<const float2*>(p.row_statistics) + batch_head * p.n_queries;
}

}  // namespace anchor_attention::sm80
