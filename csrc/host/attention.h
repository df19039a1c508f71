// attention and attention_backward: checked tensors → params. The registered functions, one per device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../key_ranges.h"
#include "../params.h"

namespace anchor_attention {

using torch::stable::Tensor;

// Arguments of `attention`, checked. The params point into the tensors and into `table`.
struct CheckedAttention {
  KeyRangeTable table;
  AttentionParams params;  // out and lse are not set
};

CheckedAttention check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const std::vector<int64_t>& q_ranges, const std::vector<int64_t>& k_offsets,
                                 const std::vector<int64_t>& k_ranges, const std::optional<Tensor>& q_freqs,
                                 const std::optional<Tensor>& key_mask, std::optional<double> scale);

// Checks what the backward takes besides the arguments of the forward. grad_out has a contiguous last axis and grad_lse
// is contiguous. Gradients are not set.
AttentionBackwardParams check_attention_backward(const AttentionParams& forward, const Tensor& grad_out,
                                                 const std::optional<Tensor>& grad_lse, const Tensor& q,
                                                 const Tensor& out, const Tensor& lse);

std::tuple<Tensor, Tensor> attention_cpu(Tensor q, Tensor k, Tensor v, std::vector<int64_t> q_ranges,
                                         std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges,
                                         std::optional<Tensor> q_freqs, std::optional<Tensor> key_mask,
                                         std::optional<double> scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::vector<int64_t> q_ranges, std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges,
    std::optional<Tensor> q_freqs, std::optional<Tensor> key_mask, std::optional<double> scale, bool need_q,
    bool need_k, bool need_v, bool need_q_freqs);

}  // namespace anchor_attention
