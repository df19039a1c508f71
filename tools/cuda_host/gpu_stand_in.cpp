// Calls the host code of the CUDA operations without torch's part for CUDA: its guard of devices is stood in for here,
// the current stream and the driver by libraries of their own, as they are when a GPU is there. Nothing reads what the
// pointers point to.
#include <chrono>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "host/backends.h"
#include "key_ranges.h"

extern "C" {

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) { return *index = 3, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}

namespace {

using namespace anchor_attention;

// Where the allocator of torch gives workspaces: on the CPU, for want of a GPU.
Tensor cpu_tensor() {
  AtenTensorHandle handle = nullptr;
  const int64_t size = 1, stride = 1;
  aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle);
  return Tensor(handle);
}

void* address(int64_t i) { return reinterpret_cast<void*>(int64_t{0x7F0000000000} + (i << 32)); }

// `n_groups` groups of queries of one size; each leaves out other keys at the beginning, or they would be one group.
struct Call {
  KeyRangeTable table;
  AttentionBackwardParams params{};

  Call(int64_t n_groups, int64_t queries, int64_t keys, int64_t heads, int64_t head_dim) {
    std::vector<int64_t> q_ranges, k_offsets{0}, k_ranges;
    for (int64_t g = 0; g < n_groups; ++g) {
      for (const int64_t end : {g, g + 1}) q_ranges.push_back(end * queries);
      k_ranges.insert(k_ranges.end(), {g % (keys / 2), keys});
      k_offsets.push_back(g + 1);
    }
    const int64_t n_queries = n_groups * queries;
    table = make_key_range_table(q_ranges, k_offsets, k_ranges, n_queries, keys);
    AttentionParams& p = params.forward;
    p.q = address(0), p.k = address(1), p.v = address(2), p.out = address(3);
    p.lse = static_cast<float*>(address(4));
    const Strides strides{0, heads * head_dim, head_dim};
    p.q_strides = p.k_strides = p.v_strides = strides;
    p.batch = 1, p.n_queries = n_queries, p.n_keys = keys, p.heads = p.kv_heads = heads;
    p.head_dim = p.value_dim = head_dim;
    p.scale = 0.125;
    p.dtype = ScalarType::bfloat16;
    p.table = table.view();
    params.grad_out = address(5);
    params.grad_out_strides = strides;
    params.grad_q = address(6), params.grad_k = address(7), params.grad_v = address(8);
  }
};

std::string answer;

template <class Run>
const char* answer_of(const Run& run) {
  answer.clear();
  try {
    run();
  } catch (const std::exception& exception) {
    answer = exception.what();
  }
  return answer.c_str();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The error's text; empty if there was none.
EXPORT const char* call_rope() {
  RopeParams p{};
  p.x = address(0), p.freqs = address(1), p.out = address(2);
  p.batch = p.tokens = p.heads = 1, p.head_dim = 64, p.dtype = ScalarType::bfloat16;
  return answer_of([&] { Cuda::rope(p, cpu_tensor()); });
}

// Nanoseconds of a call, the mean of `repeats`; negative if one failed, and then `error` says how.
EXPORT double call_attention(int64_t n_groups, int64_t queries, int64_t keys, int64_t heads, int64_t head_dim,
                             int backward, int64_t repeats) {
  const Call call(n_groups, queries, keys, heads, head_dim);
  const Tensor like = cpu_tensor();
  const auto begin = std::chrono::steady_clock::now();
  const std::string error = answer_of([&] {
    for (int64_t i = 0; i < repeats; ++i) {
      if (backward != 0) {
        Cuda::attention_backward(call.params, like, false);
      } else {
        Cuda::attention(call.params.forward, like, false);
      }
    }
  });
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin;
  return error.empty() ? spent.count() / static_cast<double>(repeats) : -1;
}

EXPORT const char* error() { return answer.c_str(); }
