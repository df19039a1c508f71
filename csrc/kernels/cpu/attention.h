// Attention and rotary embedding on the CPU: schedule, buffers and threads around the steps of kernels.h.
#pragma once

#include <cstdint>
#include <functional>

#include "params.h"

namespace anchor_attention::cpu {

// Runs task(0) … task(n - 1), at most `threads` at once; returns when all are done.
struct Executor {
  int64_t threads;
  std::function<void(int64_t n, const std::function<void(int64_t)>& task)> run;
};

void attention(const AttentionParams& params, const Executor& executor);
void attention_backward(const AttentionBackwardParams& params, const Executor& executor);
void rope(const RopeParams& params, const Executor& executor);
void rope_backward(const RopeBackwardParams& params, const Executor& executor);

}  // namespace anchor_attention::cpu
