// Tensor maps, encoded by the driver.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/common/tensor_map.h"

namespace anchor_attention::cuda {

// The driver is looked up at run time: a library linked against it would not load on a machine without one.
cudaError_t encode_tensor_map(const TensorMapPlan& plan, TensorMap& map);

}  // namespace anchor_attention::cuda
