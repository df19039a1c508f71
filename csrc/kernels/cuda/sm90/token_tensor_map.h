// What the plans of the sm_90 passes share.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/tensor_map.h"
#include "params.h"

namespace anchor_attention::sm90 {

// Tokens of one head and batch element, as the kernels name them: (channel, token, head, batch).
struct TokenTensor {
  const void* data;
  Strides strides;
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
};

// Whether a bulk tensor copy can address the tensor as it lies in memory. Axes along which nothing moves (a stride of
// 0, or one element) always can, except for tokens.
bool fits_tensor_map(const TokenTensor& tensor);

// A map whose boxes are `channels` × `tokens` of one head; `channels` · 2 bytes are the span of a swizzle. An axis with
// a stride of 0 has one element in the map: kernels multiply the index by `axis_step`.
TensorMapPlan tensor_map(const TokenTensor& tensor, ScalarType dtype, int channels, int tokens, uint32_t params_offset);

inline int32_t axis_step(int64_t stride) { return stride == 0 ? 0 : 1; }

}  // namespace anchor_attention::sm90
