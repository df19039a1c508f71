// What the sm_90a forward receives by value. Plain C++: launch plans are built, stored and compared without CUDA.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/kernel_params.h"
#include "kernels/cuda/common/tensor_map.h"

namespace anchor_attention::sm90 {

// Maps of (channel, token, head, batch). An axis along which nothing moves has one element, and a step of 0.
struct AxisSteps {
  int32_t head;
  int32_t batch;
};

struct ForwardKernelParams {
  TensorMap k;
  TensorMap v;
  TensorMap out;  // of boxes of 64 tokens
  cuda::TensorView q;
  const float* q_freqs;          // interleaved real and imaginary parts, may be null
  const uint8_t* key_mask;       // may be null
  void* out_data;                // [batch, n_queries, heads, value_dim]
  float* lse;                    // [batch, heads, n_queries]
  cuda::PartialResults partial;  // of tiles whose keys are split
  FreqsStrides q_freqs_strides;
  int64_t key_mask_batch_stride;
  AxisSteps k_steps;
  AxisSteps v_steps;
  uint32_t n_work;  // items of all heads and batch elements
  int32_t n_queries;
  int32_t heads;
  int32_t heads_per_kv_head;  // that share keys and values
  int32_t head_dim;
  int32_t value_dim;
  float scale_log2;  // |scale| · log2(e)
  float q_sign;      // the sign of scale, applied to q so that the running maximum may use unscaled scores
  cuda::ScheduleView schedule;
};

}  // namespace anchor_attention::sm90
