#include <algorithm>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <utility>

#include "kernels/cuda/common/plan_parts.h"
#include "kernels/cuda/common/recent_schedules.h"
#include "kernels/cuda/sm90/backward_config.h"
#include "kernels/cuda/sm90/backward_params.h"
#include "kernels/cuda/sm90/backward_schedule.h"
#include "kernels/cuda/sm90/plan_sm90.h"
#include "kernels/cuda/sm90/token_tensor_map.h"

namespace anchor_attention::sm90 {
namespace {

// Items per multiprocessor that a split over queries aims at: enough for an even end.
constexpr int64_t kItemsPerMultiprocessor = 4;

TokenTensor query_tensor(const AttentionParams& forward, const void* data, const Strides& strides) {
  return {data, strides, forward.batch, forward.n_queries, forward.heads, forward.head_dim};
}

TokenTensor grad_out_tensor(const AttentionBackwardParams& p) {
  const AttentionParams& forward = p.forward;
  return {p.grad_out, p.grad_out_strides, forward.batch, forward.n_queries, forward.heads, forward.value_dim};
}

TokenTensor keys(const AttentionParams& forward) {
  return {forward.k, forward.k_strides, forward.batch, forward.n_keys, forward.kv_heads, forward.head_dim};
}

TokenTensor values(const AttentionParams& forward) {
  return {forward.v, forward.v_strides, forward.batch, forward.n_keys, forward.kv_heads, forward.value_dim};
}

// Holds the channels of queries and of values.
int native_head_dim(const AttentionParams& forward, bool avoid_tile_of_48) {
  const int head_dim = backward_native_head_dim(std::max(forward.head_dim, forward.value_dim));
  return avoid_tile_of_48 && head_dim == 48 ? 64 : head_dim;
}

AxisSteps axis_steps(const TokenTensor& tensor) {
  return {axis_step(tensor.strides.head), axis_step(tensor.strides.batch)};
}

// Tiles of queries end where groups end. Where groups are shorter than half a tile on average, the sm_80 kernels, whose
// tiles may span groups, have less to do.
bool groups_fill_tiles(const KeyRangeTableView& table, int queries_per_tile) {
  int64_t queries = 0;
  for (int32_t g = 0; g < table.n_groups; ++g) queries += table.q_ranges[2 * g + 1] - table.q_ranges[2 * g];
  return table.n_groups > 0 && queries / table.n_groups >= queries_per_tile / 2;
}

std::shared_ptr<const BackwardSchedule> schedule_of(const AttentionParams& p, int head_dim, int64_t multiprocessors) {
  static thread_local RecentSchedules<BackwardSchedule, 7> recent;
  const BackwardTile tile = backward_tile(head_dim);
  const int64_t items = kItemsPerMultiprocessor * multiprocessors / (p.batch * p.kv_heads);
  const SumSizes sums{p.batch * p.heads * tile.query_gradient_bytes(), multiprocessors / (p.batch * p.kv_heads)};
  return recent.find_or_make(
      p.table, {p.n_queries, p.n_keys, tile.queries, items, p.heads_per_kv_head(), sums.bytes, sums.concurrent_tiles},
      [&] {
        return make_backward_schedule(p.table, p.n_queries, p.n_keys, tile.queries, items, p.heads_per_kv_head(), sums);
      });
}

// Lays out one pass over the keys and what surrounds it.
class BackwardPlanner {
 public:
  BackwardPlanner(const AttentionBackwardParams& params, const PlanOptions& options, void* workspace)
      : params_(params),
        forward_(params.forward),
        options_(options),
        workspace_(workspace),
        precision_(precision_of(forward_.dtype, false)),
        head_dim_(native_head_dim(forward_, options.avoid_tile_of_48)),
        batch_heads_(forward_.batch * forward_.heads),
        batch_kv_heads_(forward_.batch * forward_.kv_heads),
        n_rows_(batch_heads_ * forward_.n_queries),
        contiguous_(contiguous_strides(forward_.n_queries, forward_.heads, forward_.head_dim)),
        wants_queries_(params.grad_q != nullptr || params.grad_q_freqs != nullptr),
        held_schedule_(schedule_of(forward_, head_dim_, options.multiprocessors)),
        schedule_(*held_schedule_) {}

  Plan plan() {
    // As in the plan for sm_80, the gradient of q takes the place of the rotated queries: they are overwritten after
    // the pass that reads them.
    rotated_q_ = params_.grad_q;
    if (rotated_q_ == nullptr && is_rotated()) rotated_q_ = workspace_.take<std::byte>(n_rows_ * forward_.head_dim * 2);
    if (is_rotated()) add_rope(plan_, rotation(), false);
    if (wants_queries_) {
      query_gradients_ =
          workspace_.take<float>(batch_heads_ * schedule_.n_sums * backward_tile(head_dim_).query_gradient_bytes() / 4);
    }
    row_statistics_ = workspace_.take<float>(2 * n_rows_);
    Plan passes;  // launched after what prepares them
    add_pass_over_keys(passes);
    if (wants_queries_) add_query_gradient(passes);
    add_row_statistics();
    plan_.launches.insert(plan_.launches.end(), passes.launches.begin(), passes.launches.end());
    plan_.workspace_bytes = workspace_.bytes();
    return std::move(plan_);
  }

 private:
  bool is_rotated() const { return forward_.q_freqs != nullptr; }

  RopeTask rotation() const {
    return {tensor_view(forward_.q, forward_.q_strides, forward_.dtype),
            forward_.q_freqs,
            rotated_q_,
            forward_.q_freqs_strides,
            forward_.batch,
            forward_.n_queries,
            forward_.heads,
            forward_.head_dim,
            forward_.dtype};
  }

  void add_pass_over_keys(Plan& passes) {
    const BackwardTile tile = backward_tile(head_dim_);
    const int64_t n_accumulators = batch_kv_heads_ * schedule_.keys.n_accumulators;
    const int64_t n_sums = wants_queries_ ? batch_heads_ * schedule_.n_sums : 0;
    BackwardKernelParams p{};
    p.row_statistics = row_statistics_;
    p.key_mask = reinterpret_cast<const uint8_t*>(forward_.key_mask);
    p.grad_k = params_.grad_k;
    p.grad_v = params_.grad_v;
    p.query_gradients = query_gradients_;
    p.key_gradients = workspace_.take<float>(n_accumulators * 2 * kBackwardKeys * head_dim_);
    n_counters_ = 1 + n_sums + n_accumulators;
    counters_ = workspace_.take<int32_t>(n_counters_);
    p.ticket = counters_;
    p.query_turns = counters_ + 1;
    p.key_turns = p.query_turns + n_sums;
    p.key_mask_batch_stride = forward_.key_mask_batch_stride;
    p.n_queries = static_cast<int32_t>(forward_.n_queries);
    p.n_keys = static_cast<int32_t>(forward_.n_keys);
    p.batch_kv_heads = static_cast<int32_t>(batch_kv_heads_);
    p.kv_heads = static_cast<int32_t>(forward_.kv_heads);
    p.heads_per_kv_head = heads_per_kv_head(forward_);
    p.head_dim = static_cast<int32_t>(forward_.head_dim);
    p.value_dim = static_cast<int32_t>(forward_.value_dim);
    p.n_sums = schedule_.n_sums;
    p.turns_per_sum = schedule_.turns_per_sum;
    p.n_ranges = schedule_.n_ranges;
    p.scale = static_cast<float>(forward_.scale);
    p.scale_log2 = static_cast<float>(forward_.scale * kLog2E);
    place_schedule(p.schedule, schedule_.keys, plan_, workspace_);
    const TokenTensor q = is_rotated() ? query_tensor(forward_, rotated_q_, contiguous_)
                                       : query_tensor(forward_, forward_.q, forward_.q_strides);
    const TokenTensor k = keys(forward_);
    const TokenTensor v = values(forward_);
    const TokenTensor grad_out = grad_out_tensor(params_);
    p.q_steps = axis_steps(q);
    p.k_steps = axis_steps(k);
    p.v_steps = axis_steps(v);
    p.grad_out_steps = axis_steps(grad_out);
    const KernelKind kind = wants_queries_ ? KernelKind::backward : KernelKind::backward_key;
    add_launch(passes, {kind, precision_, head_dim_, {}, Generation::sm90}, batch_kv_heads_ * schedule_.keys.n_items,
               kBackwardThreads, backward_shared_bytes(head_dim_), p);
    const auto map = [&](const TokenTensor& tensor, int tokens, size_t offset) {
      return tensor_map(tensor, forward_.dtype, tile.channels, tokens, static_cast<uint32_t>(offset));
    };
    passes.launches.back().tensor_maps = {map(q, tile.queries, offsetof(BackwardKernelParams, q)),
                                          map(k, kBackwardKeys, offsetof(BackwardKernelParams, k)),
                                          map(v, kBackwardKeys, offsetof(BackwardKernelParams, v)),
                                          map(grad_out, tile.queries, offsetof(BackwardKernelParams, grad_out))};
  }

  void add_query_gradient(Plan& passes) {
    // The gradient of the factors is a sum over the rotated gradient, which is then rotated back in place.
    const bool rotate_back_later = params_.grad_q_freqs != nullptr;
    QueryGradientKernelParams p{};
    p.query_gradients = query_gradients_;
    p.q_freqs = rotate_back_later ? nullptr : static_cast<const float*>(forward_.q_freqs);
    p.grad_q = rotated_q_;
    p.q_freqs_strides = forward_.q_freqs_strides;
    p.n_queries = static_cast<int32_t>(forward_.n_queries);
    p.heads = static_cast<int32_t>(forward_.heads);
    p.head_dim = static_cast<int32_t>(forward_.head_dim);
    p.n_sums = schedule_.n_sums;
    p.scale = static_cast<float>(forward_.scale);
    place_schedule(p.schedule, schedule_.queries, plan_, workspace_);
    add_launch(passes, {KernelKind::query_gradient, precision_, head_dim_, {}, Generation::sm90},
               batch_heads_ * schedule_.queries.n_items * backward_tile(head_dim_).query_gradient_blocks(),
               kQueryGradientThreads, 0, p);
    if (!rotate_back_later) return;
    const TensorView rotated = tensor_view(rotated_q_, contiguous_, forward_.dtype);
    RopeTask task = rotation();
    add_rope_freqs_gradient(passes, task, rotated, params_.grad_q_freqs, forward_.q_freqs_strides.batch == 0);
    if (params_.grad_q != nullptr) {
      task.x = rotated;
      add_rope(passes, task, true);
    }
  }

  void add_row_statistics() {
    StatisticsKernelParams p{};
    p.out = tensor_view(forward_.out, contiguous_strides(forward_.n_queries, forward_.heads, forward_.value_dim),
                        forward_.dtype);
    p.grad_out = tensor_view(params_.grad_out, params_.grad_out_strides, forward_.dtype);
    p.lse = static_cast<const float*>(forward_.lse);
    p.grad_lse = static_cast<const float*>(params_.grad_lse);
    p.row_statistics = row_statistics_;
    p.counters = counters_;
    p.n_counters = n_counters_;
    p.n_rows = n_rows_;
    p.n_queries = static_cast<int32_t>(forward_.n_queries);
    p.heads = static_cast<int32_t>(forward_.heads);
    p.value_dim = static_cast<int32_t>(forward_.value_dim);
    add_launch(plan_, {KernelKind::row_statistics, precision_, 0, {}}, elementwise_blocks(n_rows_ * kThreadsPerRow),
               kElementwiseThreads, 0, p);
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& forward_;
  const PlanOptions& options_;
  Plan plan_;
  Workspace workspace_;
  Precision precision_;
  int head_dim_;
  int64_t batch_heads_;
  int64_t batch_kv_heads_;
  int64_t n_rows_;
  Strides contiguous_;
  bool wants_queries_;
  std::shared_ptr<const BackwardSchedule> held_schedule_;
  const BackwardSchedule& schedule_;
  void* rotated_q_ = nullptr;
  float* query_gradients_ = nullptr;
  float* row_statistics_ = nullptr;
  int32_t* counters_ = nullptr;
  int64_t n_counters_ = 0;
};

}  // namespace

// Without gradients of keys and values, the query pass of sm_80 has three products to do instead of five.
bool takes_backward(const AttentionBackwardParams& params) {
  const AttentionParams& forward = params.forward;
  const int head_dim = native_head_dim(forward, false);
  if (forward.dtype != ScalarType::bfloat16 && forward.dtype != ScalarType::float16) return false;
  if (head_dim == 0 || forward.head_dim % 8 != 0 || forward.value_dim % 8 != 0) return false;
  if (params.grad_k == nullptr && params.grad_v == nullptr) return false;
  const bool rotated = forward.q_freqs != nullptr;
  return (rotated || fits_tensor_map(query_tensor(forward, forward.q, forward.q_strides))) &&
         fits_tensor_map(keys(forward)) && fits_tensor_map(values(forward)) &&
         fits_tensor_map(grad_out_tensor(params)) && groups_fill_tiles(forward.table, backward_tile(head_dim).queries);
}

Plan plan_attention_backward(const AttentionBackwardParams& params, const PlanOptions& options, void* workspace) {
  check_sizes(params.forward);
  check_output(params.grad_q, "grad_q");
  check_output(params.grad_k, "grad_k");
  check_output(params.grad_v, "grad_v");
  if (params.grad_q_freqs != nullptr && params.forward.q_freqs == nullptr) {
    throw std::invalid_argument("grad_q_freqs is asked for without q_freqs");
  }
  return BackwardPlanner(params, options, workspace).plan();
}

}  // namespace anchor_attention::sm90
