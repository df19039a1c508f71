#include "kernels/cuda/sm80/plan_sm80.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "kernels/cuda/common/plan_parts.h"
#include "kernels/cuda/common/recent_schedules.h"
#include "kernels/cuda/sm80/backward_plan.h"
#include "key_ranges.h"

namespace anchor_attention::sm80 {
namespace {

// A shorter item costs more for its turn at the accumulators than it saves.
constexpr int64_t kMinColumnTilesPerItem = 8;
// Items per multiprocessor that a split aims at: enough for two resident blocks and an even end.
constexpr int64_t kItemsPerMultiprocessor = 4;
// Of the forward, as its registers allow. Where shared memory holds only one block, the two run one after the other.
constexpr int64_t kBlocksPerMultiprocessor = 2;

void add_attention_launch(Plan& plan, Pass pass, const KernelId& kernel, int64_t n_blocks, const auto& kernel_params) {
  const TileShape shape = tile_shape(pass, kernel.precision, kernel.head_dim);
  add_launch(plan, kernel, n_blocks, shape.threads(), shared_bytes(pass, kernel.precision, kernel.head_dim),
             kernel_params);
}

int64_t column_tiles_per_item(const AttentionParams& params, const PlanOptions& options, const RangesView& ranges,
                              const TileShape& shape) {
  const int64_t total = count_tile_pairs(ranges, shape.rows, shape.columns) * params.batch * params.heads;
  return std::max(kMinColumnTilesPerItem, total / (kItemsPerMultiprocessor * options.multiprocessors));
}

std::shared_ptr<const Schedule> key_schedule(const AttentionParams& p, const PlanOptions& options,
                                             const TileShape& shape) {
  static thread_local RecentSchedules<Schedule, 7> recent;
  const int64_t walks = heads_per_kv_head(p);
  const auto make = [&] {
    const TransposedKeyRangeTable table = transpose(p.table);
    const RangesView ranges{table.k_ranges, table.q_offsets, table.q_ranges};
    return make_schedule(ranges, p.n_keys, shape.rows, shape.columns,
                         {.max_column_tiles = column_tiles_per_item(p, options, ranges, shape), .walks = walks});
  };
  return recent.find_or_make(
      p.table, {p.n_keys, shape.rows, shape.columns, p.batch, p.heads, walks, options.multiprocessors}, make);
}

// One launch of the key pass with its own counters and accumulators.
void add_key_pass(Plan& plan, const AttentionParams& forward, const KernelId& kernel, BackwardKernelParams params,
                  const Schedule& schedule, Workspace& workspace, StatisticsKernelParams& statistics) {
  if (schedule.n_accumulators > 0) {
    const TileShape shape = tile_shape(Pass::backward_key, kernel.precision, kernel.head_dim);
    const int64_t n_tiles = forward.batch * forward.kv_heads * schedule.n_accumulators;
    const int gradients = kernel.gradients == KeyGradients::both ? 2 : 1;
    params.accumulators = workspace.take<float>(n_tiles * gradients * shape.rows * kernel.head_dim);
    params.counters = statistics.counters + statistics.n_counters;
    statistics.n_counters += 1 + n_tiles;
  }
  add_attention_launch(plan, Pass::backward_key, kernel, forward.batch * forward.kv_heads * schedule.n_items, params);
}

}  // namespace

BackwardKernelParams backward_kernel_params(const AttentionBackwardParams& params) {
  const AttentionParams& forward = params.forward;
  BackwardKernelParams p{};
  p.q = tensor_view(forward.q, forward.q_strides, forward.dtype);
  p.k = tensor_view(forward.k, forward.k_strides, forward.dtype);
  p.v = tensor_view(forward.v, forward.v_strides, forward.dtype);
  p.grad_out = tensor_view(params.grad_out, params.grad_out_strides, forward.dtype);
  p.key_mask = mask_bytes(forward);
  p.grad_q = params.grad_q;
  p.grad_k = params.grad_k;
  p.grad_v = params.grad_v;
  p.q_freqs_strides = forward.q_freqs_strides;
  p.key_mask_batch_stride = forward.key_mask_batch_stride;
  p.n_queries = static_cast<int32_t>(forward.n_queries);
  p.n_keys = static_cast<int32_t>(forward.n_keys);
  p.heads = static_cast<int32_t>(forward.heads);
  p.kv_heads = static_cast<int32_t>(forward.kv_heads);
  p.heads_per_kv_head = heads_per_kv_head(forward);
  p.head_dim = static_cast<int32_t>(forward.head_dim);
  p.value_dim = static_cast<int32_t>(forward.value_dim);
  p.scale = static_cast<float>(forward.scale);
  p.scale_log2 = static_cast<float>(forward.scale * kLog2E);
  return p;
}

StatisticsKernelParams statistics_kernel_params(const AttentionBackwardParams& params, float* row_statistics) {
  const AttentionParams& forward = params.forward;
  StatisticsKernelParams p{};
  p.out =
      tensor_view(forward.out, contiguous_strides(forward.n_queries, forward.heads, forward.value_dim), forward.dtype);
  p.grad_out = tensor_view(params.grad_out, params.grad_out_strides, forward.dtype);
  p.lse = static_cast<const float*>(forward.lse);
  p.grad_lse = static_cast<const float*>(params.grad_lse);
  p.row_statistics = row_statistics;
  p.n_rows = forward.batch * forward.heads * forward.n_queries;
  p.n_queries = static_cast<int32_t>(forward.n_queries);
  p.heads = static_cast<int32_t>(forward.heads);
  p.value_dim = static_cast<int32_t>(forward.value_dim);
  return p;
}

Plan plan_attention_forward(const AttentionParams& params, const PlanOptions& options, void* workspace_base) {
  check_sizes(params);
  check_output(params.out, "out");
  const Precision precision = precision_of(params.dtype, options.allow_tf32);
  const int head_dim = native_head_dim(std::max(params.head_dim, params.value_dim));
  const TileShape shape = tile_shape(Pass::forward, precision, head_dim);
  Plan plan;
  Workspace workspace(workspace_base);
  ForwardKernelParams kernel_params{};
  kernel_params.q = tensor_view(params.q, params.q_strides, params.dtype);
  kernel_params.k = tensor_view(params.k, params.k_strides, params.dtype);
  kernel_params.v = tensor_view(params.v, params.v_strides, params.dtype);
  kernel_params.q_freqs = static_cast<const float*>(params.q_freqs);
  kernel_params.key_mask = mask_bytes(params);
  kernel_params.out = params.out;
  kernel_params.lse = static_cast<float*>(params.lse);
  kernel_params.q_freqs_strides = params.q_freqs_strides;
  kernel_params.key_mask_batch_stride = params.key_mask_batch_stride;
  kernel_params.n_queries = static_cast<int32_t>(params.n_queries);
  kernel_params.heads = static_cast<int32_t>(params.heads);
  kernel_params.heads_per_kv_head = heads_per_kv_head(params);
  kernel_params.head_dim = static_cast<int32_t>(params.head_dim);
  kernel_params.value_dim = static_cast<int32_t>(params.value_dim);
  kernel_params.scale_log2 = scale_log2(params.scale);
  kernel_params.q_sign = params.scale < 0 ? -1.0f : 1.0f;
  const RangesView ranges = view_of(params.table);
  const int64_t slots = kBlocksPerMultiprocessor * options.multiprocessors;
  const Schedule schedule = make_schedule(ranges, params.n_queries, shape.rows, shape.columns,
                                          {.max_column_tiles = column_tiles_that_fill(
                                               ranges, shape.rows, shape.columns, params.batch * params.heads, slots),
                                           .own_accumulators = true});
  place_schedule(kernel_params.schedule, schedule, plan, workspace);
  kernel_params.partial = take_partial_results(params, schedule, shape.rows, workspace);
  add_attention_launch(plan, Pass::forward, {KernelKind::forward, precision, head_dim, {}},
                       params.batch * params.heads * schedule.n_items, kernel_params);
  add_merge(plan, params, kernel_params.schedule, kernel_params.partial, shape.rows);
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

Plan plan_attention_backward(const AttentionBackwardParams& params, const PlanOptions& options, void* workspace_base) {
  const AttentionParams& forward = params.forward;
  check_sizes(forward);
  check_output(params.grad_q, "grad_q");
  check_output(params.grad_k, "grad_k");
  check_output(params.grad_v, "grad_v");
  const bool rotated = forward.q_freqs != nullptr;
  if (params.grad_q_freqs != nullptr && !rotated)
    throw std::invalid_argument("grad_q_freqs is asked for without q_freqs");
  const bool wants_query_pass = params.grad_q != nullptr || params.grad_q_freqs != nullptr;
  const bool wants_key_pass = params.grad_k != nullptr || params.grad_v != nullptr;
  const Precision precision = precision_of(forward.dtype, options.allow_tf32);
  const Precision storage = precision_of(forward.dtype, true);
  const int head_dim = native_head_dim(std::max(forward.head_dim, forward.value_dim));
  const int64_t n_rows = forward.batch * forward.heads * forward.n_queries;
  const TensorView q = tensor_view(forward.q, forward.q_strides, forward.dtype);
  const Strides contiguous = contiguous_strides(forward.n_queries, forward.heads, forward.head_dim);

  Plan plan;
  Plan passes;  // launched after what prepares them
  Workspace workspace(workspace_base);

  // The gradient of q takes the place of the rotated queries: no copy of q besides the outputs, and the block that
  // overwrites queries is the only one of its pass that reads them.
  void* grad_q = params.grad_q;
  if (grad_q == nullptr && rotated)
    grad_q = workspace.take<std::byte>(n_rows * forward.head_dim * bytes_per_element(storage));
  const RopeTask rotation{q,
                          forward.q_freqs,
                          grad_q,
                          forward.q_freqs_strides,
                          forward.batch,
                          forward.n_queries,
                          forward.heads,
                          forward.head_dim,
                          forward.dtype};
  if (rotated && (wants_query_pass || wants_key_pass)) add_rope(plan, rotation, false);

  BackwardKernelParams common = backward_kernel_params(params);
  if (rotated) common.q = tensor_view(grad_q, contiguous, forward.dtype);
  common.grad_q = grad_q;
  float* row_statistics = workspace.take<float>(2 * n_rows);
  common.row_statistics = row_statistics;
  StatisticsKernelParams statistics = statistics_kernel_params(params, row_statistics);

  if (wants_key_pass) {
    const TileShape shape = tile_shape(Pass::backward_key, precision, head_dim);
    const auto held_schedule = key_schedule(forward, options, shape);
    const Schedule& schedule = *held_schedule;
    // Room for the counters of both launches that the widest heads take.
    statistics.counters = workspace.take<int32_t>(2 * (1 + forward.batch * forward.kv_heads * schedule.n_accumulators));
    BackwardKernelParams key_params = common;
    place_schedule(key_params.schedule, schedule, plan, workspace);
    const auto add = [&](KeyGradients gradients) {
      add_key_pass(passes, forward, {KernelKind::backward_key, precision, head_dim, gradients}, key_params, schedule,
                   workspace, statistics);
    };
    if (head_dim <= kWidestHeadOfBothGradients) {
      add(KeyGradients::both);
    } else {
      if (params.grad_k != nullptr) add(KeyGradients::key);
      if (params.grad_v != nullptr) add(KeyGradients::value);
    }
  }

  if (wants_query_pass) {
    const TileShape shape = tile_shape(Pass::backward_query, precision, head_dim);
    BackwardKernelParams query_params = common;
    // The gradient of the factors is a sum over the rotated gradient, which is then rotated back in place.
    const bool rotate_back_later = params.grad_q_freqs != nullptr;
    query_params.q_freqs = rotate_back_later ? nullptr : static_cast<const float*>(forward.q_freqs);
    const Schedule schedule = make_schedule(view_of(forward.table), forward.n_queries, shape.rows, shape.columns);
    place_schedule(query_params.schedule, schedule, plan, workspace);
    add_attention_launch(passes, Pass::backward_query, {KernelKind::backward_query, precision, head_dim, {}},
                         forward.batch * forward.heads * schedule.n_items, query_params);
    if (rotate_back_later) {
      add_rope_freqs_gradient(passes, rotation, common.q, params.grad_q_freqs, forward.q_freqs_strides.batch == 0);
      if (params.grad_q != nullptr) {
        RopeTask back = rotation;
        back.x = common.q;
        add_rope(passes, back, true);
      }
    }
  }
  add_launch(plan, {KernelKind::row_statistics, storage, 0, {}}, elementwise_blocks(n_rows * kThreadsPerRow),
             kElementwiseThreads, 0, statistics);
  plan.launches.insert(plan.launches.end(), passes.launches.begin(), passes.launches.end());
  plan.workspace_bytes = workspace.bytes();
  return plan;
}

}  // namespace anchor_attention::sm80
