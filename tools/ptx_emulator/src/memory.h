// Global, shared and local memory with what a GPU does not keep: which bytes have been written, and by whom.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "ordering.h"

namespace emulator {

constexpr int kLanes = 32;
using Mask = uint32_t;
constexpr Mask kFullMask = ~Mask{0};

enum class FaultKind : int {
  race,
  out_of_bounds,
  uninitialized,
  misaligned,
  deadlock,
  divergence,
  trap,
  unsupported,
  mbarrier
};

struct Fault {
  FaultKind kind;
  std::string message;
  std::array<uint32_t, 3> block{};
  int warp = -1;
  int lane = -1;
  int32_t pc = -1;
};

// A buffer's window of addresses leaves half of its span before and behind it free, so that an overrun still names it.
constexpr int kWindowBits = 36;
constexpr uint64_t kFirstVariableSlot = 1 << 15;
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{2} << 56;
constexpr uint64_t kConstWindow = uint64_t{3} << 56;
constexpr uint64_t kParamWindow = uint64_t{4} << 56;
constexpr uint64_t kWindowMask = uint64_t{0xff} << 56;
// The first KiB of shared memory belongs to the system, as on the hardware.
constexpr uint32_t kSharedBase = 1024;

// The address of a buffer's first byte.
constexpr uint64_t window_base(uint64_t slot) {
  return ((slot + 1) << kWindowBits) + (uint64_t{1} << (kWindowBits - 2));
}

struct GlobalBuffer {
  std::string name;
  uint64_t base;
  uint64_t size;
  uint8_t* data;
  bool writable;
  bool write_once;               // a second write to a byte is a race: no order decides which one stays
  std::vector<uint8_t> written;  // per byte; empty when the whole buffer is initialised
};

class GlobalMemory {
 public:
  // The address of data[0].
  uint64_t add(const std::string& name, uint8_t* data, uint64_t size, bool writable, bool poisoned, bool write_once);
  // Bytes of the access, checked; faults carry no place yet.
  uint8_t* access(uint64_t address, uint32_t size, bool is_write);
  // The same without a demand on the address: the rows of a bulk copy.
  uint8_t* span(uint64_t address, uint32_t size, bool is_write);
  const std::vector<uint8_t>& written(uint64_t base) const;
  bool is_writable(uint64_t address) const;
  // "offset 8 of buffer 'x'"
  std::string describe(uint64_t address) const;
  void remove(uint64_t base);
  // Variables of a module live at addresses that are known before any launch.
  void place_variable(size_t number, const std::string& name, uint8_t* data, uint64_t size, bool writable);
  void forget_variables() { variables_.clear(); }

 private:
  GlobalBuffer* find(uint64_t address);
  const GlobalBuffer* find(uint64_t address) const { return const_cast<GlobalMemory*>(this)->find(address); }
  std::vector<GlobalBuffer> buffers_;
  std::vector<GlobalBuffer> variables_;
};

// Who accesses: a lane of a warp, or a whole warp at once (`ldmatrix`), whose lanes cannot race with each other.
struct Accessor {
  int warp;
  int lane;
  bool strong;  // volatile, relaxed, acquire, release or atomic: may meet another strong access
};
constexpr int kWholeWarp = 32;
// Read records keep 22 bits of an epoch.
constexpr uint32_t kMaxEpoch = (1u << 22) - 1;

// Which bytes of a 4-byte word an access touches, as a mask.
inline uint32_t word_bytes(uint64_t address, uint32_t size, uint64_t word) {
  const uint64_t begin = address > word * 4 ? address - word * 4 : 0;
  const uint64_t end = address + size < word * 4 + 4 ? address + size - word * 4 : 4;
  return ((1u << end) - 1) & ~((1u << begin) - 1);
}

class SharedMemory {
 public:
  SharedMemory(uint32_t size, int n_warps, Ordering& ordering, bool lax);
  // Addresses are byte addresses of the shared window, from kSharedBase on.
  const uint8_t* read(const Accessor& who, uint32_t address, uint32_t size);
  void write(const Accessor& who, uint32_t address, uint32_t size, const uint8_t* bytes);
  // The two ends of a cp.async: the destination belongs to the copy in between.
  void begin_copy(const Accessor& who, uint32_t address, uint32_t size);
  void finish_copy(const Accessor& who, uint32_t address, uint32_t size, const uint8_t* bytes);

  // Asynchronous reads (wgmma, bulk stores): what is being read may not be written until their end.
  const uint8_t* begin_async_read(const Accessor& who, uint32_t address, uint32_t size);
  void end_async_read(const Accessor& who, uint32_t address, uint32_t size);
  // The two ends of a bulk copy. Its author is an agent: who reads must know of that epoch of it.
  void begin_bulk_copy(const Accessor& who, uint32_t address, uint32_t size);
  void finish_bulk_copy(int agent, uint32_t epoch, uint32_t address, uint32_t size, const uint8_t* bytes);
  // The 8 bytes of an mbarrier belong to it between the two.
  void place_mbarrier(const Accessor& who, uint32_t address);
  void remove_mbarrier(const Accessor& who, uint32_t address);

 private:
  struct WriteRecord {
    uint32_t epoch;
    uint8_t warp;  // or agent
    uint8_t lane;
    uint8_t bytes;  // of the word; 0 when there is no record
    uint8_t strong;
  };

  uint32_t check(uint32_t address, uint32_t size) const;
  uint32_t check_range(uint32_t address, uint32_t size) const;
  void require_written(uint32_t offset, uint32_t size) const;
  void require_idle(const Accessor& who, uint32_t offset, uint32_t size, const char* what) const;
  void require_proxy_fence(const Accessor& who, uint32_t offset, uint32_t size, const char* what) const;
  std::string author(int warp, int lane) const;
  void check_race_on_read(const Accessor& who, uint32_t offset, uint32_t size);
  void check_race_on_write(const Accessor& who, uint32_t offset, uint32_t size, const uint8_t* bytes);
  [[noreturn]] void race(const Accessor& who, bool is_write, uint32_t offset, int warp, int lane, bool was_write) const;

  Ordering* ordering_;
  bool lax_;
  uint32_t size_;
  std::vector<uint8_t> data_;
  std::vector<uint8_t> state_;
  std::vector<WriteRecord> writes_;           // per word
  std::vector<std::vector<uint32_t>> reads_;  // per warp and word: epoch << 10 | lane << 4 | bytes
  std::vector<uint16_t> async_readers_;       // per 16 bytes
  uint64_t n_async_reads_ = 0;
};

class LocalMemory {
 public:
  explicit LocalMemory(uint32_t size) : data_(size), written_(size) {}
  uint8_t* access(uint64_t address, uint32_t size, bool is_write);

 private:
  std::vector<uint8_t> data_;
  std::vector<uint8_t> written_;
};

[[noreturn]] void raise(FaultKind kind, const std::string& message);
std::string hex(uint64_t value);

}  // namespace emulator
