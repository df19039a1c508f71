// Calls the operations through the dispatcher with a table made by hand, and checks them against a plain softmax.
//
// Usage: call_operation [FILE]   FILE gets q, k, v, out and grad_q, grad_k, grad_v as raw float32, one after the other
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Integers = c10::SymIntArrayRef;

constexpr int64_t BATCH = 2, QUERIES = 300, KEYS = 160, HEADS = 3, HEAD_DIM = 64;

// Queries 0..199 read keys 0..127; queries 200..299 read keys 0..63 and 128..159.
const std::vector<int64_t> Q_RANGES = {0, 200, 200, 300};
const std::vector<int64_t> K_OFFSETS = {0, 1, 3};
const std::vector<int64_t> K_RANGES = {0, 128, 0, 64, 128, 160};

std::vector<c10::SymInt> symbolic(const std::vector<int64_t>& numbers) { return {numbers.begin(), numbers.end()}; }

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, Integers q_ranges,
                                     Integers k_offsets, Integers k_ranges) {
  using Signature =
      std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, Integers, Integers, Integers,
                                 const OptionalTensor&, const OptionalTensor&, std::optional<double>, bool);
  static const auto operation =
      c10::Dispatcher::singleton().findSchemaOrThrow("anchor_attention::attention", "").typed<Signature>();
  return operation.call(q, k, v, q_ranges, k_offsets, k_ranges, /*q_freqs=*/{}, /*key_mask=*/{}, /*scale=*/{},
                        /*allow_tf32=*/false);
}

// The backward is an operation, too: autograd formulas are registered by the Python package, not by the library.
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      Integers q_ranges, Integers k_offsets, Integers k_ranges) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      Integers, Integers, Integers, const OptionalTensor&, const OptionalTensor&, std::optional<double>, bool, bool,
      bool, bool, bool);
  static const auto operation =
      c10::Dispatcher::singleton().findSchemaOrThrow("anchor_attention::attention_backward", "").typed<Signature>();
  auto [grad_q, grad_k, grad_v, grad_q_freqs] =
      operation.call(grad_out, /*grad_lse=*/{}, q, k, v, out, lse, q_ranges, k_offsets, k_ranges, /*q_freqs=*/{},
                     /*key_mask=*/{}, /*scale=*/{}, /*allow_tf32=*/false, /*need_q=*/true, /*need_k=*/true,
                     /*need_v=*/true, /*need_q_freqs=*/false);
  return {grad_q, grad_k, grad_v};
}

// softmax(q kᵀ / √D) v with everything outside of the table masked, in float64. (B, N, H, D) as the operation has it.
Tensor plain_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  Tensor mask = torch::zeros({QUERIES, KEYS}, torch::kBool);
  for (size_t g = 0; g + 1 < K_OFFSETS.size(); ++g) {
    for (int64_t r = K_OFFSETS[g]; r < K_OFFSETS[g + 1]; ++r) {
      mask.slice(0, Q_RANGES[2 * g], Q_RANGES[2 * g + 1]).slice(1, K_RANGES[2 * r], K_RANGES[2 * r + 1]).fill_(true);
    }
  }
  const Tensor scores = at::einsum("bqhd,bkhd->bhqk", {q, k}) / std::sqrt(static_cast<double>(HEAD_DIM));
  const Tensor weights = scores.masked_fill(~mask, -INFINITY).softmax(-1);
  return at::einsum("bhqk,bkhd->bqhd", {weights, v});
}

void write(const std::string& path, const std::vector<Tensor>& tensors) {
  std::ofstream file(path, std::ios::binary);
  for (const Tensor& tensor : tensors) {
    file.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  }
  TORCH_CHECK(file.good(), "can't write ", path);
}

int run(const std::optional<std::string>& path) {
  torch::manual_seed(0);
  const Tensor q = torch::randn({BATCH, QUERIES, HEADS, HEAD_DIM});
  const Tensor k = torch::randn({BATCH, KEYS, HEADS, HEAD_DIM}), v = torch::randn_like(k);
  const Tensor grad_out = torch::ones_like(q);

  const auto q_ranges = symbolic(Q_RANGES), k_offsets = symbolic(K_OFFSETS), k_ranges = symbolic(K_RANGES);
  const auto [out, lse] = attention(q, k, v, q_ranges, k_offsets, k_ranges);
  const auto [grad_q, grad_k, grad_v] = attention_backward(grad_out, q, k, v, out, lse, q_ranges, k_offsets, k_ranges);

  std::vector<Tensor> exact_inputs;
  for (const Tensor& input : {q, k, v}) {
    exact_inputs.push_back(input.to(torch::kDouble).requires_grad_());
  }
  const Tensor exact_out = plain_attention(exact_inputs[0], exact_inputs[1], exact_inputs[2]);
  const auto exact_grads = torch::autograd::grad({exact_out}, exact_inputs, {grad_out.to(torch::kDouble)});

  const std::vector<std::tuple<const char*, Tensor, Tensor>> comparisons = {{"out", out, exact_out},
                                                                            {"grad_q", grad_q, exact_grads[0]},
                                                                            {"grad_k", grad_k, exact_grads[1]},
                                                                            {"grad_v", grad_v, exact_grads[2]}};
  bool agrees = true;
  for (const auto& [name, actual, expected] : comparisons) {
    const double error = (actual.to(torch::kDouble) - expected).norm().item<double>() / expected.norm().item<double>();
    std::cout << name << ": relative error " << error << '\n';
    // Not '>': it lets NaN pass.
    agrees = agrees && error < 1e-5;
  }
  if (path) {
    write(*path, {q, k, v, out, grad_q, grad_k, grad_v});
  }
  std::cout << (agrees ? "agrees with a plain softmax in float64\n" : "DIFFERS from a plain softmax in float64\n");
  return agrees ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? std::optional<std::string>(argv[1]) : std::nullopt);
  } catch (const std::exception& error) {
    std::cerr << "call_operation: " << error.what() << '\n';
    return 1;
  }
}
