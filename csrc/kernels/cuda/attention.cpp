#include "kernels/cuda/attention.h"

#include "kernels/cuda/launch.h"
#include "kernels/cuda/plan.h"

namespace anchor_attention::cuda {

int64_t attention_forward_workspace_bytes(const AttentionParams& params, const Options& options) {
  return plan_attention_forward(params, options, nullptr).workspace_bytes;
}

int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params, const Options& options) {
  return plan_attention_backward(params, options, nullptr).workspace_bytes;
}

cudaError_t attention_forward(const AttentionParams& params, const Options& options, void* workspace,
                              cudaStream_t stream) {
  return launch(plan_attention_forward(params, options, workspace), stream);
}

cudaError_t attention_backward(const AttentionBackwardParams& params, const Options& options, void* workspace,
                               cudaStream_t stream) {
  return launch(plan_attention_backward(params, options, workspace), stream);
}

cudaError_t rope(const RopeParams& params, cudaStream_t stream) { return launch(plan_rope(params), stream); }

cudaError_t rope_backward(const RopeBackwardParams& params, cudaStream_t stream) {
  return launch(plan_rope_backward(params), stream);
}

}  // namespace anchor_attention::cuda
