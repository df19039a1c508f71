// Checks of tensor arguments. Each throws one message that names the argument and its value, before anything is
// allocated or touched.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace anchor_attention {

using torch::stable::Tensor;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  text << "anchor_attention: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Follows a message about tensors that seem to have the layout of torch's own attention.
inline constexpr const char* kHeadsFirst =
    "; in the layout of scaled_dot_product_attention, pass q.transpose(1, 2), and k and v likewise";

std::vector<int64_t> shape_of(const Tensor& tensor);
std::string shape_text(const std::vector<int64_t>& shape);
std::string shape_text(const Tensor& tensor);

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* layout);
// `heads_first`: the sizes would fit if the tensor were (batch, heads, tokens, head_dim), which the message then says.
void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, bool heads_first = false);
void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_last_axis_contiguous(const char* name, const Tensor& tensor);

// The kernels' name of a tensor's dtype; throws for dtypes that they don't have.
ScalarType scalar_type(const char* name, const Tensor& tensor);

// Rotary factors (batch or 1, tokens, head_dim / 2), complex64, or complex128 where the working type is float64.
void check_freqs(const char* name, const Tensor& freqs, const char* other_name, const Tensor& other, ScalarType dtype,
                 int64_t batch, int64_t tokens, int64_t head_dim);

// Gradients come from autograd in any layout, expanded ones included, and masks and factors are small: they are copied
// where the kernels can't read them in place.
Tensor readable(const Tensor& tensor);

// Factors of a batch that was expanded from one: copied where they get gradients of their own, because to the kernels a
// batch stride of 0 means one gradient, of factors that are shared.
Tensor differentiable_freqs(const Tensor& freqs, bool needed);

// torch's empty tensor on the device of `like`. Where memory is short, the message says how much of it was asked for,
// and for what.
Tensor new_empty(const char* name, const Tensor& like, const std::vector<int64_t>& shape,
                 torch::headeronly::ScalarType dtype);

Strides strides_of(const Tensor& tensor);
FreqsStrides freqs_strides_of(const Tensor& freqs);

}  // namespace anchor_attention
