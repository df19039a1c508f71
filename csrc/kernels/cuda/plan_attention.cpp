#include "kernels/cuda/plan_attention.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "kernels/cuda/sm80/plan_sm80.h"
#include "kernels/cuda/sm90/plan_sm90.h"

namespace anchor_attention::cuda {

Plan plan_attention_forward(const AttentionParams& params, const PlanOptions& options, void* workspace) {
  if (options.generation == Generation::sm90 && sm90::takes_forward(params)) {
    return sm90::plan_attention_forward(params, options, workspace);
  }
  return sm80::plan_attention_forward(params, options, workspace);
}

Plan plan_attention_backward(const AttentionBackwardParams& params, const PlanOptions& options, void* workspace) {
  if (options.generation == Generation::sm90 && sm90::takes_backward(params)) {
    return sm90::plan_attention_backward(params, options, workspace);
  }
  return sm80::plan_attention_backward(params, options, workspace);
}

Plan plan_attention_jvp(const AttentionJvpParams& params, const PlanOptions& options, void* workspace) {
  if (params.knows_value) return sm80::plan_attention_jvp(params, options, workspace);
  PlanOptions exact = options;
  exact.allow_tf32 = false;
  Plan plan = plan_attention_forward(params.forward, exact, workspace);
  const uintptr_t rest = reinterpret_cast<uintptr_t>(workspace) + plan.workspace_bytes;
  Plan tangents = sm80::plan_attention_jvp(params, options, reinterpret_cast<void*>(rest));
  plan.workspace_bytes += tangents.workspace_bytes;
  std::ranges::move(tangents.launches, std::back_inserter(plan.launches));
  return plan;
}

Plan plan_attention_double_backward(const AttentionDoubleBackwardParams& params, void* workspace) {
  return sm80::plan_attention_double_backward(params, workspace);
}

}  // namespace anchor_attention::cuda
