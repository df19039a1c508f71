// rope and rope_backward: checked tensors → params. The registered functions, one per device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../params.h"

namespace anchor_attention {

using torch::stable::Tensor;

RopeParams check_rope(const Tensor& x, const char* x_name, const Tensor& freqs);  // out is not set

Tensor rope_cpu(Tensor x, Tensor freqs);

std::tuple<Tensor, Tensor> rope_backward_cpu(Tensor grad_out, std::optional<Tensor> x, Tensor freqs, bool need_x,
                                             bool need_freqs);

}  // namespace anchor_attention
