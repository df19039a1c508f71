// What a warpgroup executes together, and the registers that wgmma uses while the warps go on.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

struct Warp;
struct Instruction;

// One register row of a warp. Groups count from 1.
struct AsyncRegister {
  uint32_t touched_at = 0;  // number of the wgmma.fence that the last access came after
  uint32_t group = 0;       // the last wgmma group that uses it
  int64_t shape = 0;        // of the accumulator; 0 for an operand
};

struct AsyncRead {
  uint32_t group;
  uint32_t address;
  uint32_t size;
};

struct WarpgroupState {  // per warp
  std::vector<AsyncRegister> registers;
  std::vector<AsyncRead> reads;
  uint32_t fences = 0;
  uint32_t committed = 0;
  uint32_t completed = 0;
  bool has_uncommitted = false;
  uint32_t n_steps = 0;  // collective instructions of the warpgroup that this warp has executed
  uint32_t register_limit = 0;
};

// The sequence of collective instructions that the first of four warps to come sets, and the others must follow.
struct Warpgroup {
  struct Step {
    int32_t pc;
    uint64_t arguments;
  };
  std::vector<Step> steps;
};

// An instruction other than wgmma touches registers that wgmma uses.
void track_registers(Warp& warp, const Instruction& in);
// At the end of a warp.
void finish_warpgroup(Warp& warp);

}  // namespace emulator
