#include "kernels/cuda/driver.h"

#include <dlfcn.h>

#include <string>

#include "kernels/cuda/device_code.h"

namespace anchor_attention::cuda {
namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw DriverError(std::string("the NVIDIA driver is too old: it has no ") + name);
}

std::string release(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

void check_version(const Driver& found) {
  int version = 0;
  if (found.driver_get_version(&version) != CUDA_SUCCESS) throw DriverError("the NVIDIA driver does not answer");
  const int needed = device_code().minimum_driver;
  if (version >= needed) return;
  // The first driver branch of each major version of CUDA.
  const char* branch = needed >= 13000 ? "580" : "530";
  throw DriverError("the NVIDIA driver is too old: it is for CUDA " + release(version) +
                    ", and the GPU code of this library needs one for CUDA " + release(needed) + " or newer (" +
                    branch + " or newer)");
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw DriverError("there is no NVIDIA driver: libcuda.so.1 can't be loaded");
  Driver found{};
  find(library, "cuDriverGetVersion", found.driver_get_version);
  // An old driver is reported as too old, not by the first function that it lacks.
  check_version(found);
// The header maps some names to newer versions of the function: those are the symbols.
#define ANCHOR_ATTENTION_NAME(function) #function
#define ANCHOR_ATTENTION_FIND(member, function) find(library, ANCHOR_ATTENTION_NAME(function), found.member);
  ANCHOR_ATTENTION_DRIVER_FUNCTIONS(ANCHOR_ATTENTION_FIND)
#undef ANCHOR_ATTENTION_FIND
#undef ANCHOR_ATTENTION_NAME
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver found = load();
  return found;
}

void check_driver(CUresult result, const char* function) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().get_error_string(result, &text);
  throw DriverError(std::string(text == nullptr ? "unknown error" : text) + " (" + function + ")");
}

}  // namespace anchor_attention::cuda
