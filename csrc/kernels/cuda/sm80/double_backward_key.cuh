// Second derivative, gradients of keys and values: a block owns a tile of keys and streams the queries that read them,
// head after head where several share the keys, as in the key pass; scores are transposed.
#pragma once

#include "kernels/cuda/sm80/backward_key.cuh"
#include "kernels/cuda/sm80/double_backward.cuh"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim, KeyGradients kGradients, class Traits = SecondTraits<P, kHeadDim, SecondPass::key>>
__global__ void __launch_bounds__(Traits::kThreads) __maxnreg__(Traits::kShape.max_registers)
    attention_double_backward_key(const __grid_constant__ DoubleBackwardKernelParams params) {
  constexpr bool kWantsKey = kGradients != KeyGradients::value;
  constexpr bool kWantsValue = kGradients != KeyGradients::key;
  constexpr int kRows = Traits::kShape.rows;
  constexpr int kColumns = Traits::kShape.columns;
  constexpr int kStep = Traits::kShape.step;
  constexpr int kStride = Traits::kStride;
  constexpr int kThreads = Traits::kThreads;
  extern __shared__ Chunk shared_memory[];

  const BackwardKernelParams& p = params.backward;
  const bool queries_move = params.q_tangent.data != nullptr;
  const bool keys_move = params.k_tangent.data != nullptr;
  const bool values_move = params.v_tangent.data != nullptr;
  const WorkItem work = find_work_item(p.schedule, blockIdx.x, p.kv_heads, kRows);
  const uint8_t* mask = batch_key_mask(p, work);

  const uint32_t s_q = ptx::shared_address(shared_memory);
  const uint32_t s_q_tangent = s_q + Traits::kColumnTileBytes;
  const uint32_t s_grad_out = s_q_tangent + Traits::kColumnTileBytes;
  const uint32_t s_statistics = s_grad_out + Traits::kColumnTileBytes;
  const uint32_t s_k = s_statistics + kColumns * 16;
  const uint32_t s_v = s_k + Traits::kRowTileBytes;
  const uint32_t s_k_tangent = s_v + Traits::kRowTileBytes;
  const uint32_t s_v_tangent = s_k_tangent + Traits::kRowTileBytes;
  const uint32_t warp_rows = threadIdx.x / 32 * 16 * kStride + lane_offset_a<kStride>();

  const auto load_rows = [&](uint32_t shared, const TensorView& tensor, int32_t head_dim) {
    const KeptRows kept{mask == nullptr ? nullptr : mask + work.begin, work.end - work.begin};
    load_tile<P, kHeadDim, kRows, kThreads>(shared, tensor, head_pointer<P>(tensor, work.batch, work.head), work.begin,
                                            head_dim, kept);
  };
  // Of the queries of the tile. Those that share these keys follow each other.
  int32_t head = work.head * p.heads_per_kv_head;
  const auto load_columns = [&](uint32_t shared, const TensorView& tensor, const StreamedTile& tile, int32_t head_dim) {
    load_tile<P, kHeadDim, kColumns, kThreads>(shared, tensor, head_pointer<P>(tensor, work.batch, head), tile.begin,
                                               head_dim, ValidColumns{tile.valid});
  };

  RangeWalk<kColumns> walk(p.schedule, work.first_range, work.last_range, nullptr);
  const auto next_tile = [&](StreamedTile& tile) {
    while (!walk.next(tile)) {
      if (++head >= (work.head + 1) * p.heads_per_kv_head) return false;
      walk.rewind(work.first_range);
    }
    return true;
  };
  StreamedTile tile{};
  bool exists = any_row_kept(mask, work) && next_tile(tile);
  if (exists) {
    load_rows(s_k, p.k, p.head_dim);
    if (keys_move) load_rows(s_k_tangent, params.k_tangent, p.head_dim);
    if constexpr (kWantsKey) {
      load_rows(s_v, p.v, p.value_dim);
      if (values_move) load_rows(s_v_tangent, params.v_tangent, p.value_dim);
    }
  }
  Accumulators<1, Traits::kHeadBlocks> r_grad_k;
  Accumulators<1, Traits::kHeadBlocks> r_grad_v;
  clear(r_grad_k);
  clear(r_grad_v);

  const bool has_rows = warp_has_rows<1>(work);
  while (exists) {
    load_columns(s_q, p.q, tile, p.head_dim);
    if (queries_move) load_columns(s_q_tangent, params.q_tangent, tile, p.head_dim);
    load_columns(s_grad_out, p.grad_out, tile, p.value_dim);
    for (int32_t column = threadIdx.x; column < kColumns; column += kThreads) {
      const bool read = (tile.valid >> column & 1) != 0;
      const float4* of_head = second_statistics(p, work.batch, head);
      ptx::cp_async_or_zero<16>(s_statistics + column * 16, read ? of_head + tile.begin + column : of_head, read);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int columns = has_rows ? __popcll(tile.valid) : 0;  // without a mask they are the first ones
#pragma unroll 1
    for (int step = 0; step < columns; step += kStep) {
      const uint32_t lane_b = step * kStride + lane_offset_b<kStride>();
      const uint32_t lane_transposed_b = step * kStride + lane_offset_transposed_b<P, kStride>();
      const auto statistics = [&](int n, int i) {
        const uint32_t at = s_statistics + (step + 8 * n + lane() % 4 * 2 + i % 2) * 16;
        const float2 first = ptx::load_shared_float2(at);
        const float2 second = ptx::load_shared_float2(at + 8);
        return make_float4(first.x, first.y, second.x, second.y);
      };
      Scores<Traits::kStepBlocks> r_probabilities;
      Scores<Traits::kStepBlocks> r_tangents;
      clear(r_probabilities);
      clear(r_tangents);
      qk_gemm<P, kHeadDim, kStride>(r_probabilities, s_k + warp_rows, s_q + lane_b, p.head_dim);
      if (queries_move) {
        qk_gemm<P, kHeadDim, kStride>(r_tangents, s_k + warp_rows, s_q_tangent + lane_b, p.head_dim);
      }
      if (keys_move) qk_gemm<P, kHeadDim, kStride>(r_tangents, s_k_tangent + warp_rows, s_q + lane_b, p.head_dim);
      first_order(r_probabilities, r_tangents, statistics, p.scale, p.scale_log2);
      if constexpr (kWantsValue) {
        Scores<Traits::kStepBlocks> r_weights;
#pragma unroll
        for (int n = 0; n < Traits::kStepBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) r_weights[0][n][i] = r_tangents[0][n][i];
        }
        multiply(r_weights, r_probabilities);
        pv_gemm<P, kStride>(r_grad_v, r_weights, s_grad_out + lane_transposed_b, p.value_dim);
      }
      if constexpr (kWantsKey) {
        Scores<Traits::kStepBlocks> r_score_gradient;
        clear(r_score_gradient);
        qk_gemm<P, kHeadDim, kStride>(r_score_gradient, s_v + warp_rows, s_grad_out + lane_b, p.value_dim);
        second_order(r_probabilities, r_tangents, r_score_gradient, statistics);
        if (values_move) {
          qk_gemm<P, kHeadDim, kStride>(r_tangents, s_v_tangent + warp_rows, s_grad_out + lane_b, p.value_dim);
        }
        multiply(r_tangents, r_probabilities);
        pv_gemm<P, kStride>(r_grad_k, r_tangents, s_q + lane_transposed_b, p.head_dim);
        if (queries_move) {
          pv_gemm<P, kStride>(r_grad_k, r_score_gradient, s_q_tangent + lane_transposed_b, p.head_dim);
        }
      }
    }
    exists = next_tile(tile);
    __syncthreads();  // the tiles are read no more
  }
  if constexpr (kWantsKey) store_key_gradient<P, kHeadDim>(p.grad_k, p, work, r_grad_k, p.head_dim, p.scale);
  if constexpr (kWantsValue) store_key_gradient<P, kHeadDim>(p.grad_v, p, work, r_grad_v, p.value_dim, 1.0f);
}

template <class P, int kHeadDim, KeyGradients kGradients>
const void* double_backward_key_kernel() {
  return reinterpret_cast<const void*>(&attention_double_backward_key<P, kHeadDim, kGradients>);
}

}  // namespace anchor_attention::sm80
