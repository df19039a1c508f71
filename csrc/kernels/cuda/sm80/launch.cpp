#include "kernels/cuda/sm80/launch.h"

#include "kernels/cuda/sm80/kernels.h"

namespace anchor_attention::sm80 {
namespace {

// What a block may use without asking for more.
constexpr uint32_t kDefaultSharedBytes = 48 * 1024;

template <class P, int kHeadDim>
const void* attention_kernel(const KernelId& kernel) {
  if (kernel.kind == KernelKind::forward) return forward_kernel<P, kHeadDim>();
  if (kernel.kind == KernelKind::backward_query) return backward_query_kernel<P, kHeadDim>();
  if constexpr (kHeadDim <= kWidestHeadOfBothGradients) {
    return backward_key_kernel<P, kHeadDim, KeyGradients::both>();
  } else {
    return kernel.gradients == KeyGradients::key ? backward_key_kernel<P, kHeadDim, KeyGradients::key>()
                                                 : backward_key_kernel<P, kHeadDim, KeyGradients::value>();
  }
}

template <class P>
const void* attention_kernel_of_head_dim(const KernelId& kernel) {
  switch (kernel.head_dim) {
    case 32:
      return attention_kernel<P, 32>(kernel);
    case 48:
      return attention_kernel<P, 48>(kernel);
    case 64:
      return attention_kernel<P, 64>(kernel);
    case 96:
      return attention_kernel<P, 96>(kernel);
    case 128:
      return attention_kernel<P, 128>(kernel);
    case 256:
      return attention_kernel<P, 256>(kernel);
    default:
      return nullptr;
  }
}

template <class P>
const void* elementwise_kernel(KernelKind kind) {
  switch (kind) {
    case KernelKind::row_statistics:
      return statistics_kernel<P>();
    case KernelKind::rope:
      return rope_kernel<P>();
    default:
      return rope_freqs_kernel<P>();
  }
}

const void* kernel_address(const KernelId& kernel) {
  if (kernel.kind == KernelKind::upload) return upload_kernel();
  const bool elementwise = kernel.head_dim == 0;
  switch (kernel.precision) {
    case Precision::bfloat16:
      return elementwise ? elementwise_kernel<Bfloat16>(kernel.kind) : attention_kernel_of_head_dim<Bfloat16>(kernel);
    case Precision::float16:
      return elementwise ? elementwise_kernel<Float16>(kernel.kind) : attention_kernel_of_head_dim<Float16>(kernel);
    case Precision::tf32:
      return elementwise ? elementwise_kernel<Tf32>(kernel.kind) : attention_kernel_of_head_dim<Tf32>(kernel);
    default:
      return attention_kernel_of_head_dim<Tf32x3>(kernel);
  }
}

}  // namespace

cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  for (const LaunchPlan& step : plan.launches) {
    const void* kernel = kernel_address(step.kernel);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (step.shared_bytes > kDefaultSharedBytes) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(step.shared_bytes));
      if (error != cudaSuccess) return error;
    }
    void* arguments[] = {const_cast<std::byte*>(step.params.data())};
    const cudaError_t error =
        cudaLaunchKernel(kernel, dim3(step.grid), dim3(step.block), arguments, step.shared_bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace anchor_attention::sm80
