#include "kernels/cuda/plan_attention.h"

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

}  // namespace anchor_attention::cuda
