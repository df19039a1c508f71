// Copies of the TMA unit between their start and their end.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

// A run of bytes that is contiguous in global memory.
struct BulkRow {
  uint64_t address;
  uint32_t size;
  uint32_t offset;  // within the copy's bytes
};

// To shared memory. It lands when the scheduler says so, and then counts for its mbarrier.
struct BulkLoad {
  uint32_t destination;
  uint32_t mbarrier;
  uint32_t swizzle_mask;
  std::vector<BulkRow> rows;
  std::vector<uint8_t> bytes;  // not swizzled; what no row fills is zero
  int warp;
  int lane;
  int32_t pc;
};

// To global memory. Its source is captured at the start, where it may no longer change, and lands when it is waited
// for.
struct BulkStore {
  uint32_t source;
  uint32_t size;
  std::vector<BulkRow> rows;
  std::vector<uint8_t> bytes;
  bool adds_floats;
  bool has_read = false;
  int lane;
  uint32_t group;
};

}  // namespace emulator
