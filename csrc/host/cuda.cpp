#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>

#include "host/checks.h"
#include "host/device.h"
#include "kernels/cuda/attention.h"

// A CPU build of torch does not have it: weak, the one library loads there, too. Bound in a program that links torch's
// libraries; Python loads them for themselves alone, so that it stays null there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace anchor_attention {
namespace {

void check_cuda(cudaError_t error, const char* operation) {
  check(error == cudaSuccess, operation, " failed on the GPU: ", cudaGetErrorString(error));
}

using StreamOfDevice = decltype(&aoti_torch_get_current_cuda_stream);

// Null in a torch without CUDA. With one, tensors on a GPU exist only after torch has loaded its part for CUDA.
StreamOfDevice find_stream_of_device() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return torch_cuda == nullptr
             ? nullptr
             : reinterpret_cast<StreamOfDevice>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
}

cudaStream_t current_stream(int32_t device) {
  static const StreamOfDevice stream_of_device = find_stream_of_device();
  check(stream_of_device != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(stream_of_device(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// The generation of kernels for a device, among those that were compiled.
cuda::Generation generation_of(int major) {
  const cuda::Generation newest = cuda::generation_of(major, std::getenv("ANCHOR_ATTENTION_CUDA_KERNELS"));
#ifdef ANCHOR_ATTENTION_WITH_SM90
  return newest;
#else
  return newest == cuda::Generation::sm90 ? cuda::Generation::sm80 : newest;
#endif
}

// Makes the tensor's device current, finds its stream, and turns away GPUs that the kernels were not built for.
class Context {
 public:
  explicit Context(const Tensor& like)
      : device_(like.get_device_index()),
        guard_(device_),
        stream_(current_stream(device_)),
        major_(attribute(cudaDevAttrComputeCapabilityMajor, device_)) {
    check(major_ >= 8, "the GPU is too old: compute capability 8.0 (Ampere) is needed, cuda:", device_, " has ", major_,
          ".", attribute(cudaDevAttrComputeCapabilityMinor, device_));
  }

  cudaStream_t stream() const { return stream_; }
  cuda::Options options(bool allow_tf32) const {
    return {.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device_),
            .allow_tf32 = allow_tf32,
            .generation = generation_of(major_)};
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  int major_;
};

// From torch's caching allocator, which orders reuse by the stream and keeps what a graph has captured.
Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

}  // namespace

void Cuda::attention(const AttentionParams& params, const Tensor& like, bool allow_tf32) {
  const Context context(like);
  const cuda::Options options = context.options(allow_tf32);
  Tensor memory = workspace(like, cuda::attention_forward_workspace_bytes(params, options));
  check_cuda(cuda::attention_forward(params, options, memory.mutable_data_ptr(), context.stream()), "attention");
}

void Cuda::attention_backward(const AttentionBackwardParams& params, const Tensor& like, bool allow_tf32) {
  const Context context(like);
  const cuda::Options options = context.options(allow_tf32);
  Tensor memory = workspace(like, cuda::attention_backward_workspace_bytes(params, options));
  check_cuda(cuda::attention_backward(params, options, memory.mutable_data_ptr(), context.stream()),
             "attention_backward");
}

void Cuda::rope(const RopeParams& params, const Tensor& like) {
  const Context context(like);
  check_cuda(cuda::rope(params, context.stream()), "rope");
}

void Cuda::rope_backward(const RopeBackwardParams& params, const Tensor& like) {
  const Context context(like);
  check_cuda(cuda::rope_backward(params, context.stream()), "rope_backward");
}

}  // namespace anchor_attention
