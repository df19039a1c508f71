// Stands in for the CUDA runtime, torch's guard of devices and the kernels, so that what the host code makes of a GPU
// is tested without one. The current stream comes from a library of its own, as it does from torch.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <exception>
#include <string>

#include "host/device.h"
#include "kernels/cuda/attention.h"

namespace {

struct {
  int major;
  int minor;
  cudaError_t launch_result;
  bool launched;
  cudaStream_t stream;
} gpu;

}  // namespace

extern "C" {

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) { return *index = 3, AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? gpu.major : gpu.minor;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "out of order"; }

}  // extern "C"

cudaError_t anchor_attention::cuda::rope(const RopeParams&, cudaStream_t stream) {
  gpu.launched = true;
  gpu.stream = stream;
  return gpu.launch_result;
}

// Calls an operation on a GPU of that compute capability whose launches end so. Returns "launched", the error's text,
// or both.
extern "C" __attribute__((visibility("default"))) const char* call_rope(int major, int minor, int launch_result) {
  static std::string answer;
  gpu = {major, minor, static_cast<cudaError_t>(launch_result), false, nullptr};
  std::string error;
  try {
    anchor_attention::Cuda::rope({}, {});
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  answer = (gpu.launched ? "launched " : "") + error;
  return answer.c_str();
}

// The stream of that launch.
extern "C" __attribute__((visibility("default"))) void* launch_stream() { return gpu.stream; }
