// wgmma and setmaxnreg: what four consecutive warps execute together.
//
// A warp computes its 16 rows when it issues the instruction. Nobody may look before the wait: registers and shared
// memory that the instruction uses are marked until then, so that it does not matter when the hardware does it.
#include "warpgroup.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "access.h"
#include "floating.h"
#include "lanewise.h"

namespace emulator {
namespace {

constexpr int kWarpsPerGroup = 4;
constexpr int kRows = 16;              // of D per warp
constexpr int kInstructionBytes = 32;  // of A and B along K
constexpr uint32_t kGranule = 16;
constexpr int kBlock = 8;

using Doubles = double __attribute__((vector_size(kBlock * sizeof(double))));
using Longs = int64_t __attribute__((vector_size(kBlock * sizeof(int64_t))));
using Floats = float __attribute__((vector_size(kBlock * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kBlock * sizeof(int32_t))));

struct Tf32 {
  static constexpr int kBytes = 4;
  static float load(const uint8_t* bytes) {
    uint32_t bits;
    std::memcpy(&bits, bytes, sizeof bits);
    return part(bits, 0);
  }
  // The hardware ignores the 13 low bits.
  static float part(uint32_t bits, int) { return std::bit_cast<float>(bits & ~uint32_t{0x1fff}); }
};

template <class T>
struct Sixteen {
  static constexpr int kBytes = 2;
  static float load(const uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return to_float(value);
  }
  static float part(uint32_t bits, int i) { return to_float(T{static_cast<uint16_t>(bits >> 16 * i)}); }
};

void execute_together(Warp& warp, uint64_t arguments) {
  Block& block = *warp.block;
  Warpgroup& group = block.warpgroups[warp.index / kWarpsPerGroup];
  const size_t first = warp.index / kWarpsPerGroup * kWarpsPerGroup;
  if (block.warps.size() < first + kWarpsPerGroup) {
    raise(FaultKind::divergence,
          "an instruction of a warpgroup in a block whose last warpgroup has fewer than 4 warps");
  }
  const uint32_t position = warp.warpgroup.n_steps++;
  if (position == group.steps.size()) {
    for (size_t i = first; i < first + kWarpsPerGroup; ++i) {
      if (!block.warps[i]->finished) continue;
      raise(FaultKind::divergence, "an instruction of a warpgroup whose warp " + std::to_string(i) + " has exited");
    }
    group.steps.push_back({warp.pc, arguments});
    return;
  }
  const Warpgroup::Step& step = group.steps[position];
  if (step.pc == warp.pc && step.arguments == arguments) return;
  raise(FaultKind::divergence, step.pc == warp.pc
                                   ? "the warps of a warpgroup disagree on the arguments of an instruction"
                                   : "another warp of the warpgroup executes {pc" + std::to_string(step.pc) +
                                         "} in place of this instruction");
}

// A matrix in shared memory, as the 64-bit descriptor says.
class SharedMatrix {
 public:
  SharedMatrix(uint64_t descriptor, bool transposed) : transposed_(transposed) {
    start_ = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    leading_ = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    stride_ = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) {
      raise(FaultKind::unsupported, "wgmma matrix descriptor " + hex(descriptor) + " with a base offset");
    }
    // 0: none, 1: 128 bytes, 2: 64, 3: 32.
    const auto mode = static_cast<uint32_t>(descriptor >> 62);
    width_ = mode == 0 ? 1 : 16u >> mode;
    mask_ = width_ - 1;
  }

  // Address of the 16 bytes that begin at element `row` (of M or N) and byte `byte` along K; transposed, at element
  // `row`, a multiple of 8, and element `k` of K. `row` runs over 8 rows, then over groups of them.
  uint32_t along_k(uint32_t row, uint32_t chunk) const {
    const uint32_t pitch = width_ * kGranule;
    return swizzle(start_ + row % 8 * pitch + row / 8 * stride_ + chunk * (width_ == 1 ? leading_ : kGranule));
  }
  uint32_t along_rows(uint32_t row, uint32_t k) const {
    const uint32_t chunk = row / 8;
    if (width_ == 1) return start_ + chunk * stride_ + k % 8 * kGranule + k / 8 * leading_;
    return swizzle(start_ + chunk % width_ * kGranule + chunk / width_ * leading_ + k % 8 * width_ * kGranule +
                   k / 8 * stride_);
  }
  bool transposed() const { return transposed_; }

 private:
  uint32_t swizzle(uint32_t address) const { return address ^ ((address >> 7 & mask_) << 4); }

  bool transposed_;
  uint32_t start_;
  uint32_t leading_;
  uint32_t stride_;
  uint32_t width_;  // of the swizzled lines, in granules
  uint32_t mask_;
};

// Reads 16 bytes that must not change before the wait.
const uint8_t* read_async(Warp& warp, uint32_t address) {
  warp.warpgroup.reads.push_back({warp.warpgroup.committed + 1, address, kGranule});
  try {
    return warp.block->shared.begin_async_read({warp.index, kWholeWarp, false}, address, kGranule);
  } catch (const Fault&) {
    warp.warpgroup.reads.pop_back();
    throw;
  }
}

// Calls set(row, k, value) for rows from `first` on.
template <class Type, class F>
void read_matrix(Warp& warp, const SharedMatrix& matrix, uint32_t first, uint32_t n_rows, F set) {
  constexpr int kPerGranule = kGranule / Type::kBytes;
  if (matrix.transposed()) {
    for (uint32_t k = 0; k < kInstructionBytes / Type::kBytes; ++k) {
      for (uint32_t row = 0; row < n_rows; row += kPerGranule) {
        const uint8_t* bytes = read_async(warp, matrix.along_rows(first + row, k));
        for (int i = 0; i < kPerGranule; ++i) set(row + i, k, Type::load(bytes + i * Type::kBytes));
      }
    }
    return;
  }
  for (uint32_t row = 0; row < n_rows; ++row) {
    for (uint32_t chunk = 0; chunk < kInstructionBytes / kGranule; ++chunk) {
      const uint8_t* bytes = read_async(warp, matrix.along_k(first + row, chunk));
      for (int i = 0; i < kPerGranule; ++i) set(row, chunk * kPerGranule + i, Type::load(bytes + i * Type::kBytes));
    }
  }
}

// Rounds toward zero.
Floats truncated(Doubles x) {
  constexpr int64_t kMagnitude = INT64_MAX;
  const Floats nearest = __builtin_convertvector(x, Floats);
  const auto magnitude = [](Doubles y) { return std::bit_cast<Doubles>(std::bit_cast<Longs>(y) & kMagnitude); };
  const Doubles back = magnitude(__builtin_convertvector(nearest, Doubles));
  const Longs away = (back > magnitude(x)) & (back != std::numeric_limits<double>::infinity());
  // A true comparison is −1: one step toward zero.
  return std::bit_cast<Floats>(std::bit_cast<Ints>(nearest) + __builtin_convertvector(away, Ints));
}

bool in_flight(const WarpgroupState& state, const AsyncRegister& r) { return r.group > state.completed; }

void use_operand(Warp& warp, int32_t row) {
  WarpgroupState& state = warp.warpgroup;
  AsyncRegister& r = state.registers[row];
  if (r.touched_at == state.fences + 1) {
    raise(FaultKind::race, "wgmma reads a register that was accessed without a wgmma.fence in between");
  }
  if (in_flight(state, r) && r.shape != 0) {
    raise(FaultKind::race, "wgmma reads a register that an earlier wgmma, not waited for, accumulates in");
  }
  r.group = state.committed + 1;
  r.shape = 0;
}

void use_accumulator(Warp& warp, int32_t row, int64_t shape) {
  WarpgroupState& state = warp.warpgroup;
  AsyncRegister& r = state.registers[row];
  if (r.touched_at == state.fences + 1) {
    raise(FaultKind::race, "wgmma accumulates in a register that was accessed without a wgmma.fence in between");
  }
  if (in_flight(state, r) && r.shape != shape) {
    raise(FaultKind::race,
          "wgmma accumulates in a register that an earlier wgmma of another shape, not waited for, uses");
  }
  r.group = state.committed + 1;
  r.shape = shape;
}

// Operands: D, A (four registers or a descriptor), B's descriptor, scale-d, and the signs of A and B; for 16-bit types
// also whether the matrices in shared memory are transposed. Variant: N.
template <class Type>
void multiply_async(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  constexpr int kDepth = kInstructionBytes / Type::kBytes;
  constexpr int kPerRegister = 4 / Type::kBytes;
  const auto n = static_cast<int>(in.variant);
  const int n_blocks = n / kBlock;
  const int32_t* rows_d = in.operand.data();
  const int32_t* rows_a = rows_d + n / 2;
  const bool a_in_registers = in.n_operands - n / 2 >= 8;
  const int32_t* rest = rows_a + (a_in_registers ? 4 : 1);
  const uint64_t descriptor_a = a_in_registers ? 0 : warp.row64(rows_a[0])[0];
  const uint64_t descriptor_b = warp.row64(rest[0])[0];
  const Mask scale_d = warp.predicate(rest[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool same = warp.row64(rest[0])[lane] == descriptor_b && (scale_d >> lane & 1) == (scale_d & 1) &&
                      (a_in_registers || warp.row64(rows_a[0])[lane] == descriptor_a);
    warp.lane = lane;
    if (!same) raise(FaultKind::divergence, "the threads of a warp disagree on the arguments of wgmma");
  }
  warp.lane = -1;
  if (warp.launch->options.lists_products) {
    warp.launch->products.push_back(
        {static_cast<uint64_t>(warp.index), static_cast<uint64_t>(warp.pc), descriptor_a, descriptor_b});
  }
  const double sign = rest[2] * rest[3];
  constexpr bool kTransposes = Type::kBytes == 2;
  const bool transposed_a = kTransposes && !a_in_registers && rest[4] != 0;
  const bool transposed_b = kTransposes && rest[a_in_registers ? 4 : 5] != 0;
  execute_together(warp, (descriptor_a * 0x9e3779b97f4a7c15 ^ descriptor_b) << 1 | (scale_d & 1));
  if (warp.warpgroup.fences == 0) raise(FaultKind::race, "the first wgmma comes without a wgmma.fence");
  warp.warpgroup.has_uncommitted = true;

  alignas(64) double a[kRows][kDepth];
  if (a_in_registers) {
    for (int i = 0; i < 4; ++i) {
      use_operand(warp, rows_a[i]);
      const uint32_t* source = warp.row32(rows_a[i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int j = 0; j < kPerRegister; ++j) {
          a[lane / 4 + i % 2 * 8][lane % 4 * kPerRegister + i / 2 * 4 * kPerRegister + j] = Type::part(source[lane], j);
        }
      }
    }
  } else {
    const auto first = static_cast<uint32_t>(warp.index % kWarpsPerGroup * kRows);
    read_matrix<Type>(warp, SharedMatrix(descriptor_a, transposed_a), first, kRows,
                      [&](uint32_t row, uint32_t k, float value) { a[row][k] = value; });
  }
  alignas(64) double b[kDepth][256];
  read_matrix<Type>(warp, SharedMatrix(descriptor_b, transposed_b), 0, n,
                    [&](uint32_t column, uint32_t k, float value) { b[k][column] = value; });

  alignas(64) float sum[kRows][256];
  for (int i = 0; i < n / 2; ++i) {
    use_accumulator(warp, rows_d[i], in.variant << 8 | kDepth);
    const uint32_t* source = warp.row32(rows_d[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      sum[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] =
          scale_d != 0 ? std::bit_cast<float>(source[lane]) : 0.0f;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int block = 0; block < n_blocks; ++block) {
      Floats& element = *reinterpret_cast<Floats*>(&sum[row][block * kBlock]);
      Doubles total = __builtin_convertvector(element, Doubles);
      for (int k = 0; k < kDepth; ++k) {
        total += sign * a[row][k] * *reinterpret_cast<const Doubles*>(&b[k][block * kBlock]);
      }
      element = truncated(total);
    }
  }
  for (int i = 0; i < n / 2; ++i) {
    uint32_t* destination = warp.row32(rows_d[i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const float element = sum[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
      destination[lane] = std::bit_cast<uint32_t>(canonical(element));
    }
  }
}

void fence(Warp& warp, const Instruction&) {
  if (!warp.converge(kFullMask)) return;
  execute_together(warp, 0);
  ++warp.warpgroup.fences;
}

void commit_group(Warp& warp, const Instruction&) {
  if (!warp.converge(kFullMask)) return;
  execute_together(warp, 0);
  ++warp.warpgroup.committed;
  warp.warpgroup.has_uncommitted = false;
}

void wait_group(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  const uint32_t pending = warp.row32(in.operand[0])[0];
  execute_together(warp, pending);
  WarpgroupState& state = warp.warpgroup;
  if (pending < state.committed) state.completed = std::max(state.completed, state.committed - pending);
  std::erase_if(state.reads, [&](const AsyncRead& read) {
    if (read.group > state.completed) return false;
    warp.block->shared.end_async_read({warp.index, kWholeWarp, false}, read.address, read.size);
    return true;
  });
  warp.block->ordering.synchronise(warp.index);
  warp.launch->progress();
}

// Variant 1: increases.
void set_register_limit(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  Block& block = *warp.block;
  const uint32_t limit = warp.row32(in.operand[0])[0];
  const uint32_t old = warp.warpgroup.register_limit;
  if (old == 0) {
    raise(FaultKind::divergence,
          "setmaxnreg in a kernel without launch bounds, whose number of registers is not known");
  }
  const bool increases = in.variant == 1;
  if (increases ? limit < old : limit > old) {
    raise(FaultKind::divergence, std::string("setmaxnreg.") + (increases ? "inc" : "dec") + " from " +
                                     std::to_string(old) + " to " + std::to_string(limit) + " registers");
  }
  const uint32_t difference = (increases ? limit - old : old - limit) * kLanes;
  if (increases && difference > block.free_registers) {
    warp.next_pc = warp.pc;
    warp.doze(Sleep::registers, 0);
    return;
  }
  execute_together(warp, limit);
  warp.warpgroup.register_limit = limit;
  if (increases) {
    block.free_registers -= difference;
  } else {
    block.free_registers += difference;
    block.wake(Sleep::registers, 0);
  }
  warp.launch->progress();
}

}  // namespace

void track_registers(Warp& warp, const Instruction& in) {
  WarpgroupState& state = warp.warpgroup;
  if (in.is_move) {
    // A copy that the compiler makes takes part in what its source is in: the assembler gives both one register.
    state.registers[in.tracked[1] >> 1] = state.registers[in.tracked[0] >> 1];
    return;
  }
  for (const int32_t entry : in.tracked) {
    AsyncRegister& r = state.registers[entry >> 1];
    const bool writes = (entry & 1) != 0;
    if (in_flight(state, r) && (writes || r.shape != 0)) {
      raise(FaultKind::race, std::string(writes ? "write" : "read") + " of a register that " +
                                 (r.shape != 0 ? "a wgmma accumulates in" : "a wgmma reads") +
                                 " and that no wgmma.wait_group has released");
    }
    r.touched_at = state.fences + 1;
  }
}

void finish_warpgroup(Warp& warp) {
  const WarpgroupState& state = warp.warpgroup;
  if (state.has_uncommitted || state.completed < state.committed) {
    raise(FaultKind::race, "a warp ends while its wgmma was not waited for");
  }
  const Warpgroup& group = warp.block->warpgroups[warp.index / kWarpsPerGroup];
  if (state.n_steps < group.steps.size()) {
    raise(FaultKind::divergence, "a warp ends without executing {pc" + std::to_string(group.steps[state.n_steps].pc) +
                                     "}, which its warpgroup executes together");
  }
}

void register_warpgroup(Registry& r) {
  for (int n = 8; n <= 256; n += 8) {
    const std::string shape = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n);
    r[shape + "k16.f32.bf16.bf16"] = {&multiply_async<Sixteen<Bfloat>>, n};
    r[shape + "k16.f32.f16.f16"] = {&multiply_async<Sixteen<Half>>, n};
    r[shape + "k8.f32.tf32.tf32"] = {&multiply_async<Tf32>, n};
  }
  r["wgmma.fence.sync.aligned"] = {&fence, 0};
  r["wgmma.commit_group.sync.aligned"] = {&commit_group, 0};
  r["wgmma.wait_group.sync.aligned"] = {&wait_group, 0};
  r["setmaxnreg.dec.sync.aligned.u32"] = {&set_register_limit, 0};
  r["setmaxnreg.inc.sync.aligned.u32"] = {&set_register_limit, 1};
}

}  // namespace emulator
