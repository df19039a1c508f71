#include "host/checks.h"

#include <torch/csrc/stable/ops.h>

#include <iomanip>

namespace anchor_attention {
namespace {

using Dtype = torch::headeronly::ScalarType;

std::string dtype_text(Dtype dtype) { return torch::headeronly::toString(dtype); }

double element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::ComplexDouble:
      return 16;
    case Dtype::Double:
    case Dtype::ComplexFloat:
      return 8;
    case Dtype::Float:
      return 4;
    default:
      return 2;
  }
}

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(static_cast<int>(tensor.get_device_index()));
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

std::string shape_text(const Tensor& tensor) { return shape_text(shape_of(tensor)); }

std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
  return shape;
}

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const char* layout) {
  if (tensor.dim() == rank) [[likely]]
    return;
  check(false, name, " must be ", layout, ", got ", tensor.dim(), " axes: ", shape_text(tensor));
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, bool heads_first) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t axis = 0; same && axis < shape.size(); ++axis) same = tensor.size(axis) == shape[axis];
  if (same) [[likely]]
    return;
  check(false, name, " must have shape ", shape_text(shape), ", got ", shape_text(tensor),
        heads_first ? kHeadsFirst : "");
}

void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  const bool same = tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
                    (tensor.is_cpu() || tensor.get_device_index() == other.get_device_index());
  if (same) [[likely]]
    return;
  check(false, name, " must be on the device of ", other_name, " (", device_text(other), "), got ",
        device_text(tensor));
}

void check_same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (tensor.scalar_type() == other.scalar_type()) [[likely]]
    return;
  check(false, name, " must have the dtype of ", other_name, " (", dtype_text(other.scalar_type()), "), got ",
        dtype_text(tensor.scalar_type()));
}

void check_last_axis_contiguous(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1) [[likely]]
    return;
  check(false, name, " must be contiguous along its last axis (stride 1), got stride ", tensor.stride(last));
}

ScalarType scalar_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case Dtype::Float:
      return ScalarType::float32;
    case Dtype::BFloat16:
      return ScalarType::bfloat16;
    case Dtype::Half:
      return ScalarType::float16;
    case Dtype::Double:
      check(tensor.is_cpu(), name, " may be float64 only on the CPU, got it on ", device_text(tensor));
      return ScalarType::float64;
    default:
      check(false, name, " must be float32, bfloat16, float16 or (on the CPU) float64, got ",
            dtype_text(tensor.scalar_type()));
      return ScalarType::float32;
  }
}

void check_freqs(const char* name, const Tensor& freqs, const char* other_name, const Tensor& other, ScalarType dtype,
                 int64_t batch, int64_t tokens, int64_t head_dim) {
  check_rank(name, freqs, 3, "(batch or 1, tokens, head_dim / 2)");
  check(head_dim % 2 == 0, "head_dim must be even to be rotated by ", name, ", got ", head_dim);
  check(freqs.size(0) == batch || freqs.size(0) == 1, name, " must have batch size ", batch, " or 1, got ",
        freqs.size(0));
  check_shape(name, freqs, {freqs.size(0), tokens, head_dim / 2}, freqs.size(1) == other.size(2));
  check_same_device(name, freqs, other_name, other);
  const Dtype expected = dtype == ScalarType::float64 ? Dtype::ComplexDouble : Dtype::ComplexFloat;
  check(freqs.scalar_type() == expected, name, " must be ", dtype_text(expected), " for ", other_name, " of ",
        dtype_text(other.scalar_type()), ", got ", dtype_text(freqs.scalar_type()));
}

Tensor readable(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (last < 0 || tensor.numel() == 0 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

Tensor differentiable_freqs(const Tensor& freqs, bool needed) {
  const bool expanded = needed && freqs.dim() == 3 && freqs.size(0) > 1 && freqs.stride(0) == 0;
  return expanded ? torch::stable::contiguous(freqs) : freqs;
}

Tensor new_empty(const char* name, const Tensor& like, const std::vector<int64_t>& shape, Dtype dtype) {
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {
    // A double, because a size that can't be allocated may overflow every integer.
    double bytes = element_bytes(dtype);
    for (int64_t size : shape) bytes *= static_cast<double>(size);
    check(false, like.is_cuda() ? "CUDA out of memory. Tried" : "out of memory: can't allocate memory: you tried",
          " to allocate ", std::fixed, std::setprecision(0), bytes, " bytes for ", name, " of shape ",
          shape_text(shape));
    throw;
  }
}

Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

FreqsStrides freqs_strides_of(const Tensor& freqs) {
  return {freqs.size(0) == 1 ? 0 : freqs.stride(0), freqs.stride(1)};
}

}  // namespace anchor_attention
