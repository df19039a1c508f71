// Which instruction sets are compiled in, which this processor runs, and which one is used.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace anchor_attention::cpu {

#define ANCHOR_ATTENTION_FOR_EACH_ISA(apply) ANCHOR_ATTENTION_ISAS(apply)
#define ANCHOR_ATTENTION_DECLARE(isa) \
  namespace isa {                     \
  extern const Kernels kKernels;      \
  }
ANCHOR_ATTENTION_FOR_EACH_ISA(ANCHOR_ATTENTION_DECLARE)

namespace {

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "baseline";
}

#define ANCHOR_ATTENTION_ADDRESS(isa) &isa::kKernels,
const Kernels* const kCompiled[] = {ANCHOR_ATTENTION_FOR_EACH_ISA(ANCHOR_ATTENTION_ADDRESS)};

const Kernels& select() {
  const char* pinned = std::getenv("ANCHOR_ATTENTION_CPU_ISA");
  for (const Kernels* kernels : kCompiled) {
    if ((pinned == nullptr || *pinned == '\0' || kernels->name == std::string(pinned)) && runs_here(kernels->name)) {
      return *kernels;
    }
  }
  throw std::invalid_argument(
      std::string("ANCHOR_ATTENTION_CPU_ISA must name an instruction set that is compiled in (") +
      compiled_instruction_sets() + ") and that this processor runs, got '" + pinned + "'");
}

}  // namespace

const Kernels& selected_kernels() {
  static const Kernels& kernels = select();
  return kernels;
}

const char* compiled_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : kCompiled) joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace anchor_attention::cpu
