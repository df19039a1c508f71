#include "kernels/cuda/device.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/cuda/device_code.h"

namespace anchor_attention::cuda {
namespace {

// Shared memory that a block may use without an opt-in.
constexpr uint32_t kDefaultSharedBytes = 48 * 1024;

// Head sizes are multiples of 8 up to 256.
uint32_t number_of(const KernelId& id) {
  uint32_t number = static_cast<uint32_t>(id.kind);
  number = number * 8 + static_cast<uint32_t>(id.precision);
  number = number * 64 + static_cast<uint32_t>(id.head_dim / 8);
  number = number * 4 + static_cast<uint32_t>(id.gradients);
  return number * 2 + static_cast<uint32_t>(id.generation);
}

// Machine code runs on its own major architecture, at least as new within it; PTX on everything newer.
const DeviceImage& image_for(const DeviceModule& module, int major, int minor) {
  const DeviceImage* best = nullptr;
  for (const DeviceImage& image : device_code().images.subspan(module.begin, module.end - module.begin)) {
    const bool runs = image.is_ptx ? image.architecture <= 10 * major + minor
                                   : image.architecture / 10 == major && image.architecture % 10 <= minor;
    if (!runs) continue;
    const bool better = best == nullptr || (best->is_ptx && !image.is_ptx) ||
                        (best->is_ptx == image.is_ptx && best->architecture < image.architecture);
    if (better) best = &image;
  }
  if (best == nullptr) {
    throw DriverError("this library holds no GPU code for compute capability " + std::to_string(major) + "." +
                      std::to_string(minor));
  }
  return *best;
}

// Libraries belong to no context: one serves every device that runs its image.
CUlibrary library_of(const DeviceImage& image) {
  static std::mutex mutex;
  static std::unordered_map<const DeviceImage*, CUlibrary> loaded;
  const std::lock_guard lock(mutex);
  if (const auto found = loaded.find(&image); found != loaded.end()) return found->second;
  CUlibrary library = nullptr;
  check_driver(driver().library_load_data(&library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0),
               "cuLibraryLoadData");
  loaded.emplace(&image, library);
  return library;
}

const DeviceKernel& find_kernel(const std::string& name) {
  const auto kernels = device_code().kernels;
  const auto found = std::lower_bound(
      kernels.begin(), kernels.end(), name,
      [](const DeviceKernel& kernel, const std::string& wanted) { return kernel.name < std::string_view(wanted); });
  if (found == kernels.end() || found->name != std::string_view(name)) {
    throw DriverError("this library has no kernel " + name);
  }
  return *found;
}

}  // namespace

Device::Device(int ordinal) {
  const Driver& d = driver();
  check_driver(d.device_get(&handle_, ordinal), "cuDeviceGet");
  const auto attribute = [&](CUdevice_attribute name) {
    int value = 0;
    check_driver(d.device_get_attribute(&value, name, handle_), "cuDeviceGetAttribute");
    return value;
  };
  major_ = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  minor_ = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  multiprocessors_ = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  check_driver(d.primary_context_retain(&context_, handle_), "cuDevicePrimaryCtxRetain");
}

LoadedKernel Device::load(const KernelId& id) const {
  const DeviceKernel& found = find_kernel(id.name());
  const DeviceImage& image = image_for(device_code().modules[found.module], major_, minor_);
  LoadedKernel kernel{nullptr, kDefaultSharedBytes};
  check_driver(driver().library_get_kernel(&kernel.handle, library_of(image), found.entry), "cuLibraryGetKernel");
  return kernel;
}

CUkernel Device::kernel(const KernelId& id, uint32_t shared_bytes) const {
  const std::lock_guard lock(mutex_);
  LoadedKernel& kernel = kernels_[number_of(id)];
  if (kernel.handle == nullptr) kernel = load(id);
  if (shared_bytes > kernel.shared_bytes) {
    check_driver(driver().kernel_set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                               static_cast<int>(shared_bytes), kernel.handle, handle_),
                 "cuKernelSetAttribute");
    kernel.shared_bytes = shared_bytes;
  }
  return kernel.handle;
}

const Device& device(int ordinal) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const Device>> devices;
  const std::lock_guard lock(mutex);
  const auto i = static_cast<size_t>(ordinal);
  if (i >= devices.size()) devices.resize(i + 1);
  if (devices[i] == nullptr) devices[i] = std::make_unique<const Device>(ordinal);
  return *devices[i];
}

bool is_compiled(Generation generation) {
  if (generation == Generation::sm80) return true;
  return std::ranges::any_of(device_code().kernels, [](const DeviceKernel& kernel) {
    return std::string_view(kernel.name).starts_with("sm90_");
  });
}

CurrentContext::CurrentContext(const Device& device) {
  CUcontext current = nullptr;
  check_driver(driver().context_get_current(&current), "cuCtxGetCurrent");
  if (current == device.context()) return;
  check_driver(driver().context_push(device.context()), "cuCtxPushCurrent");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  CUcontext popped = nullptr;
  if (pushed_) driver().context_pop(&popped);
}

// Each exchange leaves the thread's previous mode in `mode_`.
AllowedDuringCapture::AllowedDuringCapture() {
  check_driver(driver().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

AllowedDuringCapture::~AllowedDuringCapture() { driver().exchange_capture_mode(&mode_); }

}  // namespace anchor_attention::cuda
