// Plans of the attention passes on sm_80 kernels; arguments as in common/launch_plan.h.
#pragma once

#include "kernels/cuda/common/launch_plan.h"

namespace anchor_attention::sm80 {

cuda::Plan plan_attention_forward(const AttentionParams& params, const cuda::PlanOptions& options, void* workspace);
cuda::Plan plan_attention_backward(const AttentionBackwardParams& params, const cuda::PlanOptions& options,
                                   void* workspace);
// out and lse are known, whatever the params say.
cuda::Plan plan_attention_jvp(const AttentionJvpParams& params, const cuda::PlanOptions& options, void* workspace);
cuda::Plan plan_attention_double_backward(const AttentionDoubleBackwardParams& params, void* workspace);

}  // namespace anchor_attention::sm80
