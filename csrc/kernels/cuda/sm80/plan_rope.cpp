#include <limits>
#include <stdexcept>

#include "kernels/cuda/sm80/plan_detail.h"

namespace anchor_attention::sm80 {

std::string KernelId::name() const {
  static constexpr const char* kKinds[] = {"forward", "backward_query", "backward_key", "row_statistics",
                                           "rope",    "rope_freqs",     "upload"};
  static constexpr const char* kPrecisions[] = {"bfloat16", "float16", "tf32", "tf32x3"};
  static constexpr const char* kGradients[] = {"", "_key", "_value"};
  std::string text = kKinds[static_cast<int>(kind)];
  if (kind == KernelKind::upload) return text;
  text += std::string("_") + kPrecisions[static_cast<int>(precision)];
  if (head_dim != 0) text += "_" + std::to_string(head_dim);
  if (kind == KernelKind::backward_key) text += kGradients[static_cast<int>(gradients)];
  return text;
}

Precision precision_of(ScalarType dtype, bool allow_tf32) {
  switch (dtype) {
    case ScalarType::bfloat16:
      return Precision::bfloat16;
    case ScalarType::float16:
      return Precision::float16;
    case ScalarType::float32:
      return allow_tf32 ? Precision::tf32 : Precision::tf32x3;
    default:
      throw std::invalid_argument("dtype float64 is not supported on CUDA");
  }
}

void check_head_dim(int64_t head_dim) {
  if (head_dim % 8 != 0 || native_head_dim(head_dim) == 0) {
    throw std::invalid_argument("head_dim must be a multiple of 8 between 8 and 256 on CUDA, got " +
                                std::to_string(head_dim));
  }
}

void check_output(const void* output, const char* name) {
  if (reinterpret_cast<uintptr_t>(output) % 16 != 0) {
    throw std::invalid_argument(std::string(name) + " must be 16-byte aligned");
  }
}

InputTensor input_tensor(const void* data, const Strides& strides, ScalarType dtype) {
  const int64_t bytes = dtype == ScalarType::float32 ? 4 : 2;
  const bool vectorised = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch * bytes % 16 == 0 &&
                          strides.token * bytes % 16 == 0 && strides.head * bytes % 16 == 0;
  return {data, strides, vectorised};
}

Strides contiguous_strides(int64_t tokens, int64_t heads, int64_t head_dim) {
  return {tokens * heads * head_dim, heads * head_dim, head_dim};
}

uint32_t checked_grid(int64_t n_blocks) {
  if (n_blocks > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("the launch needs " + std::to_string(n_blocks) + " blocks, more than 2^31 - 1");
  }
  return static_cast<uint32_t>(n_blocks);
}

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

void add_rope_freqs_gradient(Plan& plan, const RopeTask& task, const InputTensor& grad_out, void* grad_freqs,
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
           {input_tensor(params.x, params.x_strides, params.dtype), params.freqs, params.out, params.freqs_strides,
            params.batch, params.tokens, params.heads, params.head_dim, params.dtype},
           false);
  return plan;
}

Plan plan_rope_backward(const RopeBackwardParams& params) {
  const RopeParams& forward = params.forward;
  check_head_dim(forward.head_dim);
  const InputTensor grad_out = input_tensor(params.grad_out, params.grad_out_strides, forward.dtype);
  RopeTask task{input_tensor(forward.x, forward.x_strides, forward.dtype),
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

}  // namespace anchor_attention::sm80
