#include "kernels/cuda/launch.h"

#include <cstring>

#include "kernels/cuda/common/kernels.h"
#include "kernels/cuda/common/tensor_map_encoder.h"
#include "kernels/cuda/sm80/kernels.h"
#include "kernels/cuda/sm90/kernels.h"

namespace anchor_attention::cuda {
namespace {

// What a block may use without asking for more.
constexpr uint32_t kDefaultSharedBytes = 48 * 1024;

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
  if (kernel.head_dim != 0) {
#ifdef ANCHOR_ATTENTION_WITH_SM90
    if (kernel.generation == Generation::sm90) return sm90::attention_kernel(kernel);
#endif
    return sm80::attention_kernel(kernel);
  }
  switch (kernel.precision) {
    case Precision::bfloat16:
      return elementwise_kernel<Bfloat16>(kernel.kind);
    case Precision::float16:
      return elementwise_kernel<Float16>(kernel.kind);
    default:
      return elementwise_kernel<Tf32>(kernel.kind);
  }
}

cudaError_t start(const LaunchPlan& step, cudaStream_t stream) {
  const void* kernel = kernel_address(step.kernel);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (step.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(step.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  std::vector<std::byte> params = step.params;
  for (const TensorMapPlan& map : step.tensor_maps) {
    TensorMap encoded;
    if (const cudaError_t error = encode_tensor_map(map, encoded); error != cudaSuccess) return error;
    std::memcpy(params.data() + map.params_offset, &encoded, sizeof(encoded));
  }
  void* arguments[] = {params.data()};
  return cudaLaunchKernel(kernel, dim3(step.grid), dim3(step.block), arguments, step.shared_bytes, stream);
}

}  // namespace

cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  for (const LaunchPlan& step : plan.launches) {
    if (const cudaError_t error = start(step, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace anchor_attention::cuda
