// Gradient of the queries: a block owns a tile of queries, as in the forward, and recomputes the probabilities of its
// keys. dQ = scale · (P ∘ (dO Vᵀ − delta)) K.
#pragma once

#include "kernels/cuda/sm80/backward.cuh"

namespace anchor_attention::sm80 {

// scores: S → dS = P ∘ (dP − delta)
template <int kRowBlocks, int kStepBlocks>
__device__ inline void score_gradient(Accumulators<kRowBlocks, kStepBlocks>& r_scores,
                                      const Accumulators<kRowBlocks, kStepBlocks>& r_probability_gradient,
                                      const float2 (&r_statistics)[kRowBlocks][2], float scale_log2) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 statistics = r_statistics[m][i / 2];
        const float probability = ptx::exp2_approx(fmaf(r_scores[m][n][i], scale_log2, -statistics.x));
        r_scores[m][n][i] = probability * (r_probability_gradient[m][n][i] - statistics.y);
      }
    }
  }
}

template <class P, int kHeadDim, int kRowBlocks>
__device__ inline void store_grad_q(const BackwardKernelParams& p, const WorkItem& work,
                                    const Accumulators<kRowBlocks, kHeadDim / 8>& r_grad_q) {
  auto* grad_q = static_cast<typename P::Storage*>(p.grad_q);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t token = work.begin + accumulator_row<kRowBlocks>(m, row);
      if (token >= work.end) continue;
      const int64_t first =
          ((static_cast<int64_t>(work.batch) * p.n_queries + token) * p.heads + work.head) * p.head_dim;
      const int64_t factors = work.batch * p.q_freqs_strides.batch + token * p.q_freqs_strides.token;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        if (8 * n >= p.head_dim) break;
        const int32_t channel = 8 * n + static_cast<int32_t>(lane() % 4) * 2;
        float real_part = p.scale * r_grad_q[m][n][2 * row];
        float imaginary_part = p.scale * r_grad_q[m][n][2 * row + 1];
        if (p.q_freqs != nullptr) {
          const float2 factor = *reinterpret_cast<const float2*>(p.q_freqs + 2 * factors + channel);
          const float rotated = real_part * factor.x + imaginary_part * factor.y;
          imaginary_part = imaginary_part * factor.x - real_part * factor.y;
          real_part = rotated;
        }
        store_pair<P>(grad_q + first + channel, real_part, imaginary_part);
      }
    }
  }
}

template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim, Pass::backward_query>>
__global__ void __launch_bounds__(Traits::kThreads) __maxnreg__(Traits::kShape.max_registers)
    attention_backward_query(const __grid_constant__ BackwardKernelParams p) {
  constexpr int kRows = Traits::kShape.rows;
  constexpr int kColumns = Traits::kShape.columns;
  constexpr int kStep = Traits::kShape.step;
  constexpr int kStride = Traits::kStride;
  constexpr int kRowBlocks = Traits::kRowBlocks;
  extern __shared__ Chunk shared_memory[];

  const WorkItem work = find_work_item(p.schedule, blockIdx.x, p.heads, kRows);
  const int32_t kv_head = work.head / p.heads_per_kv_head;
  const auto* k_head = head_pointer<P>(p.k, work.batch, kv_head);
  const auto* v_head = head_pointer<P>(p.v, work.batch, kv_head);
  const uint8_t* mask = batch_key_mask(p, work);

  const uint32_t s_q = ptx::shared_address(shared_memory);
  const uint32_t s_grad_out = s_q + Traits::kRowTileBytes;
  const uint32_t s_k = s_grad_out + Traits::kRowTileBytes;
  const uint32_t s_v = s_k + kPipelineStages * Traits::kColumnTileBytes;
  const uint32_t warp_rows = threadIdx.x / 32 * 16 * kRowBlocks * kStride + lane_offset_a<kStride>();

  const auto load_stage = [&](const StreamedTile& tile, int stage) {
    const ValidColumns valid{tile.valid};
    load_tile<P, kHeadDim, kColumns, Traits::kThreads>(s_k + stage * Traits::kColumnTileBytes, p.k, k_head, tile.begin,
                                                       p.head_dim, valid);
    load_tile<P, kHeadDim, kColumns, Traits::kThreads>(s_v + stage * Traits::kColumnTileBytes, p.v, v_head, tile.begin,
                                                       p.value_dim, valid);
    ptx::cp_async_commit();
  };

  RangeWalk<kColumns> walk(p.schedule, work.first_range, work.last_range, mask);
  StreamedTile tile{};
  bool exists = walk.next(tile);
  // Loads only where a key is read: elsewhere the gradient is written without waiting, in the place of the queries, and
  // nothing may still be reading them.
  if (exists) {
    const FirstRows rows{work.end - work.begin};
    load_tile<P, kHeadDim, kRows, Traits::kThreads>(s_q, p.q, head_pointer<P>(p.q, work.batch, work.head), work.begin,
                                                    p.head_dim, rows);
    load_tile<P, kHeadDim, kRows, Traits::kThreads>(
        s_grad_out, p.grad_out, head_pointer<P>(p.grad_out, work.batch, work.head), work.begin, p.value_dim, rows);
    load_stage(tile, 0);
  }

  float2 r_statistics[kRowBlocks][2];
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t token = work.begin + accumulator_row<kRowBlocks>(m, row);
      r_statistics[m][row] =
          token < work.end ? head_statistics(p, work.batch, work.head)[token] : make_float2(INFINITY, 0.0f);
    }
  }
  Accumulators<kRowBlocks, Traits::kHeadBlocks> r_grad_q;
  clear(r_grad_q);

  const bool has_rows = warp_has_rows<kRowBlocks>(work);
  for (int stage = 0; exists; stage ^= 1) {
    const uint64_t valid = tile.valid;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the other stage any more
    exists = walk.next(tile);
    if (exists) load_stage(tile, stage ^ 1);

    const uint32_t stage_k = s_k + stage * Traits::kColumnTileBytes;
    const uint32_t stage_v = s_v + stage * Traits::kColumnTileBytes;
#pragma unroll 1
    for (int step = 0; step < kColumns && has_rows; step += kStep) {
      if ((valid >> step & low_bits(kStep)) == 0) continue;
      Accumulators<kRowBlocks, Traits::kStepBlocks> r_scores;
      Accumulators<kRowBlocks, Traits::kStepBlocks> r_probability_gradient;
      clear(r_scores);
      clear(r_probability_gradient);
      const uint32_t lane_b = step * kStride + lane_offset_b<kStride>();
      qk_gemm<P, kHeadDim, kStride>(r_scores, s_q + warp_rows, stage_k + lane_b, p.head_dim);
      qk_gemm<P, kHeadDim, kStride>(r_probability_gradient, s_grad_out + warp_rows, stage_v + lane_b, p.value_dim);
      score_gradient(r_scores, r_probability_gradient, r_statistics, p.scale_log2);
      fill_masked(r_scores, valid >> step, 0.0f);
      pv_gemm<P, kStride>(r_grad_q, r_scores, stage_k + step * kStride + lane_offset_transposed_b<P, kStride>(),
                          p.head_dim);
    }
  }
  store_grad_q<P, kHeadDim>(p, work, r_grad_q);
}

template <class P, int kHeadDim>
const void* backward_query_kernel() {
  return reinterpret_cast<const void*>(&attention_backward_query<P, kHeadDim>);
}

}  // namespace anchor_attention::sm80
