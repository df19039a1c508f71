// Plans of the attention passes: chooses among the generations of kernels.
#pragma once

#include "kernels/cuda/common/launch_plan.h"

namespace anchor_attention::cuda {

// Pointers of `params` are device pointers, its table is in host memory and read here only. `workspace` is device
// memory, 256-byte aligned, of the plan's `workspace_bytes`, which do not depend on it, or kNoWorkspaceYet.
// Throws std::invalid_argument for what the kernels do not support: float64, a head_dim that is not a multiple of 8 or
// exceeds 256, outputs that are not 16-byte aligned, more than 2^31 - 1 blocks. What the kernels of `generation` do
// not take is run by those of an earlier one.
Plan plan_attention_forward(const AttentionParams& params, const PlanOptions& options, void* workspace);
Plan plan_attention_backward(const AttentionBackwardParams& params, const PlanOptions& options, void* workspace);
// float32 is multiplied as 3 × tf32 whatever the options say. Where the value is not known, the forward comes first.
Plan plan_attention_jvp(const AttentionJvpParams& params, const PlanOptions& options, void* workspace);
Plan plan_attention_double_backward(const AttentionDoubleBackwardParams& params, void* workspace);

}  // namespace anchor_attention::cuda
