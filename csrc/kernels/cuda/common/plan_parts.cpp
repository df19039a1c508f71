#include "kernels/cuda/common/plan_parts.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace anchor_attention::cuda {

std::string KernelId::name() const {
  static constexpr const char* kKinds[] = {"forward",
                                           "merge",
                                           "backward",
                                           "backward_query",
                                           "backward_key",
                                           "jvp",
                                           "double_backward_query",
                                           "double_backward_key",
                                           "row_statistics",
                                           "query_gradient",
                                           "rope",
                                           "rope_freqs",
                                           "upload"};
  // A kind without a name would launch the kernel of another one.
  static_assert(std::size(kKinds) == static_cast<size_t>(KernelKind::upload) + 1);
  static constexpr const char* kPrecisions[] = {"bfloat16", "float16", "tf32", "tf32x3"};
  static constexpr const char* kGradients[] = {"", "_key", "_value"};
  std::string text = generation == Generation::sm90 ? "sm90_" : "";
  text += kKinds[static_cast<int>(kind)];
  if (kind == KernelKind::upload) return text;
  text += std::string("_") + kPrecisions[static_cast<int>(precision)];
  if (head_dim != 0) text += "_" + std::to_string(head_dim);
  if (kind == KernelKind::backward_key || kind == KernelKind::double_backward_key)
    text += kGradients[static_cast<int>(gradients)];
  return text;
}

Generation generation_of(int major, const char* pinned) {
  const std::string kernels = pinned == nullptr ? "" : pinned;
  if (kernels != "" && kernels != "sm80" && kernels != "no48") {
    throw std::invalid_argument("ANCHOR_ATTENTION_CUDA_KERNELS must be \"sm80\", \"no48\" or not set, got \"" +
                                kernels + "\"");
  }
  return major == 9 && kernels != "sm80" ? Generation::sm90 : Generation::sm80;
}

bool avoids_tile_of_48(const char* pinned) { return pinned != nullptr && std::string_view(pinned) == "no48"; }

void place_workspace(Plan& plan, void* workspace) {
  const auto unplaced = reinterpret_cast<uintptr_t>(kNoWorkspaceYet);
  const uintptr_t moved = reinterpret_cast<uintptr_t>(workspace) - unplaced;
  const auto is_unplaced = [&](uintptr_t word) { return word >> 48 == unplaced >> 48; };
  for (LaunchPlan& launch : plan.launches) {
    const bool uploads = launch.kernel.kind == KernelKind::upload;
    const size_t end = uploads ? offsetof(UploadKernelParams, words) : launch.params.size();
    // Pointers lie at multiples of their size.
    for (size_t i = 0; i + sizeof(uintptr_t) <= end; i += sizeof(uintptr_t)) {
      uintptr_t word;
      std::memcpy(&word, &launch.params[i], sizeof(word));
      if (!is_unplaced(word)) continue;
      word += moved;
      std::memcpy(&launch.params[i], &word, sizeof(word));
    }
    for (TensorMapPlan& map : launch.tensor_maps) {
      const auto address = reinterpret_cast<uintptr_t>(map.address);
      if (is_unplaced(address)) map.address = reinterpret_cast<const void*>(address + moved);
    }
  }
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

void check_head_dim(int64_t head_dim, const char* name) {
  if (head_dim % 8 != 0 || native_head_dim(head_dim) == 0) {
    throw std::invalid_argument(std::string(name) + " must be a multiple of 8 between 8 and 256 on CUDA, got " +
                                std::to_string(head_dim));
  }
}

void check_output(const void* output, const char* name) {
  if (reinterpret_cast<uintptr_t>(output) % 16 != 0) {
    throw std::invalid_argument(std::string(name) + " must be 16-byte aligned");
  }
}

TensorView tensor_view(const void* data, const Strides& strides, ScalarType dtype) {
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

RangesView view_of(const KeyRangeTableView& table) {
  const auto n_groups = static_cast<size_t>(table.n_groups);
  if (n_groups == 0) return {};
  return {{table.q_ranges, 2 * n_groups},
          {table.k_offsets, n_groups + 1},
          {table.k_ranges, 2 * static_cast<size_t>(table.n_ranges)}};
}

void place_schedule(ScheduleView& view, const Schedule& schedule, Plan& plan, Workspace& workspace) {
  view.n_groups = schedule.n_groups;
  view.n_items = schedule.n_items;
  view.n_accumulators = schedule.n_accumulators;
  const auto n_words = static_cast<int64_t>(schedule.words.size());
  if (n_words <= kInlineWords) {
    std::copy(schedule.words.begin(), schedule.words.end(), view.inline_words);
    return;
  }
  auto* destination = workspace.take<int32_t>(n_words);
  view.device_words = destination;
  for (int64_t first = 0; first < n_words; first += kUploadWords) {
    const auto count = static_cast<int32_t>(std::min<int64_t>(kUploadWords, n_words - first));
    // Written in place: add_launch would copy the 32 kB three times.
    plan.launches.push_back({{KernelKind::upload, {}, 0, {}},
                             checked_grid(elementwise_blocks(count)),
                             kElementwiseThreads,
                             0,
                             std::vector<std::byte>(sizeof(UploadKernelParams)),
                             {}});
    std::vector<std::byte>& params = plan.launches.back().params;
    const auto put = [&](size_t offset, const void* data, size_t bytes) {
      std::memcpy(params.data() + offset, data, bytes);
    };
    int32_t* const target = destination + first;
    put(offsetof(UploadKernelParams, destination), &target, sizeof(target));
    put(offsetof(UploadKernelParams, n_words), &count, sizeof(count));
    put(offsetof(UploadKernelParams, words), schedule.words.data() + first, count * sizeof(int32_t));
  }
}

void check_sizes(const AttentionParams& params) {
  check_head_dim(params.head_dim);
  check_head_dim(params.value_dim, "the head_dim of v");
  for (const int64_t size : {params.batch, params.n_queries, params.n_keys, params.heads}) {
    if (size > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("sizes must be below 2^31, got " + std::to_string(size));
    }
  }
}

PartialResults take_partial_results(const AttentionParams& params, const Schedule& schedule, int rows,
                                    Workspace& workspace) {
  const int64_t n_rows = params.batch * params.heads * schedule.n_accumulators * rows;
  if (n_rows == 0) return {};
  return {workspace.take<float>(n_rows * params.value_dim), workspace.take<float>(2 * n_rows)};
}

void add_merge(Plan& plan, const AttentionParams& params, const ScheduleView& schedule, const PartialResults& partial,
               int rows) {
  if (schedule.n_accumulators == 0) return;
  MergeKernelParams merge{};
  merge.partial = partial;
  merge.out = params.out;
  merge.lse = static_cast<float*>(params.lse);
  merge.n_queries = static_cast<int32_t>(params.n_queries);
  merge.heads = static_cast<int32_t>(params.heads);
  merge.value_dim = static_cast<int32_t>(params.value_dim);
  merge.rows = rows;
  merge.schedule = schedule;
  add_launch(plan, {KernelKind::merge, precision_of(params.dtype, true), 0, {}},
             params.batch * params.heads * schedule.n_items, kMergeThreads, 0, merge);
}

float scale_log2(double scale) { return static_cast<float>(std::max(std::abs(scale) * kLog2E, 1e-30)); }

}  // namespace anchor_attention::cuda
