#include <algorithm>
#include <cstddef>

#include "kernels/cuda/common/plan_parts.h"
#include "kernels/cuda/sm90/config.h"
#include "kernels/cuda/sm90/kernel_params.h"
#include "kernels/cuda/sm90/plan_sm90.h"
#include "kernels/cuda/sm90/token_tensor_map.h"

namespace anchor_attention::sm90 {
namespace {

TokenTensor keys(const AttentionParams& p) { return {p.k, p.k_strides, p.batch, p.n_keys, p.kv_heads, p.head_dim}; }

TokenTensor values(const AttentionParams& p) { return {p.v, p.v_strides, p.batch, p.n_keys, p.kv_heads, p.value_dim}; }

// Holds the channels of queries and of values.
ForwardTile tile_of(const AttentionParams& p, bool avoid_tile_of_48) {
  const int head_dim = native_head_dim(std::max(p.head_dim, p.value_dim));
  return forward_tile(avoid_tile_of_48 && head_dim == 48 ? 64 : head_dim);
}

TokenTensor output(const AttentionParams& p) {
  return {p.out, contiguous_strides(p.n_queries, p.heads, p.value_dim), p.batch, p.n_queries, p.heads, p.value_dim};
}

}  // namespace

bool takes_forward(const AttentionParams& params) {
  const bool narrow = params.dtype == ScalarType::bfloat16 || params.dtype == ScalarType::float16;
  return narrow && params.head_dim % 8 == 0 && params.value_dim % 8 == 0 && tile_of(params, false).head_dim != 0 &&
         fits_tensor_map(keys(params)) && fits_tensor_map(values(params)) && fits_tensor_map(output(params));
}

Plan plan_attention_forward(const AttentionParams& params, const PlanOptions& options, void* workspace_base) {
  check_sizes(params);
  check_output(params.out, "out");
  const ForwardTile tile = tile_of(params, options.avoid_tile_of_48);
  Plan plan;
  Workspace workspace(workspace_base);
  ForwardKernelParams kernel_params{};
  kernel_params.q = tensor_view(params.q, params.q_strides, params.dtype);
  kernel_params.q_freqs = static_cast<const float*>(params.q_freqs);
  kernel_params.key_mask = mask_bytes(params);
  kernel_params.out_data = params.out;
  kernel_params.lse = static_cast<float*>(params.lse);
  kernel_params.q_freqs_strides = params.q_freqs_strides;
  kernel_params.key_mask_batch_stride = params.key_mask_batch_stride;
  kernel_params.k_steps = {axis_step(params.k_strides.head), axis_step(params.k_strides.batch)};
  kernel_params.v_steps = {axis_step(params.v_strides.head), axis_step(params.v_strides.batch)};
  kernel_params.n_queries = static_cast<int32_t>(params.n_queries);
  kernel_params.heads = static_cast<int32_t>(params.heads);
  kernel_params.heads_per_kv_head = heads_per_kv_head(params);
  kernel_params.head_dim = static_cast<int32_t>(params.head_dim);
  kernel_params.value_dim = static_cast<int32_t>(params.value_dim);
  kernel_params.scale_log2 = scale_log2(params.scale);
  kernel_params.q_sign = params.scale < 0 ? -1.0f : 1.0f;
  const RangesView ranges = view_of(params.table);
  const Schedule schedule =
      make_schedule(ranges, params.n_queries, tile.queries(), tile.keys,
                    {.max_column_tiles = column_tiles_that_fill(ranges, tile.queries(), tile.keys,
                                                                params.batch * params.heads, options.multiprocessors),
                     .own_accumulators = true});
  place_schedule(kernel_params.schedule, schedule, plan, workspace);
  kernel_params.partial = take_partial_results(params, schedule, tile.queries(), workspace);
  kernel_params.n_work = checked_grid(schedule.n_items * params.batch * params.heads);
  const auto map = [&](const TokenTensor& tensor, int tokens, size_t offset) {
    return tensor_map(tensor, params.dtype, tile.slab_channels, tokens, static_cast<uint32_t>(offset));
  };
  add_launch(plan, {KernelKind::forward, precision_of(params.dtype, false), tile.head_dim, {}, Generation::sm90},
             std::min<int64_t>(kernel_params.n_work, options.multiprocessors), tile.threads(),
             forward_shared_bytes(tile.head_dim), kernel_params,
             {map(keys(params), tile.keys, offsetof(ForwardKernelParams, k)),
              map(values(params), tile.keys, offsetof(ForwardKernelParams, v)),
              map(output(params), kWarpgroupRows, offsetof(ForwardKernelParams, out))});
  add_merge(plan, params, kernel_params.schedule, kernel_params.partial, tile.queries());
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

}  // namespace anchor_attention::sm90
