// What the sm_90 backward kernels receive by value. Plain C++: launch plans are built, stored and compared without
// CUDA.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/kernel_params.h"
#include "kernels/cuda/common/tensor_map.h"
#include "kernels/cuda/sm90/backward_config.h"
#include "kernels/cuda/sm90/kernel_params.h"

namespace anchor_attention::sm90 {

// Stored behind the ranges of a schedule, one for each range: where the sums of its tiles of queries lie, and when a
// block may add to them. Turn t at a tile is turn t % turns_per_sum at its sum t / turns_per_sum.
struct RangeTurns {
  int32_t first_sum;  // of the first tile of queries
  int32_t sums_per_tile;
  int32_t first_turn;  // of the group's first tile of keys
  int32_t turns_per_key_tile;
};
constexpr int kWordsPerRangeTurns = 4;
static_assert(sizeof(RangeTurns) == kWordsPerRangeTurns * sizeof(int32_t));

struct BackwardKernelParams {
  TensorMap q;  // rotated
  TensorMap k;
  TensorMap v;
  TensorMap grad_out;
  AxisSteps q_steps;
  AxisSteps k_steps;
  AxisSteps v_steps;
  AxisSteps grad_out_steps;
  const float* row_statistics;  // [batch, heads, n_queries, 2]: lse · log2(e) (+inf for rows without keys), delta
  const uint8_t* key_mask;      // may be null
  void* grad_k;                 // [batch, n_keys, kv_heads, head_dim], may be null
  void* grad_v;                 // [batch, n_keys, kv_heads, value_dim], may be null
  float* query_gradients;       // [batch · heads, n_sums, queries · native head_dim], fragment order
  float* key_gradients;         // [batch · kv_heads, n_accumulators, 2, 128 · native head_dim], fragment order
  int32_t* ticket;              // the next item
  int32_t* query_turns;         // [batch · heads, n_sums]: blocks that have added
  int32_t* key_turns;           // [batch · kv_heads, n_accumulators]: splits that have added to the tile
  int64_t key_mask_batch_stride;
  int32_t n_queries;
  int32_t n_keys;
  int32_t batch_kv_heads;
  int32_t kv_heads;
  int32_t heads_per_kv_head;
  int32_t head_dim;
  int32_t value_dim;
  int32_t n_sums;         // of the gradient of the queries of a head
  int32_t turns_per_sum;  // at most
  int32_t n_ranges;
  float scale;
  float scale_log2;
  ScheduleView schedule;  // of the keys; its ranges are followed by RangeTurns
};

// Sums of the gradient of the queries → the gradient: scaled, rotated back, rounded. Its schedule is that of the
// queries; instead of accumulators of its own, a group says where its sums begin: those of a tile follow each other.
struct QueryGradientKernelParams {
  const float* query_gradients;  // [batch · heads, n_sums, queries · native head_dim], fragment order
  const float* q_freqs;          // null when the gradient stays rotated
  void* grad_q;                  // [batch, n_queries, heads, head_dim]
  FreqsStrides q_freqs_strides;
  int32_t n_queries;
  int32_t heads;
  int32_t head_dim;
  int32_t n_sums;
  float scale;
  ScheduleView schedule;
};

}  // namespace anchor_attention::sm90
