// The forward pass: a block owns a tile of queries of one group, walks the group's key ranges and keeps a running
// softmax. Names: s shared, r registers.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/softmax.cuh"
#include "kernels/cuda/sm80/fragments.cuh"
#include "kernels/cuda/sm80/kernels_sm80.h"
#include "kernels/cuda/sm80/tile_io.cuh"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim>
struct ForwardTraits {
  static constexpr TileShape kShape = tile_shape(Pass::forward, P::kPrecision, kHeadDim);
  static constexpr int kStride = kRowStride<P, kHeadDim>;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kRowBlocks = kShape.rows_per_warp() / 16;
  static constexpr int kScoreBlocks = kShape.columns / 8;
  static constexpr int kOutBlocks = kHeadDim / 8;
  static constexpr int kTileBytes = kShape.columns * kStride;
};

// Running maximum (of unscaled scores) and sum of the two rows of each row block that a thread sees.
template <int kRowBlocks>
struct SoftmaxState {
  float maximum[kRowBlocks][2];
  float sum[kRowBlocks][2];
};

template <class P, int kHeadDim>
__device__ inline void load_rotated_q(uint32_t s_q, const ForwardKernelParams& p, const WorkItem& work) {
  using Traits = ForwardTraits<P, kHeadDim>;
  constexpr int kChunksPerRow = kHeadDim / kChunkElements<P>;
  const auto* head = head_pointer<P>(p.q, work.batch, work.head);
  for (int32_t index = threadIdx.x; index < Traits::kShape.rows * kChunksPerRow; index += Traits::kThreads) {
    const int32_t row = index / kChunksPerRow;
    const int32_t channel = index % kChunksPerRow * kChunkElements<P>;
    const int64_t token = work.begin + row;
    Chunk chunk = {};
    if (token < work.end && channel < p.head_dim) {
      float values[kChunkElements<P>];
      unpack<P>(load_chunk<P>(head + token * p.q.strides.token + channel, p.q.vectorised), values);
      if (p.q_freqs != nullptr) {
        const int64_t factors = work.batch * p.q_freqs_strides.batch + token * p.q_freqs_strides.token;
        rotate<P>(values, p.q_freqs + 2 * factors, channel, 1.0f);
      }
#pragma unroll
      for (float& value : values) value *= p.q_sign;
      chunk = pack<P>(values);
    }
    ptx::store_shared(s_q + row * Traits::kStride + channel * kBytes<P>, chunk.words);
  }
}

// Scores → probabilities relative to a running maximum; output and sum are rescaled where it moved.
template <int kRowBlocks, int kScoreBlocks, int kOutBlocks>
__device__ inline void online_softmax(Accumulators<kRowBlocks, kScoreBlocks>& r_scores,
                                      Accumulators<kRowBlocks, kOutBlocks>& r_out, SoftmaxState<kRowBlocks>& state,
                                      float scale_log2) {
  float previous[kRowBlocks][2];
  bool moved = false;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float maximum = -INFINITY;
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) {
        maximum = fmaxf(maximum, fmaxf(r_scores[m][n][2 * row], r_scores[m][n][2 * row + 1]));
      }
      maximum = maximum_over_quad(maximum);
      previous[m][row] = state.maximum[m][row];
      if ((maximum - previous[m][row]) * scale_log2 > kMaximumLag) {
        state.maximum[m][row] = maximum;
        moved = true;
      }
    }
  }
  if (__any_sync(kFullWarp, moved)) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float shift = softmax_shift(state.maximum[m][row], scale_log2);
        const float rescale = ptx::exp2_approx(fmaf(previous[m][row], scale_log2, -shift));
        state.sum[m][row] *= rescale;
#pragma unroll
        for (int n = 0; n < kOutBlocks; ++n) {
          r_out[m][n][2 * row] *= rescale;
          r_out[m][n][2 * row + 1] *= rescale;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float shift = softmax_shift(state.maximum[m][row], scale_log2);
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          r_scores[m][n][i] = ptx::exp2_approx(fmaf(r_scores[m][n][i], scale_log2, -shift));
          state.sum[m][row] += r_scores[m][n][i];
        }
      }
    }
  }
}

template <class P, int kHeadDim, int kRowBlocks>
__device__ inline void store_out(const ForwardKernelParams& p, const WorkItem& work,
                                 const Accumulators<kRowBlocks, kHeadDim / 8>& r_out,
                                 const SoftmaxState<kRowBlocks>& state) {
  auto* out = static_cast<typename P::Storage*>(p.out);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = sum_over_quad(state.sum[m][row]);
      const int32_t token = work.begin + accumulator_row<kRowBlocks>(m, row);
      if (token >= work.end) continue;
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane() % 4 == 0) {
        const float shift = softmax_shift(state.maximum[m][row], p.scale_log2);
        const int64_t head = static_cast<int64_t>(work.batch) * p.heads + work.head;
        p.lse[head * p.n_queries + token] = sum == 0.0f ? -INFINITY : (shift + ptx::log2_approx(sum)) * kLn2;
      }
      const int64_t first =
          ((static_cast<int64_t>(work.batch) * p.n_queries + token) * p.heads + work.head) * p.value_dim;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        if (8 * n >= p.value_dim) break;
        store_pair<P>(out + first + 8 * n + lane() % 4 * 2, r_out[m][n][2 * row] * inverse,
                      r_out[m][n][2 * row + 1] * inverse);
      }
    }
  }
}

// Stores the partial result of a split of the tile's keys, for attention_merge.
template <int kRows, int kRowBlocks, int kOutBlocks>
__device__ inline void store_partial(const ForwardKernelParams& p, const WorkItem& work,
                                     const Accumulators<kRowBlocks, kOutBlocks>& r_out,
                                     const SoftmaxState<kRowBlocks>& state) {
  const int64_t first_row = partial_row(p.schedule, work, p.heads, kRows, work.split);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = sum_over_quad(state.sum[m][row]);
      const int32_t tile_row = accumulator_row<kRowBlocks>(m, row);
      if (work.begin + tile_row >= work.end) continue;
      const int64_t at = first_row + tile_row;
      if (lane() % 4 == 0) {
        const float shift = softmax_shift(state.maximum[m][row], p.scale_log2);
        reinterpret_cast<float2*>(p.partial.statistics)[at] = make_float2(sum == 0.0f ? -INFINITY : shift, sum);
      }
      float* out = p.partial.out + at * p.value_dim + lane() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
        if (8 * n >= p.value_dim) break;
        *reinterpret_cast<float2*>(out + 8 * n) = make_float2(r_out[m][n][2 * row], r_out[m][n][2 * row + 1]);
      }
    }
  }
}

template <class P, int kHeadDim, class Traits = ForwardTraits<P, kHeadDim>>
__global__ void __launch_bounds__(Traits::kThreads) __maxnreg__(Traits::kShape.max_registers)
    attention_forward(const __grid_constant__ ForwardKernelParams p) {
  constexpr int kColumns = Traits::kShape.columns;
  constexpr int kStride = Traits::kStride;
  extern __shared__ Chunk shared_memory[];

  const WorkItem work = find_work_item(p.schedule, blockIdx.x, p.heads, Traits::kShape.rows);
  const int32_t kv_head = work.head / p.heads_per_kv_head;
  const auto* k_head = head_pointer<P>(p.k, work.batch, kv_head);
  const auto* v_head = head_pointer<P>(p.v, work.batch, kv_head);
  const uint8_t* mask = batch_key_mask(p, work);

  const uint32_t s_q = ptx::shared_address(shared_memory);
  const uint32_t s_k = s_q + Traits::kShape.rows * kStride;
  const uint32_t s_v = s_k + kPipelineStages * Traits::kTileBytes;
  const uint32_t warp_q = s_q + threadIdx.x / 32 * 16 * Traits::kRowBlocks * kStride + lane_offset_a<kStride>();
  const uint32_t lane_k = s_k + lane_offset_b<kStride>();
  const uint32_t lane_v = s_v + lane_offset_transposed_b<P, kStride>();

  // Two commit groups per tile, empty ones after the last, so that the number in flight is always known.
  const auto load_stage = [&](const StreamedTile& tile, bool exists, int stage) {
    const ValidColumns valid{tile.valid};
    if (exists) {
      load_tile<P, kHeadDim, kColumns, Traits::kThreads>(s_k + stage * Traits::kTileBytes, p.k, k_head, tile.begin,
                                                         p.head_dim, valid);
    }
    ptx::cp_async_commit();
    if (exists) {
      load_tile<P, kHeadDim, kColumns, Traits::kThreads>(s_v + stage * Traits::kTileBytes, p.v, v_head, tile.begin,
                                                         p.value_dim, valid);
    }
    ptx::cp_async_commit();
  };

  RangeWalk<kColumns> walk(p.schedule, work.first_range, work.last_range, mask);
  walk.take_share(work);
  StreamedTile tile{};
  bool exists = walk.next(tile);
  load_stage(tile, exists, 0);
  load_rotated_q<P, kHeadDim>(s_q, p, work);

  Accumulators<Traits::kRowBlocks, Traits::kOutBlocks> r_out;
  clear(r_out);
  SoftmaxState<Traits::kRowBlocks> state;
#pragma unroll
  for (int m = 0; m < Traits::kRowBlocks; ++m) {
    state.maximum[m][0] = state.maximum[m][1] = -INFINITY;
    state.sum[m][0] = state.sum[m][1] = 0.0f;
  }

  const bool has_rows = warp_has_rows<Traits::kRowBlocks>(work);
  for (int stage = 0; exists; stage ^= 1) {
    const uint64_t valid = tile.valid;
    ptx::cp_async_wait<1>();
    __syncthreads();  // the keys have arrived, and nobody reads the other stage any more
    exists = walk.next(tile);
    load_stage(tile, exists, stage ^ 1);

    Accumulators<Traits::kRowBlocks, Traits::kScoreBlocks> r_scores;
    clear(r_scores);
    if (has_rows) {
      qk_gemm<P, kHeadDim, kStride>(r_scores, warp_q, lane_k + stage * Traits::kTileBytes, p.head_dim);
      fill_masked(r_scores, valid, -INFINITY);
      online_softmax(r_scores, r_out, state, p.scale_log2);
    }
    ptx::cp_async_wait<2>();
    __syncthreads();
    if (has_rows) pv_gemm<P, kStride>(r_out, r_scores, lane_v + stage * Traits::kTileBytes, p.value_dim);
  }
  if (work.n_splits > 1) {
    store_partial<Traits::kShape.rows>(p, work, r_out, state);
  } else {
    store_out<P, kHeadDim>(p, work, r_out, state);
  }
}

template <class P, int kHeadDim>
const void* forward_kernel() {
  return reinterpret_cast<const void*>(&attention_forward<P, kHeadDim>);
}

}  // namespace anchor_attention::sm80
