// What the sm_80 kernels receive by value. Plain C++: launch plans are built, stored and compared without CUDA.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/kernel_params.h"
#include "kernels/cuda/sm80/config.h"

namespace anchor_attention::sm80 {

struct ForwardKernelParams {
  TensorView q;
  TensorView k;
  TensorView v;
  const float* q_freqs;     // interleaved real and imaginary parts, may be null
  const uint8_t* key_mask;  // may be null
  void* out;                // [batch, n_queries, heads, value_dim]
  float* lse;               // [batch, heads, n_queries]
  PartialResults partial;   // of tiles whose keys are split
  FreqsStrides q_freqs_strides;
  int64_t key_mask_batch_stride;
  int32_t n_queries;
  int32_t heads;
  int32_t heads_per_kv_head;  // that share keys and values
  int32_t head_dim;
  int32_t value_dim;
  float scale_log2;  // |scale| · log2(e)
  float q_sign;      // the sign of scale, applied to q so that the running maximum may use unscaled scores
  ScheduleView schedule;
};

struct BackwardKernelParams {
  TensorView q;  // rotated
  TensorView k;
  TensorView v;
  TensorView grad_out;
  const float* row_statistics;  // [batch, heads, n_queries, 2]: lse · log2(e) (+inf for rows without keys), delta
  const float* q_freqs;         // to rotate grad_q back, null when it stays rotated
  const uint8_t* key_mask;      // may be null
  void* grad_q;                 // [batch, n_queries, heads, head_dim]
  void* grad_k;                 // [batch, n_keys, kv_heads, head_dim], may be null
  void* grad_v;                 // [batch, n_keys, kv_heads, value_dim], may be null
  float* accumulators;          // [batch · kv_heads, n_accumulators, gradients, rows · native head_dim], fragment order
  int32_t* counters;  // [1 + batch · kv_heads · n_accumulators]: next item, then whose turn it is per accumulator
  FreqsStrides q_freqs_strides;
  int64_t key_mask_batch_stride;
  int32_t n_queries;
  int32_t n_keys;
  int32_t heads;
  int32_t kv_heads;
  int32_t heads_per_kv_head;
  int32_t head_dim;
  int32_t value_dim;
  float scale;
  float scale_log2;
  ScheduleView schedule;
};

// One tangent of a tensor after the other.
struct TangentView {
  TensorView first;  // its data is null where the tensor does not move
  int64_t stride;    // elements between tangents
};

struct JvpKernelParams {
  TensorView q;  // rotated
  TensorView k;
  TensorView v;
  TangentView q_tangents;
  TangentView k_tangents;
  TangentView v_tangents;
  const uint8_t* key_mask;  // may be null
  const void* out;          // [batch, n_queries, heads, value_dim]
  const float* lse;         // [batch, heads, n_queries]
  void* out_tangents;       // [n_tangents, batch, n_queries, heads, value_dim]
  float* lse_tangents;      // [n_tangents, batch, heads, n_queries]
  int64_t key_mask_batch_stride;
  int32_t n_tangents;
  int32_t batch;
  int32_t n_queries;
  int32_t heads;
  int32_t heads_per_kv_head;
  int32_t head_dim;
  int32_t value_dim;
  float scale;
  float scale_log2;
  ScheduleView schedule;
};

}  // namespace anchor_attention::sm80
