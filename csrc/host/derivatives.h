// attention_jvp and attention_double_backward: checked tensors → outputs → params → the kernels of a device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "host/attention_op.h"
#include "host/checks.h"
#include "params.h"

namespace anchor_attention {

// The tangents of q, k and v, made readable()s, and what the checks found.
struct CheckedTangents {
  std::optional<Tensor> q;
  std::optional<Tensor> k;
  std::optional<Tensor> v;
  int64_t n;
};

// `stacked`: the tangents have an axis of n before those of their tensors. Throws where there is none.
CheckedTangents check_tangents(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> q_tangent,
                               std::optional<Tensor> k_tangent, std::optional<Tensor> v_tangent, bool stacked);

// `forward` as check_attention returns it. The outputs are not set.
AttentionJvpParams jvp_params(const AttentionParams& forward, const CheckedTangents& tangents);

// out and lse of the forward, which are known.
void check_known_value(const AttentionParams& forward, const Tensor& q, const Tensor& out, const Tensor& lse);

// Uninitialised (out_tangents, lse_tangents), put into the params.
std::tuple<Tensor, Tensor> new_tangents(const Tensor& q, AttentionJvpParams& params, bool stacked);

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_jvp(Tensor q, Tensor k, Tensor v, std::optional<Tensor> out,
                                                         std::optional<Tensor> lse, std::optional<Tensor> q_tangents,
                                                         std::optional<Tensor> k_tangents,
                                                         std::optional<Tensor> v_tangents,
                                                         std::vector<int64_t> q_ranges, std::vector<int64_t> k_offsets,
                                                         std::vector<int64_t> k_ranges, std::optional<Tensor> key_mask,
                                                         std::optional<double> scale) {
  if (key_mask) key_mask = readable(*key_mask);
  const CheckedAttention checked =
      check_attention(q, k, v, q_ranges, k_offsets, k_ranges, std::nullopt, key_mask, scale);
  const CheckedTangents tangents = check_tangents(q, k, v, q_tangents, k_tangents, v_tangents, /*stacked=*/true);
  AttentionJvpParams params = jvp_params(checked.params, tangents);
  check(out.has_value() == lse.has_value(), "out and lse must be given together");
  Tensor new_out = new_empty("out", q, {0}, q.scalar_type());
  Tensor new_lse = new_out;
  if (out) {
    check_known_value(params.forward, q, *out, *lse);
    params.knows_value = true;
    params.forward.out = out->data_ptr();
    params.forward.lse = lse->data_ptr();
    new_lse = new_empty("lse", q, {0}, lse->scalar_type());
  } else {
    std::tie(new_out, new_lse) = new_outputs(q, params.forward);
  }
  auto [out_tangents, lse_tangents] = new_tangents(q, params, /*stacked=*/true);
  if (q.numel() > 0 && tangents.n > 0) {
    Device::attention_jvp(params, q);
  } else if (q.numel() > 0 && !params.knows_value) {
    Device::attention(params.forward, q, /*allow_tf32=*/false);
  }
  return {new_out, new_lse, out_tangents, lse_tangents};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_double_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::optional<Tensor> q_tangent, std::optional<Tensor> k_tangent, std::optional<Tensor> v_tangent,
    std::vector<int64_t> q_ranges, std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges,
    std::optional<Tensor> key_mask, std::optional<double> scale, bool need_q, bool need_k, bool need_v) {
  if (key_mask) key_mask = readable(*key_mask);
  const CheckedAttention checked =
      check_attention(q, k, v, q_ranges, k_offsets, k_ranges, std::nullopt, key_mask, scale);
  const CheckedTangents tangents = check_tangents(q, k, v, q_tangent, k_tangent, v_tangent, /*stacked=*/false);
  grad_out = readable(grad_out);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  AttentionDoubleBackwardParams params{};
  params.backward = check_attention_backward(checked.params, grad_out, grad_lse, q, out, lse);
  AttentionJvpParams jvp = jvp_params(params.backward.forward, tangents);
  jvp.knows_value = true;
  auto [out_tangent, lse_tangent] = new_tangents(q, jvp, /*stacked=*/false);
  auto [grad_q, grad_k, grad_v, no_grad_q_freqs] =
      new_gradients(q, k, v, std::nullopt, need_q, need_k, need_v, /*need_q_freqs=*/false, params.backward);
  if (q.numel() > 0) {
    Device::attention_jvp(jvp, q);
    params.q_tangent = jvp.q_tangents;
    params.k_tangent = jvp.k_tangents;
    params.v_tangent = jvp.v_tangents;
    params.out_tangent = jvp.out_tangents;
    params.lse_tangent = jvp.lse_tangents;
    if (need_q || need_k || need_v) Device::attention_double_backward(params, q);
  }
  return {out_tangent, lse_tangent, grad_q, grad_k, grad_v};
}

}  // namespace anchor_attention
