// Plans of the attention passes on sm_90a kernels; arguments as in common/launch_plan.h.
#pragma once

#include "kernels/cuda/common/launch_plan.h"

namespace anchor_attention::sm90 {

// Whether there is a kernel for these types, sizes, strides and addresses.
bool takes_forward(const AttentionParams& params);
bool takes_backward(const AttentionBackwardParams& params);

cuda::Plan plan_attention_forward(const AttentionParams& params, const cuda::PlanOptions& options, void* workspace);
cuda::Plan plan_attention_backward(const AttentionBackwardParams& params, const cuda::PlanOptions& options,
                                   void* workspace);

}  // namespace anchor_attention::sm90
