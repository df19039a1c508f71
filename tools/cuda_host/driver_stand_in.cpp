// Stands in for the CUDA driver (libcuda.so.1): answers as one GPU of any compute capability would, and keeps a record
// of what it was asked. It loads images as strictly as a driver does, as far as their headers tell.
#include <cuda.h>

#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  std::string name;
  std::map<CUdevice, int> shared_limits;
  bool loaded = false;  // by its first launch
};

struct {
  int version = 13000;
  int major = 9;
  int minor = 0;
  CUresult launch_result = CUDA_SUCCESS;
  bool quiet = false;
  bool capturing = false;
  int encoded_maps = 0;
  int attributes_set = 0;
  int loaded_images = 0;
  std::ostringstream launches;
} gpu;

thread_local CUcontext current_context = nullptr;
thread_local CUcontext context_below = nullptr;

thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

// As drivers before CUDA 12.3.
bool may_load() { return !gpu.capturing || capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED; }

CUcontext primary_context(CUdevice device) {
  return reinterpret_cast<CUcontext>(static_cast<intptr_t>(0xC000 + device));
}

// Machine code must be for the device, in a format that a driver of this release reads; PTX must say a version it
// knows.
CUresult check_image(const char* image) {
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) == 0)
    return image[8] <= (gpu.version >= 13000 ? 8 : 7) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
  return std::strstr(image, ".version 8.1") != nullptr ? CUDA_SUCCESS : CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
}

}  // namespace

EXPORT void configure(int version, int major, int minor, int launch_result, int quiet) {
  gpu.version = version;
  gpu.major = major;
  gpu.minor = minor;
  gpu.launch_result = static_cast<CUresult>(launch_result);
  gpu.quiet = quiet != 0;
}

// Launches, one a line: kernel, grid, block, shared bytes, stream, context.
EXPORT const char* launches() {
  static std::string text;
  text = gpu.launches.str();
  gpu.launches.str("");
  return text.c_str();
}
EXPORT int encoded_maps() { return gpu.encoded_maps; }
EXPORT int attributes_set() { return gpu.attributes_set; }
EXPORT int loaded_images() { return gpu.loaded_images; }
EXPORT void* context_of_thread() { return current_context; }
EXPORT void set_context_of_thread(void* context) { current_context = static_cast<CUcontext>(context); }

EXPORT void set_capturing(int capturing) { gpu.capturing = capturing != 0; }
EXPORT int capture_mode_of_thread() { return capture_mode; }

EXPORT CUresult cuDriverGetVersion(int* version) { return *version = gpu.version, CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_LAUNCH_FAILED ? "unspecified launch failure" : "refused";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return std::swap(*mode, capture_mode), CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? gpu.major
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? gpu.minor
                                                                       : 132;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = primary_context(device), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current_context, CUDA_SUCCESS; }
EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
  context_below = current_context;
  return current_context = context, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = current_context;
  return current_context = context_below, CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned int,
                                  CUlibraryOption*, void**, unsigned int) {
  if (!may_load()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  ++gpu.loaded_images;
  *library = static_cast<CUlibrary>(const_cast<void*>(code));
  return check_image(static_cast<const char*>(code));
}
EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  const auto* image = reinterpret_cast<const char*>(library);
  if (image[0] != 0x7f && std::strstr(image, (std::string(".entry ") + name + "(").c_str()) == nullptr) {
    return CUDA_ERROR_NOT_FOUND;
  }
  *kernel = reinterpret_cast<CUkernel>(new Kernel{name, {}});
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  ++gpu.attributes_set;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > 227 * 1024)
    return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Kernel*>(kernel)->shared_limits[device] = value;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* address,
                                       const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                       CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  ++gpu.encoded_maps;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(map, 0, sizeof(*map));
  return map->opaque[0] = reinterpret_cast<uintptr_t>(address), CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid, unsigned, unsigned, unsigned block, unsigned,
                               unsigned, unsigned shared_bytes, CUstream stream, void** arguments, void** extra) {
  if (arguments == nullptr || arguments[0] == nullptr || extra != nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto& kernel = *reinterpret_cast<Kernel*>(function);
  if (!kernel.loaded && !may_load()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  kernel.loaded = true;
  const CUdevice device = static_cast<CUdevice>(reinterpret_cast<intptr_t>(current_context) - 0xC000);
  const auto limit = kernel.shared_limits.find(device);
  if (shared_bytes > static_cast<unsigned>(limit == kernel.shared_limits.end() ? 48 * 1024 : limit->second)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!gpu.quiet) {
    gpu.launches << kernel.name << ' ' << grid << ' ' << block << ' ' << shared_bytes << ' ' << stream << ' '
                 << current_context << '\n';
  }
  return gpu.launch_result;
}
