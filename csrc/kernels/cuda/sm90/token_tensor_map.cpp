#include "kernels/cuda/sm90/token_tensor_map.h"

#include <limits>

namespace anchor_attention::sm90 {
namespace {

constexpr int64_t kBytes = 2;
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;

bool axis_fits(int64_t stride, int64_t size) {
  if (stride == 0 || size <= 1) return true;
  return stride > 0 && stride * kBytes % 16 == 0 && stride * kBytes < kMaxStrideBytes;
}

uint64_t axis_size(int64_t stride, int64_t size) { return stride == 0 ? 1 : static_cast<uint64_t>(size); }

// Of an axis with one element the stride is not used, but must be valid.
uint64_t axis_stride(int64_t stride, int64_t size) {
  return stride == 0 || size <= 1 ? 16 : static_cast<uint64_t>(stride * kBytes);
}

}  // namespace

bool fits_tensor_map(const TokenTensor& t) {
  for (const int64_t size : {t.batch, t.tokens, t.heads}) {
    if (size < 1 || size > std::numeric_limits<int32_t>::max()) return false;
  }
  const bool tokens_move = t.strides.token != 0 || t.tokens == 1;
  return tokens_move && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && axis_fits(t.strides.token, t.tokens) &&
         axis_fits(t.strides.head, t.heads) && axis_fits(t.strides.batch, t.batch);
}

TensorMapPlan tensor_map(const TokenTensor& t, ScalarType dtype, int channels, int tokens, uint32_t params_offset) {
  TensorMapPlan plan{};
  plan.params_offset = params_offset;
  plan.type = dtype == ScalarType::bfloat16 ? TensorMapType::bfloat16 : TensorMapType::float16;
  plan.swizzle = channels == 64 ? Swizzle::bytes128 : channels == 32 ? Swizzle::bytes64 : Swizzle::bytes32;
  plan.address = t.data;
  plan.sizes = {static_cast<uint64_t>(t.head_dim), static_cast<uint64_t>(t.tokens), axis_size(t.strides.head, t.heads),
                axis_size(t.strides.batch, t.batch)};
  plan.strides = {axis_stride(t.strides.token, t.tokens), axis_stride(t.strides.head, t.heads),
                  axis_stride(t.strides.batch, t.batch)};
  plan.box_sizes = {static_cast<uint32_t>(channels), static_cast<uint32_t>(tokens), 1, 1};
  return plan;
}

}  // namespace anchor_attention::sm90
