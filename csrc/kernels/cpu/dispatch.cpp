#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace anchor_attention::cpu {

// The build passes the sets as ANCHOR_ATTENTION_ISAS(apply): apply(name) for each, best first.
#define ANCHOR_ATTENTION_DECLARE(isa) \
  namespace isa {                     \
  extern const Kernels kKernels;      \
  }
ANCHOR_ATTENTION_ISAS(ANCHOR_ATTENTION_DECLARE)

namespace {

#define ANCHOR_ATTENTION_ADDRESS(isa) &isa::kKernels,
const Kernels* const kCompiled[] = {ANCHOR_ATTENTION_ISAS(ANCHOR_ATTENTION_ADDRESS)};

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16") return has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512") return has_avx512;
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "baseline";
}

const Kernels& select() {
  const char* variable = std::getenv("ANCHOR_ATTENTION_CPU_ISA");
  const std::string pinned = variable == nullptr ? "" : variable;
  std::string runnable;
  for (const Kernels* kernels : kCompiled) {
    if (!runs_here(kernels->name)) continue;
    if (pinned.empty() || pinned == kernels->name) return *kernels;
    runnable += (runnable.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("ANCHOR_ATTENTION_CPU_ISA must be one of " + runnable + " on this machine, got " +
                              pinned);
}

}  // namespace

const Kernels& selected_kernels() {
  static const Kernels& kernels = select();
  return kernels;
}

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : kCompiled) names.push_back(kernels->name);
  return names;
}

std::vector<std::string> runnable_instruction_sets() {
  std::vector<std::string> names = compiled_instruction_sets();
  std::erase_if(names, [](const std::string& name) { return !runs_here(name); });
  return names;
}

}  // namespace anchor_attention::cpu
