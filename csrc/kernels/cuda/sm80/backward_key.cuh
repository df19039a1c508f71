// Gradients of keys and values: a block owns a tile of keys and streams the queries that read them, one head after
// another where several share the keys, so that their sum stays in registers. Scores are formed transposed (keys ×
// queries), so that probabilities leave the accumulators as the left operand of the next product and never pass through
// shared memory. dV = Pᵀ dO, dK = scale · (P ∘ (dO Vᵀ − delta))ᵀ Q.
#pragma once

#include "kernels/cuda/primitives/ordering.cuh"
#include "kernels/cuda/sm80/backward.cuh"

namespace anchor_attention::sm80 {

// Blocks take items in the order in which they start. One that waits for an earlier split of its tile therefore waits
// for a block that is already running, in whatever order the hardware starts them. For one warp.
__device__ inline uint32_t next_item(const BackwardKernelParams& p) {
  if (p.schedule.n_accumulators == 0) return blockIdx.x;
  int32_t item = 0;
  if (lane() == 0) item = ptx::fetch_add_relaxed(p.counters, 1);
  return static_cast<uint32_t>(__shfl_sync(kFullWarp, item, 0));
}

template <int kColumns, int kThreads>
__device__ inline void load_statistics(uint32_t shared, const float2* statistics, const StreamedTile& tile) {
  for (int32_t column = threadIdx.x; column < kColumns; column += kThreads) {
    const bool read = (tile.valid >> column & 1) != 0;
    ptx::cp_async_or_zero<8>(shared + column * 8, read ? statistics + tile.begin + column : statistics, read);
  }
}

// Columns beyond the tile's end hold zeros everywhere, statistics included: their probability is 1, but their dO, Q
// and dS are 0, and so is their contribution.
template <int kRowBlocks, int kStepBlocks>
__device__ inline void probabilities(Accumulators<kRowBlocks, kStepBlocks>& r_scores, uint32_t s_statistics,
                                     float scale_log2) {
#pragma unroll
  for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float lse = ptx::load_shared_float2(s_statistics + (8 * n + lane() % 4 * 2 + column) * 8).x;
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = column; i < 4; i += 2) {
          r_scores[m][n][i] = ptx::exp2_approx(fmaf(r_scores[m][n][i], scale_log2, -lse));
        }
      }
    }
  }
}

// probabilities → dS = P ∘ (dP − delta)
template <int kRowBlocks, int kStepBlocks>
__device__ inline void score_gradient_of_keys(Accumulators<kRowBlocks, kStepBlocks>& r_scores,
                                              const Accumulators<kRowBlocks, kStepBlocks>& r_probability_gradient,
                                              uint32_t s_statistics) {
#pragma unroll
  for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float delta = ptx::load_shared_float2(s_statistics + (8 * n + lane() % 4 * 2 + column) * 8).y;
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = column; i < 4; i += 2) r_scores[m][n][i] *= r_probability_gradient[m][n][i] - delta;
      }
    }
  }
}

__device__ inline int64_t accumulator_index(const BackwardKernelParams& p, const WorkItem& work) {
  const int64_t batch_head = static_cast<int64_t>(work.batch) * p.kv_heads + work.head;
  return batch_head * p.schedule.n_accumulators + work.accumulator;
}

// For all threads of the block: the earlier splits' sums are visible afterwards.
__device__ inline void await_turn(const BackwardKernelParams& p, const WorkItem& work) {
  if (threadIdx.x == 0) {
    const int32_t* turn = p.counters + 1 + accumulator_index(p, work);
    while (ptx::load_acquire(turn) != work.split) __nanosleep(100);
  }
  __syncthreads();
}

__device__ inline void pass_turn(const BackwardKernelParams& p, const WorkItem& work) {
  __syncthreads();
  if (threadIdx.x == 0) ptx::store_release(p.counters + 1 + accumulator_index(p, work), work.split + 1);
}

template <int kThreads, int kRowBlocks, int kColumnBlocks>
__device__ inline float4* accumulator_slot(float* tile, int m, int n) {
  return reinterpret_cast<float4*>(tile) + (m * kColumnBlocks + n) * kThreads + threadIdx.x;
}

template <int kThreads, int kRowBlocks, int kColumnBlocks>
__device__ inline void add_accumulators(Accumulators<kRowBlocks, kColumnBlocks>& acc, float* tile) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnBlocks; ++n) {
      const float4 sum = *accumulator_slot<kThreads, kRowBlocks, kColumnBlocks>(tile, m, n);
      acc[m][n][0] += sum.x;
      acc[m][n][1] += sum.y;
      acc[m][n][2] += sum.z;
      acc[m][n][3] += sum.w;
    }
  }
}

template <int kThreads, int kRowBlocks, int kColumnBlocks>
__device__ inline void store_accumulators(const Accumulators<kRowBlocks, kColumnBlocks>& acc, float* tile) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnBlocks; ++n) {
      *accumulator_slot<kThreads, kRowBlocks, kColumnBlocks>(tile, m, n) =
          make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]);
    }
  }
}

template <class P, int kHeadDim, int kRowBlocks>
__device__ inline void store_key_gradient(void* gradient, const BackwardKernelParams& p, const WorkItem& work,
                                          const Accumulators<kRowBlocks, kHeadDim / 8>& acc, int32_t head_dim,
                                          float factor) {
  if (gradient == nullptr) return;
  const uint8_t* mask = batch_key_mask(p, work);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t token = work.begin + accumulator_row<kRowBlocks>(m, row);
      if (token >= work.end) continue;
      const bool keep = mask == nullptr || mask[token] != 0;
      auto* out = static_cast<typename P::Storage*>(gradient) +
                  ((static_cast<int64_t>(work.batch) * p.n_keys + token) * p.kv_heads + work.head) * head_dim;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        if (8 * n >= head_dim) break;
        store_pair<P>(out + 8 * n + lane() % 4 * 2, keep ? factor * acc[m][n][2 * row] : 0.0f,
                      keep ? factor * acc[m][n][2 * row + 1] : 0.0f);
      }
    }
  }
}

__device__ inline bool any_row_kept(const uint8_t* mask, const WorkItem& work) {
  if (mask == nullptr) return true;
  bool kept = false;
  for (int32_t token = work.begin + static_cast<int32_t>(lane()); token < work.end; token += 32) {
    kept = kept || mask[token] != 0;
  }
  return __any_sync(kFullWarp, kept);
}

template <class P, int kHeadDim, KeyGradients kGradients,
          class Traits = BackwardTraits<P, kHeadDim, Pass::backward_key>>
__global__ void __launch_bounds__(Traits::kThreads) __maxnreg__(Traits::kShape.max_registers)
    attention_backward_key(const __grid_constant__ BackwardKernelParams p) {
  constexpr bool kWantsKey = kGradients != KeyGradients::value;
  constexpr bool kWantsValue = kGradients != KeyGradients::key;
  constexpr int kRows = Traits::kShape.rows;
  constexpr int kColumns = Traits::kShape.columns;
  constexpr int kStep = Traits::kShape.step;
  constexpr int kStride = Traits::kStride;
  constexpr int kThreads = Traits::kThreads;
  constexpr int kRowBlocks = Traits::kRowBlocks;
  extern __shared__ Chunk shared_memory[];

  // The work item stays in shared memory during the loop: the accumulators leave no registers for what is needed once
  // per tile or at the end.
  __shared__ WorkItem s_work;
  if (threadIdx.x < 32) {
    const WorkItem found = find_work_item(p.schedule, next_item(p), p.kv_heads, kRows);
    if (threadIdx.x == 0) s_work = found;
  }
  __syncthreads();
  const WorkItem work = s_work;
  const uint8_t* mask = batch_key_mask(p, work);

  const uint32_t s_k = ptx::shared_address(shared_memory);
  const uint32_t s_v = s_k + Traits::kRowTileBytes;
  const uint32_t s_q = s_v + Traits::kRowTileBytes;
  const uint32_t s_grad_out = s_q + kPipelineStages * Traits::kColumnTileBytes;
  const uint32_t s_statistics = s_grad_out + kPipelineStages * Traits::kColumnTileBytes;
  const uint32_t warp_rows = threadIdx.x / 32 * 16 * kRowBlocks * kStride + lane_offset_a<kStride>();

  // Head of the next tile of queries. Heads that share these keys follow each other.
  int32_t head = work.head * p.heads_per_kv_head;
  const auto load_stage = [&](const StreamedTile& tile, int stage) {
    const ValidColumns valid{tile.valid};
    const auto* q_head = head_pointer<P>(p.q, s_work.batch, head);
    const auto* grad_out_head = head_pointer<P>(p.grad_out, s_work.batch, head);
    load_tile<P, kHeadDim, kColumns, kThreads>(s_q + stage * Traits::kColumnTileBytes, p.q, q_head, tile.begin,
                                               p.head_dim, valid);
    load_tile<P, kHeadDim, kColumns, kThreads>(s_grad_out + stage * Traits::kColumnTileBytes, p.grad_out, grad_out_head,
                                               tile.begin, p.value_dim, valid);
    load_statistics<kColumns, kThreads>(s_statistics + stage * kColumns * 8, head_statistics(p, s_work.batch, head),
                                        tile);
    ptx::cp_async_commit();
  };

  RangeWalk<kColumns> walk(p.schedule, work.first_range, work.last_range, nullptr);
  if (work.n_splits > 1) {
    const int64_t head_tiles = walk.count_tiles();
    const int64_t n_tiles = head_tiles * p.heads_per_kv_head;
    const int64_t first = n_tiles * work.split / work.n_splits;
    head += static_cast<int32_t>(first / head_tiles);
    walk.restrict_to(static_cast<int32_t>(first % head_tiles),
                     static_cast<int32_t>(n_tiles * (work.split + 1) / work.n_splits - first));
  }
  const auto next_tile = [&](StreamedTile& tile) {
    while (!walk.next(tile)) {
      if (++head >= (s_work.head + 1) * p.heads_per_kv_head) return false;
      walk.rewind(s_work.first_range);
    }
    return true;
  };
  StreamedTile tile{};
  bool exists = any_row_kept(mask, work) && next_tile(tile);
  if (exists) {
    const KeptRows kept{mask == nullptr ? nullptr : mask + work.begin, work.end - work.begin};
    load_tile<P, kHeadDim, kRows, kThreads>(s_k, p.k, head_pointer<P>(p.k, work.batch, work.head), work.begin,
                                            p.head_dim, kept);
    if constexpr (kWantsKey) {
      load_tile<P, kHeadDim, kRows, kThreads>(s_v, p.v, head_pointer<P>(p.v, work.batch, work.head), work.begin,
                                              p.value_dim, kept);
    }
    load_stage(tile, 0);
  }

  Accumulators<kRowBlocks, Traits::kHeadBlocks> r_grad_k;
  Accumulators<kRowBlocks, Traits::kHeadBlocks> r_grad_v;
  clear(r_grad_k);
  clear(r_grad_v);

  const bool has_rows = warp_has_rows<kRowBlocks>(work);
  for (int stage = 0; exists; stage ^= 1) {
    const int columns = has_rows ? __popcll(tile.valid) : 0;  // the first ones: this walk has no mask
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the other stage any more
    exists = next_tile(tile);
    if (exists) load_stage(tile, stage ^ 1);

    const uint32_t stage_q = s_q + stage * Traits::kColumnTileBytes;
    const uint32_t stage_grad_out = s_grad_out + stage * Traits::kColumnTileBytes;
#pragma unroll 1
    for (int step = 0; step < columns; step += kStep) {
      const uint32_t lane_b = step * kStride + lane_offset_b<kStride>();
      const uint32_t lane_transposed_b = step * kStride + lane_offset_transposed_b<P, kStride>();
      const uint32_t step_statistics = s_statistics + (stage * kColumns + step) * 8;
      Accumulators<kRowBlocks, Traits::kStepBlocks> r_scores;
      clear(r_scores);
      qk_gemm<P, kHeadDim, kStride>(r_scores, s_k + warp_rows, stage_q + lane_b, p.head_dim);
      probabilities(r_scores, step_statistics, p.scale_log2);
      if constexpr (kWantsValue)
        pv_gemm<P, kStride>(r_grad_v, r_scores, stage_grad_out + lane_transposed_b, p.value_dim);
      if constexpr (kWantsKey) {
        Accumulators<kRowBlocks, Traits::kStepBlocks> r_probability_gradient;
        clear(r_probability_gradient);
        qk_gemm<P, kHeadDim, kStride>(r_probability_gradient, s_v + warp_rows, stage_grad_out + lane_b, p.value_dim);
        score_gradient_of_keys(r_scores, r_probability_gradient, step_statistics);
        pv_gemm<P, kStride>(r_grad_k, r_scores, stage_q + lane_transposed_b, p.head_dim);
      }
    }
  }

  if (s_work.n_splits > 1) {
    // Splits of a tile are added in order, which makes the sum the same in every run, and in one place, which limits
    // memory to one float32 copy of each gradient.
    constexpr int kTileElements = kRows * kHeadDim;
    constexpr int kGradientsPerTile = kWantsKey && kWantsValue ? 2 : 1;
    await_turn(p, s_work);
    float* tile_k = p.accumulators + accumulator_index(p, s_work) * kGradientsPerTile * kTileElements;
    float* tile_v = tile_k + (kGradientsPerTile - 1) * kTileElements;
    if (s_work.split > 0) {
      if constexpr (kWantsKey) add_accumulators<kThreads>(r_grad_k, tile_k);
      if constexpr (kWantsValue) add_accumulators<kThreads>(r_grad_v, tile_v);
    }
    if (s_work.split + 1 < s_work.n_splits) {
      if constexpr (kWantsKey) store_accumulators<kThreads>(r_grad_k, tile_k);
      if constexpr (kWantsValue) store_accumulators<kThreads>(r_grad_v, tile_v);
      pass_turn(p, s_work);
      return;
    }
  }
  if constexpr (kWantsKey) store_key_gradient<P, kHeadDim>(p.grad_k, p, s_work, r_grad_k, p.head_dim, p.scale);
  if constexpr (kWantsValue) store_key_gradient<P, kHeadDim>(p.grad_v, p, s_work, r_grad_v, p.value_dim, 1.0f);
}

template <class P, int kHeadDim, KeyGradients kGradients>
const void* backward_key_kernel() {
  return reinterpret_cast<const void*>(&attention_backward_key<P, kHeadDim, kGradients>);
}

}  // namespace anchor_attention::sm80
