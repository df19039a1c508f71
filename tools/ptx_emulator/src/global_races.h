// Races on global memory within one launch: accesses of the same bytes by threads that nothing orders.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace emulator {

class GlobalRaces {
 public:
  explicit GlobalRaces(const GlobalMemory& memory) : memory_(&memory) {}
  // clock: what the access is ordered after; epoch: the warp's.
  void read(const Accessor& who, const Clock& clock, uint32_t epoch, uint64_t address, uint32_t size);
  // `unchanged`: the bytes are there already, which lanes of one warp may all write.
  void write(const Accessor& who, const Clock& clock, uint32_t epoch, uint64_t address, uint32_t size, bool unchanged);

 private:
  struct Access {
    uint64_t block;
    uint32_t epoch;
    uint8_t warp;
    uint8_t lane;
    uint8_t bytes;  // of the word; 0: none
    uint8_t strong;
  };
  struct Word {
    Access write{};
    Access read{};  // further reads that nothing orders with this one are in more_reads_
  };
  static constexpr uint64_t kWordsPerPage = 256;
  using Page = std::array<Word, kWordsPerPage>;

  Word& word(uint64_t number);
  static Access access(const Accessor& who, const Clock& clock, uint32_t epoch, uint32_t bytes);
  static bool ordered(const Access& before, const Access& now, const Clock& clock);
  [[noreturn]] void race(const Access& before, bool was_write, const Access& now, bool is_write,
                         uint64_t address) const;

  const GlobalMemory* memory_;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  uint64_t last_page_number_ = ~uint64_t{0};
  Page* last_page_ = nullptr;
  std::unordered_map<uint64_t, std::vector<Access>> more_reads_;
};

}  // namespace emulator
