// Building blocks that the plans of the attention passes and of the rotations share.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/sm80/kernel_params.h"
#include "kernels/cuda/sm80/plan.h"

namespace anchor_attention::sm80 {

Precision precision_of(ScalarType dtype, bool allow_tf32);

// Throws unless the kernels take this head_dim.
void check_head_dim(int64_t head_dim);

// Throws unless `output` allows 16-byte stores.
void check_output(const void* output, const char* name);

InputTensor input_tensor(const void* data, const Strides& strides, ScalarType dtype);

Strides contiguous_strides(int64_t tokens, int64_t heads, int64_t head_dim);

// Appends a launch of `n_blocks` unless there is nothing to do.
template <class Params>
void add_launch(Plan& plan, const KernelId& kernel, int64_t n_blocks, int threads, int shared_bytes,
                const Params& params);

uint32_t checked_grid(int64_t n_blocks);

template <class Params>
void add_launch(Plan& plan, const KernelId& kernel, int64_t n_blocks, int threads, int shared_bytes,
                const Params& params) {
  if (n_blocks == 0) return;
  LaunchPlan launch{kernel, checked_grid(n_blocks), static_cast<uint32_t>(threads), static_cast<uint32_t>(shared_bytes),
                    std::vector<std::byte>(sizeof(Params))};
  std::memcpy(launch.params.data(), &params, sizeof(Params));
  plan.launches.push_back(std::move(launch));
}

inline int64_t elementwise_blocks(int64_t n_threads) {
  return (n_threads + kElementwiseThreads - 1) / kElementwiseThreads;
}

struct RopeTask {
  InputTensor x;
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
void add_rope_freqs_gradient(Plan& plan, const RopeTask& task, const InputTensor& grad_out, void* grad_freqs,
                             bool shared_by_batch);

}  // namespace anchor_attention::sm80
