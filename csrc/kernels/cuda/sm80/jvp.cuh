// Tangents of output and lse along one direction (a, b, c) of queries, keys and values: a block owns a tile of queries,
// as in the forward, and recomputes the probabilities of its keys. With T = scale · (a Kᵀ + Q bᵀ) and W = P ∘ (T −
// reference), the tangent of the output is W V + P c − Σ W · O, that of lse the reference + Σ W. The reference is one
// number for each row, on which neither depends: what T has in common for all keys is taken off before anything is
// summed. It is the mean of T over the keys of the row's first step.
#pragma once

#include "kernels/cuda/common/softmax.cuh"
#include "kernels/cuda/sm80/backward.cuh"

namespace anchor_attention::sm80 {

// What a thread knows of the two rows of each row block that it sees.
template <int kRowBlocks>
struct JvpRows {
  float lse[kRowBlocks][2];  // in base 2, +inf where the row has no key
  float reference[kRowBlocks][2];
  float sum[kRowBlocks][2];  // of W, over the columns of the thread
};

template <class P>
__device__ inline const typename P::Storage* head_pointer(const TangentView& tangents, int32_t tangent, int32_t batch,
                                                          int32_t head) {
  return head_pointer<P>(tangents.first, batch, head) + tangent * tangents.stride;
}

// Scores → probabilities.
template <int kRowBlocks, int kStepBlocks>
__device__ inline void known_probabilities(Accumulators<kRowBlocks, kStepBlocks>& r_scores,
                                           const JvpRows<kRowBlocks>& rows, uint64_t valid, float scale_log2) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r_scores[m][n][i] = ptx::exp2_approx(fmaf(r_scores[m][n][i], scale_log2, -rows.lse[m][i / 2]));
      }
    }
  }
  fill_masked(r_scores, valid, 0.0f);
}

template <int kRowBlocks, int kStepBlocks>
__device__ inline void set_reference(JvpRows<kRowBlocks>& rows,
                                     const Accumulators<kRowBlocks, kStepBlocks>& r_probabilities,
                                     const Accumulators<kRowBlocks, kStepBlocks>& r_tangents, float scale) {
  // A step whose probabilities are all 0 has a mean, too.
  constexpr float kLeastWeight = 0x1p-60f;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float weights = 0.0f;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          const float weight = fmaxf(r_probabilities[m][n][i], kLeastWeight);
          weights += weight;
          sum = fmaf(weight, r_tangents[m][n][i], sum);
        }
      }
      rows.reference[m][row] = scale * (sum_over_quad(sum) / sum_over_quad(weights));
    }
  }
}

// Tangents of scores, without scale → W.
template <int kRowBlocks, int kStepBlocks>
__device__ inline void weight_tangents(Accumulators<kRowBlocks, kStepBlocks>& r_tangents, JvpRows<kRowBlocks>& rows,
                                       const Accumulators<kRowBlocks, kStepBlocks>& r_probabilities, float scale) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r_tangents[m][n][i] = r_probabilities[m][n][i] * fmaf(r_tangents[m][n][i], scale, -rows.reference[m][i / 2]);
        rows.sum[m][i / 2] += r_tangents[m][n][i];
      }
    }
  }
}

template <class P, int kHeadDim, int kRowBlocks>
__device__ inline void store_tangents(const JvpKernelParams& p, const WorkItem& work, int32_t tangent,
                                      const Accumulators<kRowBlocks, kHeadDim / 8>& r_out,
                                      const JvpRows<kRowBlocks>& rows) {
  const auto* out = static_cast<const typename P::Storage*>(p.out);
  auto* out_tangents = static_cast<typename P::Storage*>(p.out_tangents);
  const int64_t batch = static_cast<int64_t>(tangent) * p.batch + work.batch;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float mean = sum_over_quad(rows.sum[m][row]);
      const int32_t token = work.begin + accumulator_row<kRowBlocks>(m, row);
      if (token >= work.end) continue;
      if (lane() % 4 == 0) {
        p.lse_tangents[(batch * p.heads + work.head) * p.n_queries + token] = rows.reference[m][row] + mean;
      }
      const int64_t channel = lane() % 4 * 2;
      const auto first = [&](int64_t of_batch) {
        return ((of_batch * p.n_queries + token) * p.heads + work.head) * p.value_dim + channel;
      };
      const auto* value = out + first(work.batch);
      auto* target = out_tangents + first(batch);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        if (8 * n >= p.value_dim) break;
        const float2 of_out = load_pair<P>(value + 8 * n);
        store_pair<P>(target + 8 * n, fmaf(-mean, of_out.x, r_out[m][n][2 * row]),
                      fmaf(-mean, of_out.y, r_out[m][n][2 * row + 1]));
      }
    }
  }
}

template <class P, int kHeadDim, class Traits = BackwardTraits<P, kHeadDim, Pass::jvp>>
__global__ void __launch_bounds__(Traits::kThreads) __maxnreg__(Traits::kShape.max_registers)
    attention_jvp(const __grid_constant__ JvpKernelParams p) {
  constexpr int kRows = Traits::kShape.rows;
  constexpr int kColumns = Traits::kShape.columns;
  constexpr int kStep = Traits::kShape.step;
  constexpr int kStride = Traits::kStride;
  constexpr int kThreads = Traits::kThreads;
  constexpr int kRowBlocks = Traits::kRowBlocks;
  extern __shared__ Chunk shared_memory[];

  const bool queries_move = p.q_tangents.first.data != nullptr;
  const bool keys_move = p.k_tangents.first.data != nullptr;
  const bool values_move = p.v_tangents.first.data != nullptr;
  const bool scores_move = queries_move || keys_move;
  // The tiles of tangents take the place of the second stage.
  const bool one_stage = keys_move || values_move;

  // Tangents of a head follow each other: they read the same keys.
  WorkItem work = find_work_item(p.schedule, blockIdx.x, p.heads * p.n_tangents, kRows);
  const int32_t tangent = work.head % p.n_tangents;
  work.head /= p.n_tangents;
  const int32_t kv_head = work.head / p.heads_per_kv_head;
  const uint8_t* mask = batch_key_mask(p, work);

  const uint32_t s_q = ptx::shared_address(shared_memory);
  const uint32_t s_q_tangent = s_q + Traits::kRowTileBytes;
  const uint32_t s_stages = s_q_tangent + Traits::kRowTileBytes;
  const uint32_t s_k_tangent = s_stages + 2 * Traits::kColumnTileBytes;
  const uint32_t s_v_tangent = s_k_tangent + Traits::kColumnTileBytes;
  const uint32_t warp_rows = threadIdx.x / 32 * 16 * kRowBlocks * kStride + lane_offset_a<kStride>();

  const auto load_columns = [&](uint32_t shared, const TensorView& tensor, const typename P::Storage* head,
                                const StreamedTile& tile, int32_t head_dim) {
    load_tile<P, kHeadDim, kColumns, kThreads>(shared, tensor, head, tile.begin, head_dim, ValidColumns{tile.valid});
  };
  const auto load_stage = [&](const StreamedTile& tile, int stage) {
    const uint32_t s_k = s_stages + 2 * stage * Traits::kColumnTileBytes;
    load_columns(s_k, p.k, head_pointer<P>(p.k, work.batch, kv_head), tile, p.head_dim);
    if (scores_move) {
      load_columns(s_k + Traits::kColumnTileBytes, p.v, head_pointer<P>(p.v, work.batch, kv_head), tile, p.value_dim);
    }
    if (keys_move) {
      load_columns(s_k_tangent, p.k_tangents.first, head_pointer<P>(p.k_tangents, tangent, work.batch, kv_head), tile,
                   p.head_dim);
    }
    if (values_move) {
      load_columns(s_v_tangent, p.v_tangents.first, head_pointer<P>(p.v_tangents, tangent, work.batch, kv_head), tile,
                   p.value_dim);
    }
    ptx::cp_async_commit();
  };

  RangeWalk<kColumns> walk(p.schedule, work.first_range, work.last_range, mask);
  StreamedTile tile{};
  bool exists = walk.next(tile);
  if (exists) {
    const FirstRows rows{work.end - work.begin};
    load_tile<P, kHeadDim, kRows, kThreads>(s_q, p.q, head_pointer<P>(p.q, work.batch, work.head), work.begin,
                                            p.head_dim, rows);
    if (queries_move) {
      load_tile<P, kHeadDim, kRows, kThreads>(s_q_tangent, p.q_tangents.first,
                                              head_pointer<P>(p.q_tangents, tangent, work.batch, work.head), work.begin,
                                              p.head_dim, rows);
    }
    load_stage(tile, 0);
  }

  JvpRows<kRowBlocks> rows;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t token = work.begin + accumulator_row<kRowBlocks>(m, row);
      const int64_t batch_head = static_cast<int64_t>(work.batch) * p.heads + work.head;
      const float lse = token < work.end ? p.lse[batch_head * p.n_queries + token] : -INFINITY;
      rows.lse[m][row] = lse == -INFINITY ? INFINITY : lse * kLog2E;
      rows.reference[m][row] = rows.sum[m][row] = 0.0f;
    }
  }
  Accumulators<kRowBlocks, Traits::kHeadBlocks> r_out;
  clear(r_out);

  const bool has_rows = warp_has_rows<kRowBlocks>(work);
  bool has_reference = false;
  for (int stage = 0; exists;) {
    const uint64_t valid = tile.valid;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is here, and the other stage is read no more
    exists = walk.next(tile);
    if (exists && !one_stage) load_stage(tile, stage ^ 1);

    const uint32_t s_k = s_stages + 2 * stage * Traits::kColumnTileBytes;
    const uint32_t s_v = s_k + Traits::kColumnTileBytes;
#pragma unroll 1
    for (int step = 0; step < kColumns && has_rows; step += kStep) {
      if ((valid >> step & low_bits(kStep)) == 0) continue;
      const uint32_t lane_b = step * kStride + lane_offset_b<kStride>();
      const uint32_t lane_transposed_b = step * kStride + lane_offset_transposed_b<P, kStride>();
      Accumulators<kRowBlocks, Traits::kStepBlocks> r_probabilities;
      clear(r_probabilities);
      qk_gemm<P, kHeadDim, kStride>(r_probabilities, s_q + warp_rows, s_k + lane_b, p.head_dim);
      known_probabilities(r_probabilities, rows, valid >> step, p.scale_log2);
      // First, so that the probabilities take no registers during the last product.
      if (values_move) pv_gemm<P, kStride>(r_out, r_probabilities, s_v_tangent + lane_transposed_b, p.value_dim);
      if (scores_move) {
        Accumulators<kRowBlocks, Traits::kStepBlocks> r_tangents;
        clear(r_tangents);
        if (queries_move) {
          qk_gemm<P, kHeadDim, kStride>(r_tangents, s_q_tangent + warp_rows, s_k + lane_b, p.head_dim);
        }
        if (keys_move) {
          qk_gemm<P, kHeadDim, kStride>(r_tangents, s_q + warp_rows, s_k_tangent + lane_b, p.head_dim);
        }
        if (!has_reference) set_reference(rows, r_probabilities, r_tangents, p.scale);
        has_reference = true;
        weight_tangents(r_tangents, rows, r_probabilities, p.scale);
        pv_gemm<P, kStride>(r_out, r_tangents, s_v + lane_transposed_b, p.value_dim);
      }
    }
    if (!one_stage) {
      stage ^= 1;
    } else if (exists) {
      __syncthreads();  // the one stage is read no more
      load_stage(tile, 0);
    }
  }
  store_tangents<P, kHeadDim>(p, work, tangent, r_out, rows);
}

template <class P, int kHeadDim>
const void* jvp_kernel() {
  return reinterpret_cast<const void*>(&attention_jvp<P, kHeadDim>);
}

}  // namespace anchor_attention::sm80
