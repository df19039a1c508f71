// Entry points of the CUDA kernels: they take what params.h describes, with device pointers.
// Nothing here waits for the device or reads device memory; all of it can be captured in a graph.
#pragma once

#include <functional>

#include "kernels/cuda/common/launch_plan.h"
#include "kernels/cuda/device.h"
#include "params.h"

namespace anchor_attention::cuda {

// Where to run: a device and one of its streams.
struct Target {
  const Device& device;
  CUstream stream;
};

struct Options {
  bool allow_tf32 = false;
  const char* pinned_kernels = nullptr;  // as `pinned` of generation_of
};

// Allocates this many bytes on the device, 256-byte aligned, free for reuse once the stream has passed the call.
using Allocate = std::function<void*(int64_t bytes)>;

// Pointers belong to the target's device. All throw std::invalid_argument for what the kernels do not support, see
// common/launch_plan.h, and DriverError at the first launch that failed.
void attention_forward(const AttentionParams& params, const Options& options, const Target& target,
                       const Allocate& allocate);
void attention_backward(const AttentionBackwardParams& params, const Options& options, const Target& target,
                        const Allocate& allocate);
void attention_jvp(const AttentionJvpParams& params, const Options& options, const Target& target,
                   const Allocate& allocate);
void attention_double_backward(const AttentionDoubleBackwardParams& params, const Target& target,
                               const Allocate& allocate);
void rope(const RopeParams& params, const Target& target);
void rope_backward(const RopeBackwardParams& params, const Target& target);

}  // namespace anchor_attention::cuda
