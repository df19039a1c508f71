// Launches as data: what a pass of the operation starts, in order, and the device memory that it needs. Plain C++, pure
// functions: the CUDA launcher and the emulator execute the same plans.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/common/config.h"
#include "kernels/cuda/common/tensor_map.h"
#include "params.h"

namespace anchor_attention::cuda {

// The architecture that kernels are written for. The memory-bound ones of sm80 serve every architecture.
enum class Generation : int32_t { sm80, sm90 };

// The newest generation that a device of compute capability `major`.x runs. `pinned` is the value of the environment
// variable ANCHOR_ATTENTION_CUDA_KERNELS or null: "sm80" pins those kernels, "no48" changes nothing here. Throws
// std::invalid_argument for any other value.
Generation generation_of(int major, const char* pinned);

// Whether `pinned` is "no48": on Hopper, head sizes from 33 to 48 then run in the tile of 64.
bool avoids_tile_of_48(const char* pinned);

enum class KernelKind : int32_t {
  forward,
  merge,     // of the forward's partial results
  backward,  // of sm90: all gradients in one pass
  backward_query,
  backward_key,
  jvp,  // of sm80, as the next two
  double_backward_query,
  double_backward_key,
  row_statistics,
  query_gradient,  // of sm90: sums of it, rounded
  rope,
  rope_freqs,
  upload,
};

struct KernelId {
  KernelKind kind;
  Precision precision;
  int head_dim;            // native; 0 where the kernel takes every size
  KeyGradients gradients;  // of backward_key and double_backward_key
  Generation generation = Generation::sm80;

  // As in "forward_bfloat16_64" or "sm90_forward_bfloat16_64": the C++ function and its template arguments.
  std::string name() const;
};

struct LaunchPlan {
  KernelId kernel;
  uint32_t grid;
  uint32_t block;
  uint32_t shared_bytes;                   // dynamic
  std::vector<std::byte> params;           // the one argument, by value
  std::vector<TensorMapPlan> tensor_maps;  // to be encoded into `params`
};

struct Plan {
  std::vector<LaunchPlan> launches;
  int64_t workspace_bytes = 0;
};

struct PlanOptions {
  int multiprocessors = 1;                   // of the device that will run the plan
  bool allow_tf32 = false;                   // one tf32 product per float32 product instead of three
  Generation generation = Generation::sm80;  // the newest that the device runs and the caller allows
  bool avoid_tile_of_48 = false;             // of sm90: that of 64 takes its head sizes
};

// Stands for the workspace in a plan that is made before it is allocated. Nothing else that a plan holds begins with
// these 16 bits: they are no user-space address and no size, and read as a float they are a NaN that nothing computes.
inline void* const kNoWorkspaceYet = reinterpret_cast<void*>(uintptr_t{0xFFF5} << 48);

// Puts `workspace` in place of kNoWorkspaceYet, wherever the plan points into it.
void place_workspace(Plan& plan, void* workspace);

// Of every generation; arguments as in kernels/cuda/plan_attention.h.
Plan plan_rope(const RopeParams& params);
Plan plan_rope_backward(const RopeBackwardParams& params);

}  // namespace anchor_attention::cuda
