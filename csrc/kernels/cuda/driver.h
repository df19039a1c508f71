// The CUDA driver, looked up at run time: the library loads on machines without one, and runs with drivers that are
// older than the toolkit that built it, because it links no runtime of that toolkit.
#pragma once

#include <cuda.h>

#include <stdexcept>

namespace anchor_attention::cuda {

// An error of the driver, in its own words, or the reason why it can't be used.
struct DriverError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#define ANCHOR_ATTENTION_DRIVER_FUNCTIONS(apply)                                                              \
  apply(driver_get_version, cuDriverGetVersion) apply(get_error_string, cuGetErrorString)                     \
      apply(device_get, cuDeviceGet) apply(device_get_attribute, cuDeviceGetAttribute)                        \
          apply(primary_context_retain, cuDevicePrimaryCtxRetain) apply(context_get_current, cuCtxGetCurrent) \
              apply(context_push, cuCtxPushCurrent) apply(context_pop, cuCtxPopCurrent)                       \
                  apply(library_load_data, cuLibraryLoadData) apply(library_get_kernel, cuLibraryGetKernel)   \
                      apply(kernel_set_attribute, cuKernelSetAttribute) apply(launch_kernel, cuLaunchKernel)  \
                          apply(encode_tensor_map, cuTensorMapEncodeTiled)                                    \
                              apply(exchange_capture_mode, cuThreadExchangeStreamCaptureMode)

struct Driver {
#define ANCHOR_ATTENTION_MEMBER(member, function) decltype(&function) member;
  ANCHOR_ATTENTION_DRIVER_FUNCTIONS(ANCHOR_ATTENTION_MEMBER)
#undef ANCHOR_ATTENTION_MEMBER
};

// Throws DriverError where there is no driver, or one that can't load the GPU code of this library.
const Driver& driver();

// Throws DriverError unless the driver's function succeeded.
void check_driver(CUresult result, const char* function);

}  // namespace anchor_attention::cuda
