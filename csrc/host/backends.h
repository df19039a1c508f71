// How each device runs checked params. `like` is a tensor on the device: temporary memory is allocated beside it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "params.h"

namespace anchor_attention {

using torch::stable::Tensor;

// The selected, the runnable and the compiled-in instruction sets of the CPU kernels, each comma-separated, best first.
std::tuple<std::string, std::string, std::string> cpu_instruction_sets();

struct Cpu {
  static void attention(const AttentionParams& params, const Tensor& like, bool allow_tf32);
  static void attention_backward(const AttentionBackwardParams& params, const Tensor& like, bool allow_tf32);
  static void attention_jvp(const AttentionJvpParams& params, const Tensor& like);
  static void attention_double_backward(const AttentionDoubleBackwardParams& params, const Tensor& like);
  static void rope(const RopeParams& params, const Tensor& like);
  static void rope_backward(const RopeBackwardParams& params, const Tensor& like);
};

// Defined only where the library is built with CUDA.
struct Cuda {
  static void attention(const AttentionParams& params, const Tensor& like, bool allow_tf32);
  static void attention_backward(const AttentionBackwardParams& params, const Tensor& like, bool allow_tf32);
  static void attention_jvp(const AttentionJvpParams& params, const Tensor& like);
  static void attention_double_backward(const AttentionDoubleBackwardParams& params, const Tensor& like);
  static void rope(const RopeParams& params, const Tensor& like);
  static void rope_backward(const RopeBackwardParams& params, const Tensor& like);
};

}  // namespace anchor_attention
