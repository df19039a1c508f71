// Attention and rotary embedding on the CPU: work plan, buffers and threads around the steps of kernel_table.h.
#pragma once

#include <cstdint>
#include <functional>

#include "params.h"

namespace anchor_attention::cpu {

// Runs task(0) … task(n - 1), at most `threads` at once; returns when all are done.
struct Executor {
  int64_t threads;
  std::function<void(int64_t n, const std::function<void(int64_t)>& task)> run;
  // Asked from every thread before each piece of work, some milliseconds long at most in common shapes. Once it says
  // true it must keep saying so: the call returns early, and what it has written is to be thrown away. May be empty.
  std::function<bool()> cancelled = {};

  bool stops() const { return cancelled && cancelled(); }
};

// `allow_split_float32`: products of float32 may be formed from those of bfloat16 parts, where that is faster.
void attention(const AttentionParams& params, const Executor& executor, bool allow_split_float32);
void attention_backward(const AttentionBackwardParams& params, const Executor& executor, bool allow_split_float32);
// The tangents of out and lse; also out and lse, unless they are known.
void attention_jvp(const AttentionJvpParams& params, const Executor& executor);
void attention_double_backward(const AttentionDoubleBackwardParams& params, const Executor& executor);
void rope(const RopeParams& params, const Executor& executor);
void rope_backward(const RopeBackwardParams& params, const Executor& executor);

}  // namespace anchor_attention::cpu
