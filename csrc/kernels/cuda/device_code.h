// The kernels' machine code and PTX as data inside the library: what cmake/device_code.py makes of instantiations/*.cu.
#pragma once

#include <cstdint>
#include <span>

namespace anchor_attention::cuda {

struct DeviceImage {
  const unsigned char* data;  // a cubin, or PTX that ends with a zero
  int architecture;           // 80 is compute capability 8.0
  bool is_ptx;
};

// One source: the same kernels for every target, images [begin, end).
struct DeviceModule {
  int32_t begin;
  int32_t end;
};

struct DeviceKernel {
  const char* name;   // as KernelId::name() says it
  const char* entry;  // in the images
  int32_t module;
};

struct DeviceCode {
  std::span<const DeviceImage> images;
  std::span<const DeviceModule> modules;
  std::span<const DeviceKernel> kernels;  // by name
  int minimum_driver;                     // as cuDriverGetVersion counts: the first that loads the images
};

const DeviceCode& device_code();

}  // namespace anchor_attention::cuda
