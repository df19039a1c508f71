// The way into the CUDA kernels: what params.h describes goes in, with device pointers, and a cudaError_t comes out.
// Nothing here allocates, waits for the device or reads device memory; all of it can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/common/plan.h"
#include "params.h"

namespace anchor_attention::cuda {

using Options = PlanOptions;

// Device memory that a call needs beside its outputs, 256-byte aligned, free for reuse once the stream has passed it.
int64_t attention_forward_workspace_bytes(const AttentionParams& params, const Options& options);
int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params, const Options& options);

// The current device must be the one that owns the pointers and the stream. All throw std::invalid_argument for what
// the kernels do not support, see common/plan.h; the error is that of the first launch that failed.
cudaError_t attention_forward(const AttentionParams& params, const Options& options, void* workspace,
                              cudaStream_t stream);
cudaError_t attention_backward(const AttentionBackwardParams& params, const Options& options, void* workspace,
                               cudaStream_t stream);
cudaError_t rope(const RopeParams& params, cudaStream_t stream);
cudaError_t rope_backward(const RopeBackwardParams& params, cudaStream_t stream);

}  // namespace anchor_attention::cuda
