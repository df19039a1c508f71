// Tensor maps of bulk tensor copies: how a plan describes one, and what a kernel receives. Plain C++.
#pragma once

#include <array>
#include <cstdint>

namespace anchor_attention {

// The bytes of a CUtensorMap, inside the parameters of a kernel.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128);

enum class TensorMapType : int32_t { bfloat16, float16, float32 };

// How 16-byte chunks of a box's rows are permuted in shared memory; rows are as long as the name says, or shorter.
enum class Swizzle : int32_t { none, bytes32, bytes64, bytes128 };

// Arguments of cuTensorMapEncodeTiled for a rank-4 tensor, fastest axis first; element strides of 1, no interleaving,
// zeros outside of the tensor.
struct TensorMapPlan {
  uint32_t params_offset;  // of the TensorMap in the kernel's parameters
  TensorMapType type;
  Swizzle swizzle;
  const void* address;                // 16-byte aligned
  std::array<uint64_t, 4> sizes;      // elements, 1 … 2^32
  std::array<uint64_t, 3> strides;    // bytes of axes 1 to 3, multiples of 16 below 2^40
  std::array<uint32_t, 4> box_sizes;  // elements, 1 … 256
};

}  // namespace anchor_attention
