#include "host/attention_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "host/checks.h"

namespace anchor_attention {
namespace {

using Dtype = torch::headeronly::ScalarType;

Dtype lse_dtype(ScalarType dtype) { return dtype == ScalarType::float64 ? Dtype::Double : Dtype::Float; }

// Whether ranges reach beyond the tokens, but would not if tokens and heads changed places.
bool fit_heads_first(const std::vector<int64_t>& ranges, const Tensor& tensor) {
  const int64_t end = ranges.empty() ? 0 : *std::max_element(ranges.begin(), ranges.end());
  return tensor.size(1) < end && end <= tensor.size(2);
}

KeyRangeTable checked_table(const std::vector<int64_t>& q_ranges, const std::vector<int64_t>& k_offsets,
                            const std::vector<int64_t>& k_ranges, const Tensor& q, const Tensor& k) {
  try {
    return make_key_range_table(q_ranges, k_offsets, k_ranges, q.size(1), k.size(1));
  } catch (const std::invalid_argument& error) {
    const bool heads_first = fit_heads_first(q_ranges, q) || fit_heads_first(k_ranges, k);
    throw std::runtime_error(std::string("anchor_attention: ") + error.what() + (heads_first ? kHeadsFirst : ""));
  }
}

Tensor new_gradient(const char* name, const Tensor& tensor, bool needed, void*& data) {
  Tensor grad = new_empty(name, tensor, needed ? shape_of(tensor) : std::vector<int64_t>{0}, tensor.scalar_type());
  data = needed ? grad.mutable_data_ptr() : nullptr;
  return grad;
}

}  // namespace

CheckedAttention check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const std::vector<int64_t>& q_ranges, const std::vector<int64_t>& k_offsets,
                                 const std::vector<int64_t>& k_ranges, const std::optional<Tensor>& q_freqs,
                                 const std::optional<Tensor>& key_mask, std::optional<double> scale) {
  check_rank("q", q, 4, "(batch, queries, heads, head_dim)");
  check_rank("k", k, 4, "(batch, keys, heads, head_dim)");
  check_rank("v", v, 4, "(batch, keys, heads, head_dim)");
  const int64_t batch = q.size(0);
  const int64_t n_queries = q.size(1);
  const int64_t heads = q.size(2);
  const int64_t head_dim = q.size(3);
  const int64_t n_keys = k.size(1);
  check(head_dim >= 1, "q must have a head_dim of at least 1, got shape ", shape_text(q));
  // Keys and values may have fewer heads than queries, if their number divides that of the queries.
  const int64_t kv_heads = k.size(2) > 0 && heads % k.size(2) == 0 ? k.size(2) : heads;
  const int64_t value_dim = v.size(3);
  const bool heads_first = k.size(0) == batch && k.size(1) == n_queries && k.size(3) == head_dim;
  check_shape("k", k, {batch, n_keys, kv_heads, head_dim}, heads_first);
  check_shape("v", v, {batch, n_keys, kv_heads, value_dim});
  check(value_dim >= 1, "v must have a head_dim of at least 1, got shape ", shape_text(v));
  check_same_device("k", k, "q", q);
  check_same_device("v", v, "q", q);
  const ScalarType dtype = scalar_type("q", q);
  check_same_dtype("k", k, "q", q);
  check_same_dtype("v", v, "q", q);
  check_last_axis_contiguous("q", q);
  check_last_axis_contiguous("k", k);
  check_last_axis_contiguous("v", v);
  if (q_freqs) check_freqs("q_freqs", *q_freqs, "q", q, dtype, batch, n_queries, head_dim);
  if (key_mask) {
    check_shape("key_mask", *key_mask, {batch, n_keys},
                key_mask->dim() == 2 && key_mask->size(0) == batch && key_mask->size(1) == k.size(2));
    check_same_device("key_mask", *key_mask, "q", q);
    check(key_mask->scalar_type() == Dtype::Bool, "key_mask must be Bool, got ",
          torch::headeronly::toString(key_mask->scalar_type()));
  }
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  check(std::isfinite(factor), "scale must be finite, got ", factor);

  CheckedAttention checked{checked_table(q_ranges, k_offsets, k_ranges, q, k), {}};
  AttentionParams& p = checked.params;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_freqs = q_freqs ? q_freqs->const_data_ptr() : nullptr;
  p.key_mask = key_mask ? static_cast<const bool*>(key_mask->const_data_ptr()) : nullptr;
  p.q_strides = strides_of(q);
  p.k_strides = strides_of(k);
  p.v_strides = strides_of(v);
  p.q_freqs_strides = q_freqs ? freqs_strides_of(*q_freqs) : FreqsStrides{0, 0};
  p.key_mask_batch_stride = key_mask ? key_mask->stride(0) : 0;
  p.batch = batch;
  p.n_queries = n_queries;
  p.n_keys = n_keys;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.scale = factor;
  p.dtype = dtype;
  p.table = checked.table.view();
  return checked;
}

AttentionBackwardParams check_attention_backward(const AttentionParams& forward, const Tensor& grad_out,
                                                 const std::optional<Tensor>& grad_lse, const Tensor& q,
                                                 const Tensor& out, const Tensor& lse) {
  const std::vector<int64_t> out_shape{forward.batch, forward.n_queries, forward.heads, forward.value_dim};
  const std::vector<int64_t> lse_shape{forward.batch, forward.heads, forward.n_queries};
  check_shape("grad_out", grad_out, out_shape);
  check_shape("out", out, out_shape);
  check_shape("lse", lse, lse_shape);
  check_same_device("grad_out", grad_out, "q", q);
  check_same_device("out", out, "q", q);
  check_same_device("lse", lse, "q", q);
  check_same_dtype("grad_out", grad_out, "q", q);
  check_same_dtype("out", out, "q", q);
  check(lse.scalar_type() == lse_dtype(forward.dtype), "lse must be ",
        torch::headeronly::toString(lse_dtype(forward.dtype)), ", got ",
        torch::headeronly::toString(lse.scalar_type()));
  check(out.is_contiguous(), "out must be contiguous, as the forward returned it");
  check(lse.is_contiguous(), "lse must be contiguous, as the forward returned it");
  if (grad_lse) {
    check_shape("grad_lse", *grad_lse, lse_shape);
    check_same_device("grad_lse", *grad_lse, "q", q);
    check_same_dtype("grad_lse", *grad_lse, "lse", lse);
  }
  AttentionBackwardParams p{};
  p.forward = forward;
  p.forward.out = out.data_ptr();
  p.forward.lse = lse.data_ptr();
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  p.grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr;
  return p;
}

std::tuple<Tensor, Tensor> new_outputs(const Tensor& q, AttentionParams& p) {
  Tensor out = new_empty("out", q, {p.batch, p.n_queries, p.heads, p.value_dim}, q.scalar_type());
  Tensor lse = new_empty("lse", q, {p.batch, p.heads, p.n_queries}, lse_dtype(p.dtype));
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> new_gradients(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const std::optional<Tensor>& q_freqs, bool need_q, bool need_k,
                                                         bool need_v, bool need_q_freqs, AttentionBackwardParams& p) {
  check(q_freqs.has_value() || !need_q_freqs, "need_q_freqs is true, but there are no q_freqs");
  Tensor grad_q = new_gradient("grad_q", q, need_q, p.grad_q);
  Tensor grad_k = new_gradient("grad_k", k, need_k, p.grad_k);
  Tensor grad_v = new_gradient("grad_v", v, need_v, p.grad_v);
  Tensor grad_q_freqs = new_gradient("grad_q_freqs", need_q_freqs ? *q_freqs : q, need_q_freqs, p.grad_q_freqs);
  // Sums over nothing: no kernel is called.
  if (q.numel() == 0) {
    for (Tensor* grad : {&grad_k, &grad_v, &grad_q_freqs}) torch::stable::zero_(*grad);
  }
  return {grad_q, grad_k, grad_v, grad_q_freqs};
}

}  // namespace anchor_attention
