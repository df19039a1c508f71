// Building blocks that the plans of the attention passes and of the rotations share.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cuda/common/kernel_params.h"
#include "kernels/cuda/common/launch_plan.h"
#include "kernels/cuda/common/schedule.h"

namespace anchor_attention::cuda {

constexpr double kLog2E = 1.4426950408889634;

// Lays out device memory from a base that may be null while only the size is wanted.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const uintptr_t address = base_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(address);
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

Precision precision_of(ScalarType dtype, bool allow_tf32);

// Throws unless the kernels take this head_dim, which the message calls `name`.
void check_head_dim(int64_t head_dim, const char* name = "head_dim");

// Throws unless `output` allows 16-byte stores.
void check_output(const void* output, const char* name);

TensorView tensor_view(const void* data, const Strides& strides, ScalarType dtype);

Strides contiguous_strides(int64_t tokens, int64_t heads, int64_t head_dim);

uint32_t checked_grid(int64_t n_blocks);

// Appends a launch of `n_blocks` unless there is nothing to do.
template <class Params>
void add_launch(Plan& plan, const KernelId& kernel, int64_t n_blocks, int threads, int shared_bytes,
                const Params& params, std::vector<TensorMapPlan> tensor_maps = {}) {
  if (n_blocks == 0) return;
  LaunchPlan launch{kernel,
                    checked_grid(n_blocks),
                    static_cast<uint32_t>(threads),
                    static_cast<uint32_t>(shared_bytes),
                    std::vector<std::byte>(sizeof(Params)),
                    std::move(tensor_maps)};
  Params own = params;
#if __has_builtin(__builtin_clear_padding)
  // Stale bytes in the padding must not look like kNoWorkspaceYet.
  __builtin_clear_padding(&own);
#endif
  std::memcpy(launch.params.data(), &own, sizeof(Params));
  plan.launches.push_back(std::move(launch));
}

inline int64_t elementwise_blocks(int64_t n_threads) {
  return (n_threads + kElementwiseThreads - 1) / kElementwiseThreads;
}

struct RopeTask {
  TensorView x;
  const void* freqs;
  void* out;
  FreqsStrides freqs_strides;
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  ScalarType dtype;
};

void add_rope(Plan& plan, const RopeTask& task, bool conjugate);
// `shared_by_batch` sums the gradient over the batch. `task.out` is not used.
void add_rope_freqs_gradient(Plan& plan, const RopeTask& task, const TensorView& grad_out, void* grad_freqs,
                             bool shared_by_batch);

// A forward table in the form that schedules are made from: queries are the stationary axis.
RangesView view_of(const KeyRangeTableView& table);

// Fills a kernel's view of a schedule. One too large for the kernel's parameters is uploaded by launches of its own.
void place_schedule(ScheduleView& view, const Schedule& schedule, Plan& plan, Workspace& workspace);

// Reserves memory for the partial results of split tiles; null where no tile is split.
PartialResults take_partial_results(const AttentionParams& params, const Schedule& schedule, int rows,
                                    Workspace& workspace);

// Appends the launch that merges partial results, if there are any. `rows`: those of a tile of the schedule.
void add_merge(Plan& plan, const AttentionParams& params, const ScheduleView& schedule, const PartialResults& partial,
               int rows);

void check_sizes(const AttentionParams& params);

// Zero would turn −inf scores into NaN; below this factor every score is effectively zero.
float scale_log2(double scale);

// As kernels receive it; unused where tensors have no heads.
inline int32_t heads_per_kv_head(const AttentionParams& params) {
  return params.kv_heads == 0 ? 1 : static_cast<int32_t>(params.heads_per_kv_head());
}

inline const uint8_t* mask_bytes(const AttentionParams& params) {
  return reinterpret_cast<const uint8_t*>(params.key_mask);
}

}  // namespace anchor_attention::cuda
