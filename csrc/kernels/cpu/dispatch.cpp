#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace anchor_attention::cpu {

// The build passes the sets of vectors as ANCHOR_ATTENTION_ISAS(apply): apply(name) for each, best first; and those
// with a matrix unit as ANCHOR_ATTENTION_TILE_ISAS(apply).
#define ANCHOR_ATTENTION_DECLARE(isa) \
  namespace isa {                     \
  extern const Kernels kKernels;      \
  }
#define ANCHOR_ATTENTION_DECLARE_TILES(isa) \
  namespace isa {                           \
  extern const TileKernels kTileKernels;    \
  }
ANCHOR_ATTENTION_ISAS(ANCHOR_ATTENTION_DECLARE)
ANCHOR_ATTENTION_TILE_ISAS(ANCHOR_ATTENTION_DECLARE_TILES)

namespace {

struct InstructionSet {
  std::string name;
  const Kernels* vectors;
  const TileKernels* tiles;  // null: the vectors form the products
};

#if defined(__x86_64__) && defined(__linux__)
__attribute__((target("xsave"))) bool processor_has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kOsXsave = 1u << 27;
  if (!__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx) || (ecx & kOsXsave) == 0) return false;
  constexpr unsigned kAmxBFloat16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kAmxBFloat16) == 0 || (edx & kAmxTile) == 0) return false;
  // The system saves the tiles' configuration and data when it switches threads.
  constexpr unsigned long long kTileState = 3ull << 17;
  return (__builtin_ia32_xgetbv(0) & kTileState) == kTileState;
}

// Linux gives a process its tile registers on request only, and may refuse. Threads inherit the permission.
bool request_tile_data() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

bool amx_runs_here() {
#if defined(__x86_64__) && defined(__linux__)
  return __builtin_cpu_supports("avx512bf16") && processor_has_amx() && request_tile_data();
#else
  return false;
#endif
}

bool runs_here(const Kernels& kernels) {
  const std::string name = kernels.name;
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16") return has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512") return has_avx512;
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "baseline";
}

bool runs_here(const InstructionSet& set) {
  if (set.tiles == nullptr) return runs_here(*set.vectors);
  return !set.tiles->needs_amx || amx_runs_here();
}

// Intel's cores issue fewer dot products of bfloat16 than multiply-adds of float32, so that packing bfloat16 as float32
// pays: by a factor of 1.6 on family 6, model 167 (docs/cpu.md).
bool bfloat16_dot_is_slow() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Best first. A set with a matrix unit uses the best set of vectors that runs here.
std::vector<InstructionSet> compiled() {
  std::vector<InstructionSet> sets;
#define ANCHOR_ATTENTION_APPEND(isa) sets.push_back({isa::kKernels.name, &isa::kKernels, nullptr});
  ANCHOR_ATTENTION_ISAS(ANCHOR_ATTENTION_APPEND)
  if (bfloat16_dot_is_slow()) {
    const auto named = [&](const char* name) {
      return std::find_if(sets.begin(), sets.end(), [&](const InstructionSet& set) { return set.name == name; });
    };
    const auto pairs = named("avx512_bf16"), plain = named("avx512");
    if (pairs < plain && plain != sets.end()) std::rotate(pairs, plain, plain + 1);
  }
  const Kernels* best = nullptr;
  for (const InstructionSet& set : sets) {
    if (best == nullptr && runs_here(set)) best = set.vectors;
  }
  std::vector<InstructionSet> tile_sets;
#define ANCHOR_ATTENTION_APPEND_TILES(isa) tile_sets.push_back({isa::kTileKernels.name, best, &isa::kTileKernels});
  ANCHOR_ATTENTION_TILE_ISAS(ANCHOR_ATTENTION_APPEND_TILES)
  sets.insert(sets.begin(), tile_sets.begin(), tile_sets.end());
  return sets;
}

InstructionSet select() {
  const char* variable = std::getenv("ANCHOR_ATTENTION_CPU_ISA");
  const std::string pinned = variable == nullptr ? "" : variable;
  std::string runnable;
  for (const InstructionSet& set : compiled()) {
    if (!runs_here(set)) continue;
    if (pinned.empty() || pinned == set.name) return set;
    runnable += (runnable.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("ANCHOR_ATTENTION_CPU_ISA must be one of " + runnable + " on this machine, got " +
                              pinned);
}

const InstructionSet& selected() {
  static const InstructionSet set = select();
  return set;
}

}  // namespace

const Kernels& selected_kernels() { return *selected().vectors; }

const ProductKernels& selected_products(ScalarType dtype, bool allow_split_float32) {
  const InstructionSet& set = selected();
  if (set.tiles != nullptr && dtype == ScalarType::bfloat16) return set.tiles->bfloat16;
  if (set.tiles != nullptr && dtype == ScalarType::float32 && allow_split_float32) return set.tiles->split_float32;
  return set.vectors->products;
}

const char* selected_instruction_set() { return selected().name.c_str(); }

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : compiled()) names.push_back(set.name);
  return names;
}

std::vector<std::string> runnable_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : compiled()) {
    if (runs_here(set)) names.push_back(set.name);
  }
  return names;
}

}  // namespace anchor_attention::cpu
