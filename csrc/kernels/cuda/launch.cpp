#include "kernels/cuda/launch.h"

#include "kernels/cuda/tensor_map_encoder.h"

namespace anchor_attention::cuda {
namespace {

void start(LaunchPlan& step, const Device& device, CUstream stream) {
  for (const TensorMapPlan& map : step.tensor_maps) encode_tensor_map(map, step.params.data() + map.params_offset);
  // The driver accepts a library's kernel in place of a function.
  const auto function = reinterpret_cast<CUfunction>(device.kernel(step.kernel, step.shared_bytes));
  void* arguments[] = {step.params.data()};
  check_driver(driver().launch_kernel(function, step.grid, 1, 1, step.block, 1, 1, step.shared_bytes, stream, arguments,
                                      nullptr),
               "cuLaunchKernel");
}

}  // namespace

void launch(Plan& plan, const Device& device, CUstream stream) {
  const CurrentContext context(device);
  const AllowedDuringCapture allowed;
  for (LaunchPlan& step : plan.launches) start(step, device, stream);
}

}  // namespace anchor_attention::cuda
