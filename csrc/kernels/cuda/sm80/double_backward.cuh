// What the two passes of the second derivative share. Along a direction (a, b, c), with T = scale · (a Kᵀ + Q bᵀ), X =
// dO cᵀ, and for each row the tangent r of its lse and mean = <dO, tangent of O>:
//   W = P ∘ (T − r)    dS = P ∘ (dO Vᵀ − delta)    G = P ∘ ((T − r) ∘ (dO Vᵀ − delta) + X − mean)
//   dQ = scale · (G K + dS b)    dK = scale · (Gᵀ Q + dSᵀ a)    dV = Wᵀ dO
#pragma once

#include "kernels/cuda/sm80/backward.cuh"
#include "kernels/cuda/sm80/double_backward_config.h"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim, SecondPass kPass>
struct SecondTraits {
  static constexpr TileShape kShape = second_tile_shape(kPass, P::kPrecision, kHeadDim);
  static constexpr int kStride = kRowStride<P, kHeadDim>;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStepBlocks = kShape.step / 8;
  static constexpr int kHeadBlocks = kHeadDim / 8;
  static constexpr int kRowTileBytes = kShape.rows * kStride;
  static constexpr int kColumnTileBytes = kShape.columns * kStride;
};

// Of a row: lse in base 2 (+inf where it has no key), delta, tangent of lse, mean.
__device__ inline const float4* second_statistics(const BackwardKernelParams& p, int32_t batch, int32_t head) {
  const int64_t batch_head = static_cast<int64_t>(batch) * p.heads + head;
  return reinterpret_cast<const float4*>(p.row_statistics) + batch_head * p.n_queries;
}

template <int kBlocks>
using Scores = Accumulators<1, kBlocks>;

// r_scores → P, r_tangents → T − r. `statistics(n, i)` are those of the query of an accumulator.
template <int kBlocks>
__device__ inline void first_order(Scores<kBlocks>& r_scores, Scores<kBlocks>& r_tangents, const auto& statistics,
                                   float scale, float scale_log2) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 of_query = statistics(n, i);
      r_scores[0][n][i] = ptx::exp2_approx(fmaf(r_scores[0][n][i], scale_log2, -of_query.x));
      r_tangents[0][n][i] = fmaf(r_tangents[0][n][i], scale, -of_query.z);
    }
  }
}

// r_tangents: T − r → (T − r) ∘ (dP − delta) − mean; r_probability_gradient: dP → dS.
template <int kBlocks>
__device__ inline void second_order(const Scores<kBlocks>& r_probabilities, Scores<kBlocks>& r_tangents,
                                    Scores<kBlocks>& r_probability_gradient, const auto& statistics) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 of_query = statistics(n, i);
      const float difference = r_probability_gradient[0][n][i] - of_query.y;
      r_tangents[0][n][i] = fmaf(r_tangents[0][n][i], difference, -of_query.w);
      r_probability_gradient[0][n][i] = r_probabilities[0][n][i] * difference;
    }
  }
}

template <int kBlocks>
__device__ inline void multiply(Scores<kBlocks>& r_scores, const Scores<kBlocks>& factors) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r_scores[0][n][i] *= factors[0][n][i];
  }
}

}  // namespace anchor_attention::sm80
