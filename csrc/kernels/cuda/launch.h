// Executes plans.
#pragma once

#include "kernels/cuda/common/launch_plan.h"
#include "kernels/cuda/device.h"

namespace anchor_attention::cuda {

// Starts the launches of `plan` on `stream` of `device`, in order. Encodes tensor maps into the plan's parameters.
// Throws DriverError at the first launch that fails.
void launch(Plan& plan, const Device& device, CUstream stream);

}  // namespace anchor_attention::cuda
