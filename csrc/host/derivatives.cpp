#include "host/derivatives.h"

#include <string>

namespace anchor_attention {
namespace {

Tangents view_of(const std::optional<Tensor>& tensor, bool stacked) {
  if (!tensor) return {nullptr, 0, {0, 0, 0}};
  const int64_t first = stacked ? 1 : 0;
  return {tensor->const_data_ptr(),
          stacked ? tensor->stride(0) : 0,
          {tensor->stride(first), tensor->stride(first + 1), tensor->stride(first + 2)}};
}

}  // namespace

CheckedTangents check_tangents(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> q_tangent,
                               std::optional<Tensor> k_tangent, std::optional<Tensor> v_tangent, bool stacked) {
  const std::string ending = stacked ? "s" : "";
  CheckedTangents checked{std::nullopt, std::nullopt, std::nullopt, -1};
  const auto check_one = [&](const char* of, const std::optional<Tensor>& tangent, const Tensor& tensor,
                             std::optional<Tensor>& target) {
    if (!tangent) return;
    const std::string name = std::string(of) + "_tangent" + ending;
    std::vector<int64_t> shape = shape_of(tensor);
    if (stacked) {
      check_rank(name.c_str(), *tangent, 5, "(tangents, batch, tokens, heads, head_dim)");
      if (checked.n < 0) checked.n = tangent->size(0);
      shape.insert(shape.begin(), checked.n);
    }
    check_shape(name.c_str(), *tangent, shape);
    check_same_device(name.c_str(), *tangent, of, tensor);
    check_same_dtype(name.c_str(), *tangent, of, tensor);
    target = readable(*tangent);
  };
  check_one("q", q_tangent, q, checked.q);
  check_one("k", k_tangent, k, checked.k);
  check_one("v", v_tangent, v, checked.v);
  check(q_tangent || k_tangent || v_tangent, "one of q_tangent", ending, ", k_tangent", ending, " and v_tangent",
        ending, " must be given, got none");
  if (!stacked) checked.n = 1;
  return checked;
}

AttentionJvpParams jvp_params(const AttentionParams& forward, const CheckedTangents& tangents) {
  const bool stacked = (tangents.q ? tangents.q : tangents.k ? tangents.k : tangents.v)->dim() == 5;
  AttentionJvpParams p{};
  p.forward = forward;
  p.n_tangents = tangents.n;
  p.q_tangents = view_of(tangents.q, stacked);
  p.k_tangents = view_of(tangents.k, stacked);
  p.v_tangents = view_of(tangents.v, stacked);
  return p;
}

void check_known_value(const AttentionParams& forward, const Tensor& q, const Tensor& out, const Tensor& lse) {
  // As the backward, of which `out` stands for the gradient, too.
  check_attention_backward(forward, out, std::nullopt, q, out, lse);
}

std::tuple<Tensor, Tensor> new_tangents(const Tensor& q, AttentionJvpParams& p, bool stacked) {
  const AttentionParams& f = p.forward;
  std::vector<int64_t> out_shape{f.batch, f.n_queries, f.heads, f.value_dim}, lse_shape{f.batch, f.heads, f.n_queries};
  if (stacked) {
    out_shape.insert(out_shape.begin(), p.n_tangents);
    lse_shape.insert(lse_shape.begin(), p.n_tangents);
  }
  Tensor out = new_empty("the tangents of out", q, out_shape, q.scalar_type());
  Tensor lse = new_empty(
      "the tangents of lse", q, lse_shape,
      f.dtype == ScalarType::float64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  p.out_tangents = out.mutable_data_ptr();
  p.lse_tangents = lse.mutable_data_ptr();
  return {out, lse};
}

}  // namespace anchor_attention
