// attention and attention_backward: checked tensors → outputs → params → the kernels of a device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "host/checks.h"
#include "key_ranges.h"
#include "params.h"

namespace anchor_attention {

// The arguments of `attention`, checked. The params point into the tensors and into `table`.
struct CheckedAttention {
  KeyRangeTable table;
  AttentionParams params;  // out and lse are not set
};

CheckedAttention check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const std::vector<int64_t>& q_ranges, const std::vector<int64_t>& k_offsets,
                                 const std::vector<int64_t>& k_ranges, const std::optional<Tensor>& q_freqs,
                                 const std::optional<Tensor>& key_mask, std::optional<double> scale);

// Checks what the backward takes in addition. grad_out and grad_lse are readable()s; the gradients are not set.
AttentionBackwardParams check_attention_backward(const AttentionParams& forward, const Tensor& grad_out,
                                                 const std::optional<Tensor>& grad_lse, const Tensor& q,
                                                 const Tensor& out, const Tensor& lse);

// Uninitialised (out, lse), put into the params.
std::tuple<Tensor, Tensor> new_outputs(const Tensor& q, AttentionParams& params);

// Gradients, put into the params: uninitialised where there are queries to compute them from, else zeros. One that is
// not needed is an empty tensor, because the schema's returns are not optional.
std::tuple<Tensor, Tensor, Tensor, Tensor> new_gradients(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const std::optional<Tensor>& q_freqs, bool need_q, bool need_k,
                                                         bool need_v, bool need_q_freqs,
                                                         AttentionBackwardParams& params);

template <typename Device>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::vector<int64_t> q_ranges,
                                     std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges,
                                     std::optional<Tensor> q_freqs, std::optional<Tensor> key_mask,
                                     std::optional<double> scale, bool allow_tf32) {
  if (q_freqs) q_freqs = readable(*q_freqs);
  if (key_mask) key_mask = readable(*key_mask);
  CheckedAttention checked = check_attention(q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale);
  auto outputs = new_outputs(q, checked.params);
  if (q.numel() > 0) Device::attention(checked.params, q, allow_tf32);
  return outputs;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::vector<int64_t> q_ranges, std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges,
    std::optional<Tensor> q_freqs, std::optional<Tensor> key_mask, std::optional<double> scale, bool allow_tf32,
    bool need_q, bool need_k, bool need_v, bool need_q_freqs) {
  if (q_freqs) q_freqs = differentiable_freqs(readable(*q_freqs), need_q_freqs);
  if (key_mask) key_mask = readable(*key_mask);
  const CheckedAttention checked = check_attention(q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale);
  grad_out = readable(grad_out);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  AttentionBackwardParams params = check_attention_backward(checked.params, grad_out, grad_lse, q, out, lse);
  auto gradients = new_gradients(q, k, v, q_freqs, need_q, need_k, need_v, need_q_freqs, params);
  if (q.numel() > 0) Device::attention_backward(params, q, allow_tf32);
  return gradients;
}

}  // namespace anchor_attention
