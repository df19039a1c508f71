#include <algorithm>

#include "kernels/cuda/common/plan_parts.h"
#include "kernels/cuda/sm80/kernel_params.h"
#include "kernels/cuda/sm80/plan_sm80.h"

namespace anchor_attention::sm80 {
namespace {

TangentView tangent_view(const Tangents& tangents, ScalarType dtype) {
  TangentView view{tensor_view(tangents.data, tangents.strides, dtype), tangents.stride};
  if (tangents.stride * bytes_per_element(precision_of(dtype, true)) % 16 != 0) view.first.vectorised = 0;
  return view;
}

}  // namespace

Plan plan_attention_jvp(const AttentionJvpParams& params, const PlanOptions&, void* workspace_base) {
  const AttentionParams& forward = params.forward;
  check_sizes(forward);
  check_output(forward.out, "out");
  check_output(params.out_tangents, "out_tangents");
  const Precision precision = precision_of(forward.dtype, /*allow_tf32=*/false);
  const int head_dim = native_head_dim(std::max(forward.head_dim, forward.value_dim));
  const TileShape shape = tile_shape(Pass::jvp, precision, head_dim);
  Plan plan;
  Workspace workspace(workspace_base);
  JvpKernelParams kernel_params{};
  kernel_params.q = tensor_view(forward.q, forward.q_strides, forward.dtype);
  kernel_params.k = tensor_view(forward.k, forward.k_strides, forward.dtype);
  kernel_params.v = tensor_view(forward.v, forward.v_strides, forward.dtype);
  kernel_params.q_tangents = tangent_view(params.q_tangents, forward.dtype);
  kernel_params.k_tangents = tangent_view(params.k_tangents, forward.dtype);
  kernel_params.v_tangents = tangent_view(params.v_tangents, forward.dtype);
  kernel_params.key_mask = mask_bytes(forward);
  kernel_params.out = forward.out;
  kernel_params.lse = static_cast<const float*>(forward.lse);
  kernel_params.out_tangents = params.out_tangents;
  kernel_params.lse_tangents = static_cast<float*>(params.lse_tangents);
  kernel_params.key_mask_batch_stride = forward.key_mask_batch_stride;
  kernel_params.n_tangents = static_cast<int32_t>(params.n_tangents);
  kernel_params.batch = static_cast<int32_t>(forward.batch);
  kernel_params.n_queries = static_cast<int32_t>(forward.n_queries);
  kernel_params.heads = static_cast<int32_t>(forward.heads);
  kernel_params.heads_per_kv_head = heads_per_kv_head(forward);
  kernel_params.head_dim = static_cast<int32_t>(forward.head_dim);
  kernel_params.value_dim = static_cast<int32_t>(forward.value_dim);
  kernel_params.scale = static_cast<float>(forward.scale);
  kernel_params.scale_log2 = static_cast<float>(forward.scale * kLog2E);
  const Schedule schedule = make_schedule(view_of(forward.table), forward.n_queries, shape.rows, shape.columns);
  place_schedule(kernel_params.schedule, schedule, plan, workspace);
  add_launch(plan, {KernelKind::jvp, precision, head_dim, {}},
             forward.batch * forward.heads * params.n_tangents * schedule.n_items, shape.threads(),
             shared_bytes(Pass::jvp, precision, head_dim), kernel_params);
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

}  // namespace anchor_attention::sm80
