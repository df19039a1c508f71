// The five products of the backward on a warpgroup, and the steps between them. A warpgroup has 64 keys of the block's
// 128; scores are transposed, keys × queries, so that probabilities and score gradients leave their accumulators as the
// left operand of the next product.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/precision.cuh"
#include "kernels/cuda/primitives/exp2.cuh"
#include "kernels/cuda/primitives/stmatrix.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"
#include "kernels/cuda/sm90/backward_config.h"
#include "kernels/cuda/sm90/kernels_sm90.h"

namespace anchor_attention::sm90 {

template <class P, int kHeadDim>
struct BackwardTraits {
  static constexpr ptx::MatrixType kType =
      P::kPrecision == Precision::bfloat16 ? ptx::MatrixType::bf16 : ptx::MatrixType::f16;
  static constexpr BackwardTile kTile = backward_tile(kHeadDim);
  static constexpr BackwardShared kAt = backward_shared(kHeadDim);
  static constexpr int kQueries = kTile.queries;
  static constexpr int kRowBytes = kTile.swizzle_bytes();  // of a block of channels
  static constexpr int kGroupStride = 8 * kRowBytes;
  static constexpr int kQueryGradientChannels = kTile.channels_of_query_gradient();
  static constexpr int kKeyTileBytes = kTile.key_tile_bytes();
  static constexpr int kQueryTileBytes = kTile.query_tile_bytes();
  static constexpr int kScoreTileBytes = kTile.score_tile_bytes();
  static constexpr int kQueryGradientBytes = kTile.query_gradient_bytes();
  static constexpr int kQueryGradientBlocks = kTile.query_gradient_blocks();
  // Registers of a thread.
  static constexpr int kScores = kQueries / 2;
  static constexpr int kKeyGradient = kHeadDim / 2;
  static constexpr int kQueryGradient = kQueryGradientChannels / 2;
};

// Tells the compiler that earlier values are dead: a product that does not accumulate still takes its registers as
// inputs, and they would stay alive until then.
template <int kCount>
__device__ inline void forget(float (&registers)[kCount]) {
#pragma unroll
  for (float& value : registers) asm volatile("" : "=f"(value));
}

// A left operand in registers, from scores: four words per 16 columns.
template <int kScores>
struct ScoreOperand {
  uint32_t words[kScores / 8][4];
};

// The tensor cores read `operand` until the wait before this call.
template <int kScores>
__device__ inline void keep_order(ScoreOperand<kScores>& operand) {
#pragma unroll
  for (auto& step : operand.words) {
#pragma unroll
    for (uint32_t& word : step) asm volatile("" : "+r"(word)::"memory");
  }
}

template <class P, int kScores>
__device__ inline void to_operand(ScoreOperand<kScores>& operand, const float (&scores)[kScores]) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) operand.words[i / 4][i % 4] = P::pack(scores[2 * i], scores[2 * i + 1]);
}

// The same descriptor, `bytes` further on; the address is its lowest field, in units of 16 bytes.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// scores = keys · queriesᵀ, both as rows of channels in shared memory; `keys` begins at the warpgroup's rows.
template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim>>
__device__ inline void qk_gemm(float (&scores)[Traits::kScores], uint32_t keys, uint32_t queries) {
  const uint64_t a = ptx::matrix_descriptor<Traits::kRowBytes>(keys, Traits::kGroupStride, 0);
  const uint64_t b = ptx::matrix_descriptor<Traits::kRowBytes>(queries, Traits::kGroupStride, 0);
  forget(scores);
#pragma unroll
  for (int channel = 0; channel < kHeadDim; channel += 16) {
    const uint32_t block = channel / Traits::kTile.channels * Traits::kRowBytes;
    const uint32_t within = channel % Traits::kTile.channels * 2;
    ptx::Wgmma<Traits::kQueries>::template multiply<Traits::kType, ptx::Major::contracted, ptx::Major::contracted>(
        scores, advance(a, block * kBackwardKeys + within), advance(b, block * Traits::kQueries + within), channel > 0);
  }
}

// gradient += scores · rows, one row per query, of channels.
template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim>>
__device__ inline void pv_gemm(float (&gradient)[Traits::kKeyGradient], const ScoreOperand<Traits::kScores>& scores,
                               uint32_t rows) {
  constexpr uint32_t kBlockStride = kHeadDim > Traits::kTile.channels ? Traits::kQueries * Traits::kRowBytes : 0;
  const uint64_t b = ptx::matrix_descriptor<Traits::kRowBytes>(rows, Traits::kGroupStride, kBlockStride);
#pragma unroll
  for (int step = 0; step < Traits::kQueries / 16; ++step) {
    ptx::Wgmma<kHeadDim>::template multiply<Traits::kType, ptx::Major::outer>(
        gradient, scores.words[step], advance(b, 16 * step * Traits::kRowBytes), true);
  }
}

// gradient = dS · keys for this warpgroup's share of the tile: 64 of its queries and all channels or, where there are
// only 64 queries, half of the channels. Contracts the keys of both warpgroups.
template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim>>
__device__ inline void dsk_gemm(float (&gradient)[Traits::kQueryGradient], uint32_t score_gradients, uint32_t keys,
                                uint32_t warpgroup) {
  constexpr int kScoreRowBytes = 128;
  constexpr bool kShareQueries = Traits::kQueries == 128;
  constexpr int kChannelBlocks = Traits::kQueryGradientChannels / Traits::kTile.channels;
  constexpr int kShareOfScores = kShareQueries ? kBackwardKeys * kScoreRowBytes : 0;
  constexpr int kShareOfKeys = kShareQueries ? 0 : kChannelBlocks * kBackwardKeys * Traits::kRowBytes;
  const uint64_t a =
      ptx::matrix_descriptor<kScoreRowBytes>(score_gradients + warpgroup * kShareOfScores, 8 * kScoreRowBytes, 0);
  constexpr uint32_t kBlockStride = kChannelBlocks > 1 ? kBackwardKeys * Traits::kRowBytes : 0;
  const uint64_t b =
      ptx::matrix_descriptor<Traits::kRowBytes>(keys + warpgroup * kShareOfKeys, Traits::kGroupStride, kBlockStride);
  forget(gradient);
#pragma unroll
  for (int key = 0; key < kBackwardKeys; key += 16) {
    ptx::Wgmma<Traits::kQueryGradientChannels>::template multiply<Traits::kType, ptx::Major::outer, ptx::Major::outer>(
        gradient, advance(a, key * kScoreRowBytes), advance(b, key * Traits::kRowBytes), key > 0);
  }
}

// S → P. `s_lse` of the tile's queries, in base 2.
template <int kScores>
__device__ inline void probabilities(float (&scores)[kScores], const float* s_lse, float scale_log2) {
  const auto* mine = reinterpret_cast<const float2*>(s_lse) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kScores; i += 4) {
    const float2 lse = mine[i];
    scores[i] = ptx::exp2_approx(fmaf(scores[i], scale_log2, -lse.x));
    scores[i + 1] = ptx::exp2_approx(fmaf(scores[i + 1], scale_log2, -lse.y));
    scores[i + 2] = ptx::exp2_approx(fmaf(scores[i + 2], scale_log2, -lse.x));
    scores[i + 3] = ptx::exp2_approx(fmaf(scores[i + 3], scale_log2, -lse.y));
  }
}

// dP → dS = P ∘ (dP − delta)
template <int kScores>
__device__ inline void score_gradients(float (&gradients)[kScores], const float (&probabilities)[kScores],
                                       const float* s_delta) {
  const auto* mine = reinterpret_cast<const float2*>(s_delta) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kScores; i += 4) {
    const float2 delta = mine[i];
    gradients[i] = probabilities[i] * (gradients[i] - delta.x);
    gradients[i + 1] = probabilities[i + 1] * (gradients[i + 1] - delta.y);
    gradients[i + 2] = probabilities[i + 2] * (gradients[i + 2] - delta.x);
    gradients[i + 3] = probabilities[i + 3] * (gradients[i + 3] - delta.y);
  }
}

// Score gradients to shared memory: rows of keys, blocks of 64 queries, swizzled over 128 bytes.
template <int kScores>
__device__ inline void store_score_gradients(const ScoreOperand<kScores>& operand, uint32_t tile) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t key = (threadIdx.x - kWarpgroupThreads) / 32 * 16 + lane % 16;
#pragma unroll
  for (int step = 0; step < kScores / 8; ++step) {
    const uint32_t chunk = 2 * step % 8 + lane / 16;
    ptx::stmatrix_x4(tile + (step / 4 * kBackwardKeys + key) * 128 + (chunk ^ key % 8) * 16, operand.words[step]);
  }
}

}  // namespace anchor_attention::sm90
