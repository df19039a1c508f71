#include "kernels/cuda/common/tensor_map_encoder.h"

#include <cuda.h>

#include <cstring>

namespace anchor_attention::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  // The first driver that knows tensor maps is that of CUDA 12.0.
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

CUtensorMapDataType data_type(TensorMapType type) {
  switch (type) {
    case TensorMapType::bfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TensorMapType::float16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

CUtensorMapSwizzle swizzle(Swizzle mode) {
  switch (mode) {
    case Swizzle::bytes128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::bytes64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::bytes32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

cudaError_t encode_tensor_map(const TensorMapPlan& plan, TensorMap& map) {
  static const Encode encode = find_encoder();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  constexpr uint32_t kElementStrides[] = {1, 1, 1, 1};
  CUtensorMap encoded;
  const CUresult result =
      encode(&encoded, data_type(plan.type), 4, const_cast<void*>(plan.address), plan.sizes.data(), plan.strides.data(),
             plan.box_sizes.data(), kElementStrides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle(plan.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  std::memcpy(&map, &encoded, sizeof(map));
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace anchor_attention::cuda
