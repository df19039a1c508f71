#include <algorithm>

#include "kernels/cuda/common/plan_parts.h"
#include "kernels/cuda/sm80/backward_plan.h"
#include "kernels/cuda/sm80/double_backward_config.h"
#include "kernels/cuda/sm80/plan_sm80.h"
#include "key_ranges.h"

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

Plan plan_attention_double_backward(const AttentionDoubleBackwardParams& params, void* workspace_base) {
  const AttentionBackwardParams& backward = params.backward;
  const AttentionParams& forward = backward.forward;
  check_sizes(forward);
  check_output(backward.grad_q, "grad_q");
  check_output(backward.grad_k, "grad_k");
  check_output(backward.grad_v, "grad_v");
  const Precision precision = precision_of(forward.dtype, /*allow_tf32=*/false);
  const int head_dim = native_head_dim(std::max(forward.head_dim, forward.value_dim));
  const bool keys_move = params.k_tangent.data != nullptr || params.v_tangent.data != nullptr;
  Plan plan;
  Workspace workspace(workspace_base);
  DoubleBackwardKernelParams common{};
  common.q_tangent = tensor_view(params.q_tangent.data, params.q_tangent.strides, forward.dtype);
  common.k_tangent = tensor_view(params.k_tangent.data, params.k_tangent.strides, forward.dtype);
  common.v_tangent = tensor_view(params.v_tangent.data, params.v_tangent.strides, forward.dtype);
  common.backward = backward_kernel_params(backward);
  float* row_statistics = workspace.take<float>(4 * forward.batch * forward.heads * forward.n_queries);
  common.backward.row_statistics = row_statistics;
  StatisticsKernelParams statistics = statistics_kernel_params(backward, row_statistics);
  statistics.out_tangent = statistics.out;
  statistics.out_tangent.data = params.out_tangent;
  statistics.out_tangent.vectorised = reinterpret_cast<uintptr_t>(params.out_tangent) % 16 == 0;
  statistics.lse_tangent = static_cast<const float*>(params.lse_tangent);
  add_launch(plan, {KernelKind::row_statistics, precision_of(forward.dtype, true), 0, {}},
             elementwise_blocks(statistics.n_rows * kThreadsPerRow), kElementwiseThreads, 0, statistics);

  const auto add_pass = [&](SecondPass pass, KernelKind kind, KeyGradients gradients, int64_t heads,
                            const Schedule& schedule, const DoubleBackwardKernelParams& kernel_params) {
    const TileShape shape = second_tile_shape(pass, precision, head_dim);
    add_launch(plan, {kind, precision, head_dim, gradients}, forward.batch * heads * schedule.n_items, shape.threads(),
               second_shared_bytes(pass, precision, head_dim, keys_move), kernel_params);
  };
  if (backward.grad_k != nullptr || backward.grad_v != nullptr) {
    const TransposedKeyRangeTable table = transpose(forward.table);
    const TileShape shape = second_tile_shape(SecondPass::key, precision, head_dim);
    const Schedule schedule = make_schedule({table.k_ranges, table.q_offsets, table.q_ranges}, forward.n_keys,
                                            shape.rows, shape.columns, {.walks = common.backward.heads_per_kv_head});
    DoubleBackwardKernelParams key_params = common;
    place_schedule(key_params.backward.schedule, schedule, plan, workspace);
    const auto add = [&](KeyGradients gradients) {
      add_pass(SecondPass::key, KernelKind::double_backward_key, gradients, forward.kv_heads, schedule, key_params);
    };
    if (head_dim <= widest_head_of_both_second_gradients(precision)) {
      add(KeyGradients::both);
    } else {
      if (backward.grad_k != nullptr) add(KeyGradients::key);
      if (backward.grad_v != nullptr) add(KeyGradients::value);
    }
  }
  if (backward.grad_q != nullptr) {
    const TileShape shape = second_tile_shape(SecondPass::query, precision, head_dim);
    const Schedule schedule = make_schedule(view_of(forward.table), forward.n_queries, shape.rows, shape.columns);
    DoubleBackwardKernelParams query_params = common;
    place_schedule(query_params.backward.schedule, schedule, plan, workspace);
    add_pass(SecondPass::query, KernelKind::double_backward_query, {}, forward.heads, schedule, query_params);
  }
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

}  // namespace anchor_attention::sm80
