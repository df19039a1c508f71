// Tensor maps, encoded by the driver.
#pragma once

#include "kernels/cuda/common/tensor_map.h"

namespace anchor_attention::cuda {

// Writes the map of `plan` to `destination`, which needs no alignment. Maps that a thread encoded before are kept for
// it: training calls with the same memory again and again. Throws DriverError.
void encode_tensor_map(const TensorMapPlan& plan, void* destination);

}  // namespace anchor_attention::cuda
