#include "kernels/cuda/common/plan_parts.h"

namespace anchor_attention::cuda {

// The memory-bound kernels do not multiply: both float32 precisions share one of them.
static Precision storage_precision(ScalarType dtype) { return precision_of(dtype, true); }

void add_rope(Plan& plan, const RopeTask& task, bool conjugate) {
  RopeKernelParams params{};
  params.x = task.x;
  params.freqs = static_cast<const float*>(task.freqs);
  params.out = task.out;
  params.freqs_strides = task.freqs_strides;
  params.n_rows = task.batch * task.tokens * task.heads;
  params.tokens = static_cast<int32_t>(task.tokens);
  params.heads = static_cast<int32_t>(task.heads);
  params.head_dim = static_cast<int32_t>(task.head_dim);
  params.imaginary_sign = conjugate ? -1.0f : 1.0f;
  const int64_t chunk = 16 / bytes_per_element(storage_precision(task.dtype));
  add_launch(plan, {KernelKind::rope, storage_precision(task.dtype), 0, {}},
             elementwise_blocks(params.n_rows * (task.head_dim / chunk)), kElementwiseThreads, 0, params);
}

void add_rope_freqs_gradient(Plan& plan, const RopeTask& task, const TensorView& grad_out, void* grad_freqs,
                             bool shared_by_batch) {
  RopeFreqsKernelParams params{};
  params.x = task.x;
  params.grad_out = grad_out;
  params.grad_freqs = static_cast<float*>(grad_freqs);
  params.n_pairs = (shared_by_batch ? 1 : task.batch) * task.tokens * (task.head_dim / 2);
  params.summed_batch = static_cast<int32_t>(shared_by_batch ? task.batch : 1);
  params.tokens = static_cast<int32_t>(task.tokens);
  params.heads = static_cast<int32_t>(task.heads);
  params.head_dim = static_cast<int32_t>(task.head_dim);
  add_launch(plan, {KernelKind::rope_freqs, storage_precision(task.dtype), 0, {}}, elementwise_blocks(params.n_pairs),
             kElementwiseThreads, 0, params);
}

Plan plan_rope(const RopeParams& params) {
  check_head_dim(params.head_dim);
  check_output(params.out, "out");
  Plan plan;
  add_rope(plan,
           {tensor_view(params.x, params.x_strides, params.dtype), params.freqs, params.out, params.freqs_strides,
            params.batch, params.tokens, params.heads, params.head_dim, params.dtype},
           false);
  return plan;
}

Plan plan_rope_backward(const RopeBackwardParams& params) {
  const RopeParams& forward = params.forward;
  check_head_dim(forward.head_dim);
  const TensorView grad_out = tensor_view(params.grad_out, params.grad_out_strides, forward.dtype);
  RopeTask task{tensor_view(forward.x, forward.x_strides, forward.dtype),
                forward.freqs,
                nullptr,
                forward.freqs_strides,
                forward.batch,
                forward.tokens,
                forward.heads,
                forward.head_dim,
                forward.dtype};
  Plan plan;
  if (params.grad_freqs != nullptr) {
    add_rope_freqs_gradient(plan, task, grad_out, params.grad_freqs, forward.freqs_strides.batch == 0);
  }
  if (params.grad_x != nullptr) {
    check_output(params.grad_x, "grad_x");
    task.x = grad_out;
    task.out = params.grad_x;
    add_rope(plan, task, true);
  }
  return plan;
}

}  // namespace anchor_attention::cuda
