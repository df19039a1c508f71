// What the plans of the backward and of the second derivative share.
#pragma once

#include "kernels/cuda/common/kernel_params.h"
#include "kernels/cuda/sm80/kernel_params.h"
#include "params.h"

namespace anchor_attention::sm80 {

// Everything but the rotation, the workspace and the schedule.
BackwardKernelParams backward_kernel_params(const AttentionBackwardParams& params);

// Without counters and tangents.
StatisticsKernelParams statistics_kernel_params(const AttentionBackwardParams& params, float* row_statistics);

}  // namespace anchor_attention::sm80
