// Second derivative, gradient of the queries: a block owns a tile of queries and walks their keys, as in the query
// pass.
#pragma once

#include "kernels/cuda/sm80/backward_query.cuh"
#include "kernels/cuda/sm80/double_backward.cuh"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim, class Traits = SecondTraits<P, kHeadDim, SecondPass::query>>
__global__ void __launch_bounds__(Traits::kThreads) __maxnreg__(Traits::kShape.max_registers)
    attention_double_backward_query(const __grid_constant__ DoubleBackwardKernelParams params) {
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
  const WorkItem work = find_work_item(p.schedule, blockIdx.x, p.heads, kRows);
  const int32_t kv_head = work.head / p.heads_per_kv_head;

  const uint32_t s_q = ptx::shared_address(shared_memory);
  const uint32_t s_q_tangent = s_q + Traits::kRowTileBytes;
  const uint32_t s_grad_out = s_q_tangent + Traits::kRowTileBytes;
  const uint32_t s_k = s_grad_out + Traits::kRowTileBytes;
  const uint32_t s_v = s_k + Traits::kColumnTileBytes;
  const uint32_t s_k_tangent = s_v + Traits::kColumnTileBytes;
  const uint32_t s_v_tangent = s_k_tangent + Traits::kColumnTileBytes;
  const uint32_t warp_rows = threadIdx.x / 32 * 16 * kStride + lane_offset_a<kStride>();

  const auto load_rows = [&](uint32_t shared, const TensorView& tensor, int32_t head_dim) {
    load_tile<P, kHeadDim, kRows, kThreads>(shared, tensor, head_pointer<P>(tensor, work.batch, work.head), work.begin,
                                            head_dim, FirstRows{work.end - work.begin});
  };
  const auto load_columns = [&](uint32_t shared, const TensorView& tensor, const StreamedTile& tile, int32_t head_dim) {
    load_tile<P, kHeadDim, kColumns, kThreads>(shared, tensor, head_pointer<P>(tensor, work.batch, kv_head), tile.begin,
                                               head_dim, ValidColumns{tile.valid});
  };

  RangeWalk<kColumns> walk(p.schedule, work.first_range, work.last_range, batch_key_mask(p, work));
  StreamedTile tile{};
  bool exists = walk.next(tile);
  if (exists) {
    load_rows(s_q, p.q, p.head_dim);
    if (queries_move) load_rows(s_q_tangent, params.q_tangent, p.head_dim);
    load_rows(s_grad_out, p.grad_out, p.value_dim);
  }
  float4 r_statistics[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int32_t token = work.begin + accumulator_row<1>(0, row);
    r_statistics[row] =
        token < work.end ? second_statistics(p, work.batch, work.head)[token] : make_float4(INFINITY, 0.0f, 0.0f, 0.0f);
  }
  const auto statistics = [&](int, int i) { return r_statistics[i / 2]; };
  Accumulators<1, Traits::kHeadBlocks> r_grad_q;
  clear(r_grad_q);

  const bool has_rows = warp_has_rows<1>(work);
  while (exists) {
    load_columns(s_k, p.k, tile, p.head_dim);
    load_columns(s_v, p.v, tile, p.value_dim);
    if (keys_move) load_columns(s_k_tangent, params.k_tangent, tile, p.head_dim);
    if (values_move) load_columns(s_v_tangent, params.v_tangent, tile, p.value_dim);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kColumns && has_rows; step += kStep) {
      if ((tile.valid >> step & low_bits(kStep)) == 0) continue;
      const uint32_t lane_b = step * kStride + lane_offset_b<kStride>();
      const uint32_t lane_transposed_b = step * kStride + lane_offset_transposed_b<P, kStride>();
      Scores<Traits::kStepBlocks> r_probabilities;
      Scores<Traits::kStepBlocks> r_tangents;
      Scores<Traits::kStepBlocks> r_score_gradient;
      clear(r_probabilities);
      clear(r_tangents);
      clear(r_score_gradient);
      qk_gemm<P, kHeadDim, kStride>(r_probabilities, s_q + warp_rows, s_k + lane_b, p.head_dim);
      if (queries_move) {
        qk_gemm<P, kHeadDim, kStride>(r_tangents, s_q_tangent + warp_rows, s_k + lane_b, p.head_dim);
      }
      if (keys_move) qk_gemm<P, kHeadDim, kStride>(r_tangents, s_q + warp_rows, s_k_tangent + lane_b, p.head_dim);
      first_order(r_probabilities, r_tangents, statistics, p.scale, p.scale_log2);
      fill_masked(r_probabilities, tile.valid >> step, 0.0f);
      qk_gemm<P, kHeadDim, kStride>(r_score_gradient, s_grad_out + warp_rows, s_v + lane_b, p.value_dim);
      second_order(r_probabilities, r_tangents, r_score_gradient, statistics);
      if (values_move) {
        qk_gemm<P, kHeadDim, kStride>(r_tangents, s_grad_out + warp_rows, s_v_tangent + lane_b, p.value_dim);
      }
      multiply(r_tangents, r_probabilities);
      pv_gemm<P, kStride>(r_grad_q, r_tangents, s_k + lane_transposed_b, p.head_dim);
      if (keys_move) pv_gemm<P, kStride>(r_grad_q, r_score_gradient, s_k_tangent + lane_transposed_b, p.head_dim);
    }
    exists = walk.next(tile);
    __syncthreads();  // the tiles are read no more
  }
  store_grad_q<P, kHeadDim>(p, work, r_grad_q);
}

template <class P, int kHeadDim>
const void* double_backward_query_kernel() {
  return reinterpret_cast<const void*>(&attention_double_backward_query<P, kHeadDim>);
}

}  // namespace anchor_attention::sm80
