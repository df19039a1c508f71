// Properties of a GPU, and the kernels that are loaded on it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "kernels/cuda/common/launch_plan.h"
#include "kernels/cuda/driver.h"

namespace anchor_attention::cuda {

struct LoadedKernel {
  CUkernel handle = nullptr;
  uint32_t shared_bytes = 0;  // that a block may ask for
};

class Device {
 public:
  explicit Device(int ordinal);

  int major() const { return major_; }
  int minor() const { return minor_; }
  int multiprocessors() const { return multiprocessors_; }
  CUcontext context() const { return context_; }

  // The kernel, ready for a launch with `shared_bytes` of dynamic shared memory: loaded by its first use; a limit above
  // the default is set once. Throws DriverError.
  CUkernel kernel(const KernelId& id, uint32_t shared_bytes) const;

 private:
  LoadedKernel load(const KernelId& id) const;

  CUdevice handle_ = 0;
  CUcontext context_ = nullptr;  // the one that torch and the CUDA runtime use
  int major_ = 0;
  int minor_ = 0;
  int multiprocessors_ = 0;
  mutable std::mutex mutex_;
  mutable std::unordered_map<uint32_t, LoadedKernel> kernels_;
};

// By torch's device index; kept for the life of the process. Throws DriverError.
const Device& device(int ordinal);

// Whether kernels of the generation were compiled in.
bool is_compiled(Generation generation);

// While it lives, the device's context is current on the thread: one that torch has not launched from may have none.
class CurrentContext {
 public:
  explicit CurrentContext(const Device& device);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

// While it lives, the thread may do what a capture into a graph forbids, whichever stream is captured: without it,
// drivers before CUDA 12.3 load no kernel during a capture.
class AllowedDuringCapture {
 public:
  AllowedDuringCapture();
  ~AllowedDuringCapture();
  AllowedDuringCapture(const AllowedDuringCapture&) = delete;
  AllowedDuringCapture& operator=(const AllowedDuringCapture&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace anchor_attention::cuda
