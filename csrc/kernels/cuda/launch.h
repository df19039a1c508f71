// Executes plans.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/common/plan.h"

namespace anchor_attention::cuda {

// Starts the launches of `plan` on `stream`, in order, up to the first error.
cudaError_t launch(const Plan& plan, cudaStream_t stream);

}  // namespace anchor_attention::cuda
