#include "host/rope_op.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "host/checks.h"

namespace anchor_attention {

RopeParams check_rope(const char* x_name, const Tensor& x, const Tensor& freqs) {
  check_rank(x_name, x, 4, "(batch, tokens, heads, head_dim)");
  const ScalarType dtype = scalar_type(x_name, x);
  check_last_axis_contiguous(x_name, x);
  check_freqs("freqs", freqs, x_name, x, dtype, x.size(0), x.size(1), x.size(3));
  RopeParams p{};
  p.x = x.const_data_ptr();
  p.freqs = freqs.const_data_ptr();
  p.x_strides = strides_of(x);
  p.freqs_strides = freqs_strides_of(freqs);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.heads = x.size(2);
  p.head_dim = x.size(3);
  p.dtype = dtype;
  return p;
}

RopeBackwardParams check_rope_backward(const Tensor& grad_out, const std::optional<Tensor>& x, const Tensor& freqs,
                                       bool need_freqs) {
  RopeBackwardParams p{};
  p.forward = check_rope("grad_out", grad_out, freqs);
  p.forward.x = nullptr;
  check(x.has_value() || !need_freqs, "x must be given when need_freqs is true");
  if (x) {
    check_shape("x", *x, {grad_out.size(0), grad_out.size(1), grad_out.size(2), grad_out.size(3)});
    check_same_device("x", *x, "grad_out", grad_out);
    check_same_dtype("x", *x, "grad_out", grad_out);
    check_last_axis_contiguous("x", *x);
    p.forward.x = x->const_data_ptr();
    p.forward.x_strides = strides_of(*x);
  }
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_strides = strides_of(grad_out);
  return p;
}

Tensor new_rotated(const Tensor& x, RopeParams& p) {
  Tensor rotated = new_empty("the rotated x", x, {p.batch, p.tokens, p.heads, p.head_dim}, x.scalar_type());
  p.out = rotated.mutable_data_ptr();
  return rotated;
}

std::tuple<Tensor, Tensor> new_rope_gradients(const Tensor& grad_out, const Tensor& freqs, bool need_x, bool need_freqs,
                                              RopeBackwardParams& p) {
  const RopeParams& f = p.forward;
  const std::vector<int64_t> none{0};
  Tensor grad_x =
      new_empty("grad_x", grad_out, need_x ? std::vector<int64_t>{f.batch, f.tokens, f.heads, f.head_dim} : none,
                grad_out.scalar_type());
  Tensor grad_freqs = new_empty("grad_freqs", freqs, need_freqs ? shape_of(freqs) : none, freqs.scalar_type());
  p.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  p.grad_freqs = need_freqs ? grad_freqs.mutable_data_ptr() : nullptr;
  // Sums over nothing: no kernel visits them.
  if (need_freqs && grad_out.numel() == 0) torch::stable::zero_(grad_freqs);
  return {grad_x, grad_freqs};
}

}  // namespace anchor_attention
