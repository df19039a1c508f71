#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>

#include "host/backends.h"
#include "host/checks.h"
#include "kernels/cuda/launch_attention.h"

// A CPU build of torch does not have this function: declared weak, so that the same library loads there, too. It is
// bound in a program that links torch's libraries; Python loads these locally, so that it stays null there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace anchor_attention {
namespace {

using StreamOfDevice = decltype(&aoti_torch_get_current_cuda_stream);

// Null in a torch without CUDA. With one, tensors on a GPU exist only after torch has loaded its part for CUDA.
StreamOfDevice find_stream_of_device() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return torch_cuda == nullptr
             ? nullptr
             : reinterpret_cast<StreamOfDevice>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
}

CUstream current_stream(int32_t device) {
  static const StreamOfDevice stream_of_device = find_stream_of_device();
  check(stream_of_device != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(stream_of_device(device, &stream));
  return static_cast<CUstream>(stream);
}

// Makes the tensor's device current, finds its stream, and turns away GPUs that the kernels were not built for.
class Context {
 public:
  explicit Context(const Tensor& like)
      : like_(like),
        index_(like.get_device_index()),
        guard_(index_),
        stream_(current_stream(index_)),
        target_{cuda::device(index_), stream_} {
    const cuda::Device& device = target_.device;
    check(device.major() >= 8, "the GPU is too old: compute capability 8.0 (Ampere) is needed, cuda:", index_, " has ",
          device.major(), ".", device.minor());
  }

  const cuda::Target& target() const { return target_; }

  // From torch's caching allocator, which orders reuse by the stream and keeps what a graph has captured.
  void* allocate(int64_t bytes) {
    workspace_ = torch::stable::new_empty(like_, {bytes}, torch::headeronly::ScalarType::Byte);
    return workspace_.mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream stream_;
  cuda::Target target_;
  Tensor workspace_;
};

cuda::Options options(bool allow_tf32) {
  return {.allow_tf32 = allow_tf32, .pinned_kernels = std::getenv("ANCHOR_ATTENTION_CUDA_KERNELS")};
}

// Names the operation that the driver refused.
template <class Run>
void on_gpu(const char* operation, const Tensor& like, const Run& run) {
  try {
    Context context(like);
    run(context);
  } catch (const cuda::DriverError& error) {
    check(false, operation, " failed on the GPU: ", error.what());
  }
}

}  // namespace

void Cuda::attention(const AttentionParams& params, const Tensor& like, bool allow_tf32) {
  on_gpu("attention", like, [&](Context& context) {
    cuda::attention_forward(params, options(allow_tf32), context.target(),
                            [&](int64_t bytes) { return context.allocate(bytes); });
  });
}

void Cuda::attention_backward(const AttentionBackwardParams& params, const Tensor& like, bool allow_tf32) {
  on_gpu("attention_backward", like, [&](Context& context) {
    cuda::attention_backward(params, options(allow_tf32), context.target(),
                             [&](int64_t bytes) { return context.allocate(bytes); });
  });
}

void Cuda::attention_jvp(const AttentionJvpParams& params, const Tensor& like) {
  on_gpu("attention_jvp", like, [&](Context& context) {
    cuda::attention_jvp(params, options(/*allow_tf32=*/false), context.target(),
                        [&](int64_t bytes) { return context.allocate(bytes); });
  });
}

void Cuda::attention_double_backward(const AttentionDoubleBackwardParams& params, const Tensor& like) {
  on_gpu("attention_double_backward", like, [&](Context& context) {
    cuda::attention_double_backward(params, context.target(), [&](int64_t bytes) { return context.allocate(bytes); });
  });
}

void Cuda::rope(const RopeParams& params, const Tensor& like) {
  on_gpu("rope", like, [&](Context& context) { cuda::rope(params, context.target()); });
}

void Cuda::rope_backward(const RopeBackwardParams& params, const Tensor& like) {
  on_gpu("rope_backward", like, [&](Context& context) { cuda::rope_backward(params, context.target()); });
}

}  // namespace anchor_attention
