// rope and rope_backward: checked tensors → outputs → params → the kernels of a device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "host/checks.h"
#include "params.h"

namespace anchor_attention {

RopeParams check_rope(const char* x_name, const Tensor& x, const Tensor& freqs);  // out is not set

// grad_out is a readable(); the gradients are not set.
RopeBackwardParams check_rope_backward(const Tensor& grad_out, const std::optional<Tensor>& x, const Tensor& freqs,
                                       bool need_freqs);

// Uninitialised, put into the params.
Tensor new_rotated(const Tensor& x, RopeParams& params);
std::tuple<Tensor, Tensor> new_rope_gradients(const Tensor& grad_out, const Tensor& freqs, bool need_x, bool need_freqs,
                                              RopeBackwardParams& params);

template <typename Device>
Tensor rope(Tensor x, Tensor freqs) {
  freqs = readable(freqs);
  RopeParams params = check_rope("x", x, freqs);
  Tensor rotated = new_rotated(x, params);
  if (rotated.numel() > 0) Device::rope(params, x);
  return rotated;
}

template <typename Device>
std::tuple<Tensor, Tensor> rope_backward(Tensor grad_out, std::optional<Tensor> x, Tensor freqs, bool need_x,
                                         bool need_freqs) {
  grad_out = readable(grad_out);
  freqs = differentiable_freqs(readable(freqs), need_freqs);
  RopeBackwardParams params = check_rope_backward(grad_out, x, freqs, need_freqs);
  auto gradients = new_rope_gradients(grad_out, freqs, need_x, need_freqs, params);
  if (grad_out.numel() > 0) Device::rope_backward(params, grad_out);
  return gradients;
}

}  // namespace anchor_attention
