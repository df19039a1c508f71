// Launches as data: what a pass of the operation starts, in order, and the device memory that it needs. Plain C++, pure
// functions: the CUDA launcher and the emulator execute the same plans.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/sm80/config.h"
#include "params.h"

namespace anchor_attention::sm80 {

enum class KernelKind : int32_t { forward, backward_query, backward_key, row_statistics, rope, rope_freqs, upload };

struct KernelId {
  KernelKind kind;
  Precision precision;
  int head_dim;            // native; 0 where the kernel takes every size
  KeyGradients gradients;  // of backward_key

  // As in "forward_bfloat16_64": the C++ function and its template arguments.
  std::string name() const;
};

struct LaunchPlan {
  KernelId kernel;
  uint32_t grid;
  uint32_t block;
  uint32_t shared_bytes;          // dynamic
  std::vector<std::byte> params;  // the one argument, by value
};

struct Plan {
  std::vector<LaunchPlan> launches;
  int64_t workspace_bytes = 0;
};

struct PlanOptions {
  int multiprocessors = 1;  // of the device that will run the plan
  bool allow_tf32 = false;  // one tf32 product per float32 product instead of three
};

// Pointers of `params` are device pointers, its table is in host memory and read here only. `workspace` is device
// memory, 256-byte aligned, of the plan's `workspace_bytes`, which do not depend on it: plan with null to learn them.
// Throws std::invalid_argument for what the kernels do not support: float64, a head_dim that is not a multiple of 8 or
// exceeds 256, outputs that are not 16-byte aligned, more than 2^31 - 1 blocks.
Plan plan_attention_forward(const AttentionParams& params, const PlanOptions& options, void* workspace);
Plan plan_attention_backward(const AttentionBackwardParams& params, const PlanOptions& options, void* workspace);
Plan plan_rope(const RopeParams& params);
Plan plan_rope_backward(const RopeBackwardParams& params);

}  // namespace anchor_attention::sm80
