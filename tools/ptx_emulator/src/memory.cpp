#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace emulator {
namespace {

constexpr uint8_t kPoison = 0;
constexpr uint8_t kWritten = 1;
constexpr uint8_t kCopyPending = 2;
constexpr uint8_t kBulkPending = 3;
constexpr uint8_t kMbarrier = 4;
constexpr uint32_t kAsyncGranule = 16;
constexpr std::array<uint8_t, 16> kAllWritten = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
constexpr uint32_t kSeveralLanes = kWholeWarp + 1;

// Two reads of one word in one epoch: lane << 4 | bytes. A read that does not fit into the record is forgotten, so that
// a record never claims a read that did not happen.
uint32_t merge_reads(uint32_t old, uint32_t read) {
  const uint32_t old_lane = old >> 4 & 63;
  const uint32_t lane = read >> 4 & 63;
  if (old_lane == lane || lane == kWholeWarp) return (old & 0x3ff) | (old_lane == lane ? read & 15 : 0);
  if (old_lane == kWholeWarp || (old & read & 15) == 0) return read;
  return kSeveralLanes << 4 | (old & read & 15);
}

std::string lane_name(int warp, int lane) {
  return lane == kWholeWarp ? "warp " + std::to_string(warp) : "thread " + std::to_string(warp * kLanes + lane);
}

}  // namespace

void raise(FaultKind kind, const std::string& message) {
  Fault fault;
  fault.kind = kind;
  fault.message = message;
  throw fault;
}

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

uint64_t GlobalMemory::add(const std::string& name, uint8_t* data, uint64_t size, bool writable, bool poisoned,
                           bool write_once) {
  if (size >> (kWindowBits - 1)) raise(FaultKind::out_of_bounds, "buffer " + name + " is too large to register");
  GlobalBuffer buffer{name, 0, size, data, writable, write_once, {}};
  if (poisoned) buffer.written.assign(size, 0);
  size_t slot = 0;
  while (slot < buffers_.size() && buffers_[slot].base != 0) ++slot;
  if (slot >= kFirstVariableSlot) raise(FaultKind::out_of_bounds, "too many buffers are registered");
  buffer.base = window_base(slot);
  if (slot == buffers_.size()) {
    buffers_.push_back(std::move(buffer));
  } else {
    buffers_[slot] = std::move(buffer);
  }
  return buffers_[slot].base;
}

void GlobalMemory::remove(uint64_t base) {
  GlobalBuffer* buffer = find(base);
  if (buffer == nullptr) raise(FaultKind::out_of_bounds, "no buffer is registered at " + hex(base));
  *buffer = GlobalBuffer{};
}

void GlobalMemory::place_variable(size_t number, const std::string& name, uint8_t* data, uint64_t size, bool writable) {
  if (variables_.size() <= number) variables_.resize(number + 1);
  variables_[number] = {name, window_base(kFirstVariableSlot + number), size, data, writable, false, {}};
}

GlobalBuffer* GlobalMemory::find(uint64_t address) {
  const uint64_t slot = (address >> kWindowBits) - 1;
  if (slot - kFirstVariableSlot < variables_.size()) return &variables_[slot - kFirstVariableSlot];
  return slot < buffers_.size() && buffers_[slot].base != 0 ? &buffers_[slot] : nullptr;
}

const std::vector<uint8_t>& GlobalMemory::written(uint64_t base) const {
  const GlobalBuffer* buffer = find(base);
  if (buffer == nullptr) raise(FaultKind::out_of_bounds, "no buffer is registered at " + hex(base));
  return buffer->written;
}

bool GlobalMemory::is_writable(uint64_t address) const {
  const GlobalBuffer* buffer = find(address);
  return buffer != nullptr && buffer->writable;
}

std::string GlobalMemory::describe(uint64_t address) const {
  const GlobalBuffer* buffer = find(address);
  if (buffer == nullptr) return "address " + hex(address);
  return "offset " + std::to_string(address - buffer->base) + " of buffer '" + buffer->name + "'";
}

uint8_t* GlobalMemory::access(uint64_t address, uint32_t size, bool is_write) {
  const char* verb = is_write ? "write of " : "read of ";
  if (address % size != 0) {
    raise(FaultKind::misaligned, verb + std::to_string(size) + " bytes at global address " + hex(address) +
                                     " that is not a multiple of " + std::to_string(size));
  }
  return span(address, size, is_write);
}

uint8_t* GlobalMemory::span(uint64_t address, uint32_t size, bool is_write) {
  const char* verb = is_write ? "write of " : "read of ";
  GlobalBuffer* buffer = find(address);
  if (buffer == nullptr) {
    raise(FaultKind::out_of_bounds, verb + std::to_string(size) + " bytes at " + hex(address) + ": no buffer is there");
  }
  const int64_t offset = static_cast<int64_t>(address - buffer->base);
  if (offset < 0 || static_cast<uint64_t>(offset) + size > buffer->size) {
    raise(FaultKind::out_of_bounds, verb + std::to_string(size) + " bytes at offset " + std::to_string(offset) +
                                        " of buffer '" + buffer->name + "' of " + std::to_string(buffer->size) +
                                        " bytes");
  }
  if (is_write) {
    if (!buffer->writable) {
      raise(FaultKind::out_of_bounds,
            "write to the read-only buffer '" + buffer->name + "' at offset " + std::to_string(offset));
    }
    if (!buffer->written.empty()) {
      uint8_t* written = buffer->written.data() + offset;
      if (buffer->write_once && std::find(written, written + size, kWritten) != written + size) {
        raise(FaultKind::race,
              "second write at offset " + std::to_string(offset) + " of the write-once buffer '" + buffer->name + "'");
      }
      std::memset(written, kWritten, size);
    }
  } else if (!buffer->written.empty()) {
    const uint8_t* written = buffer->written.data() + offset;
    if (std::find(written, written + size, kPoison) != written + size) {
      raise(FaultKind::uninitialized, verb + std::to_string(size) + " bytes at offset " + std::to_string(offset) +
                                          " of buffer '" + buffer->name + "' that nothing has written");
    }
  }
  return buffer->data + offset;
}

uint8_t* LocalMemory::access(uint64_t address, uint32_t size, bool is_write) {
  const std::string what = std::string(is_write ? "write of " : "read of ") + std::to_string(size) +
                           " bytes at local address " + std::to_string(address);
  if (address % size != 0) raise(FaultKind::misaligned, what);
  if (address + size > data_.size()) {
    raise(FaultKind::out_of_bounds, what + " of " + std::to_string(data_.size()) + " bytes");
  }
  uint8_t* written = written_.data() + address;
  if (is_write) {
    std::memset(written, kWritten, size);
  } else if (std::find(written, written + size, kPoison) != written + size) {
    raise(FaultKind::uninitialized, what + " that nothing has written");
  }
  return data_.data() + address;
}

SharedMemory::SharedMemory(uint32_t size, int n_warps, Ordering& ordering, bool lax)
    : ordering_(&ordering),
      lax_(lax),
      size_(size),
      data_(size + 4),
      state_(size + 4, kPoison),
      writes_(size / 4 + 1),
      reads_(n_warps, std::vector<uint32_t>(size / 4 + 1)),
      async_readers_(size / kAsyncGranule + 1) {}

uint32_t SharedMemory::check(uint32_t address, uint32_t size) const {
  if (address % size != 0) {
    raise(FaultKind::misaligned, "access of " + std::to_string(size) + " bytes at shared address " +
                                     std::to_string(address) + " that is not a multiple of " + std::to_string(size));
  }
  return check_range(address, size);
}

uint32_t SharedMemory::check_range(uint32_t address, uint32_t size) const {
  if (address < kSharedBase || address - kSharedBase + uint64_t{size} > size_) {
    raise(FaultKind::out_of_bounds, "access of " + std::to_string(size) + " bytes at offset " +
                                        std::to_string(int64_t{address} - kSharedBase) + " of " +
                                        std::to_string(size_) + " bytes of shared memory");
  }
  return address - kSharedBase;
}

void SharedMemory::race(const Accessor& who, bool is_write, uint32_t offset, int warp, int lane, bool was_write) const {
  raise(FaultKind::race, std::string(is_write ? "write" : "read") + " of shared memory at offset " +
                             std::to_string(offset) + " by " + lane_name(who.warp, who.lane) +
                             " is not ordered after the " + (was_write ? "write" : "read") + " by " +
                             author(warp, lane));
}

std::string SharedMemory::author(int warp, int lane) const {
  if (warp < static_cast<int>(reads_.size())) return lane_name(warp, lane);
  return "a bulk copy, whose mbarrier was not waited for";
}

void SharedMemory::require_written(uint32_t offset, uint32_t size) const {
  const uint8_t* state = state_.data() + offset;
  const uint8_t* missing = std::find_if(state, state + size, [](uint8_t s) { return s != kWritten; });
  if (missing == state + size) return;
  constexpr const char* kWhy[] = {" that nothing has written", "", " before the cp.async that writes it was waited for",
                                  " before the bulk copy that writes it has completed", " that belongs to an mbarrier"};
  raise(FaultKind::uninitialized, "read of " + std::to_string(size) + " bytes of shared memory at offset " +
                                      std::to_string(offset) + kWhy[*missing]);
}

void SharedMemory::require_idle(const Accessor& who, uint32_t offset, uint32_t size, const char* what) const {
  const uint8_t* state = state_.data() + offset;
  const uint8_t* busy = std::find_if(state, state + size, [](uint8_t s) { return s > kWritten; });
  const char* why = nullptr;
  if (busy != state + size) {
    why = *busy == kCopyPending   ? " while a cp.async writes it"
          : *busy == kBulkPending ? " while a bulk copy writes it"
                                  : " that belongs to an mbarrier";
  } else if (n_async_reads_ != 0) {
    const auto first = async_readers_.begin() + offset / kAsyncGranule;
    const auto last = async_readers_.begin() + (offset + size - 1) / kAsyncGranule + 1;
    if (std::any_of(first, last, [](uint16_t n) { return n != 0; })) {
      why = " while a wgmma or bulk store that was not waited for may still read it";
    }
  }
  if (why == nullptr) return;
  raise(FaultKind::race, std::string(what) + " shared memory at offset " + std::to_string(offset) + " by " +
                             lane_name(who.warp, who.lane) + why);
}

void SharedMemory::require_proxy_fence(const Accessor& who, uint32_t offset, uint32_t size, const char* what) const {
  if (lax_) return;
  WriteRecord last{};
  for (uint32_t word = offset / 4; word <= (offset + size - 1) / 4; ++word) {
    const WriteRecord& write = writes_[word];
    if (write.bytes == 0 || write.warp >= reads_.size()) continue;
    if (write.epoch == last.epoch && write.warp == last.warp && write.lane == last.lane) continue;
    last = write;
    if (ordering_->reaches_async_proxy(who.warp, write.warp, write.lane, write.epoch, ProxyFence::async)) continue;
    raise(FaultKind::race, std::string(what) + " shared memory at offset " + std::to_string(4 * word) + ", which " +
                               lane_name(write.warp, write.lane) +
                               " wrote without a fence.proxy.async before the barrier");
  }
}

void SharedMemory::check_race_on_read(const Accessor& who, uint32_t offset, uint32_t size) {
  const Clock& seen = ordering_->clock(who.warp);
  const uint32_t epoch = seen.local[who.warp];
  uint32_t* reads = reads_[who.warp].data();
  const uint32_t last = (offset + size - 1) / 4;
  for (uint32_t word = offset / 4; word <= last; ++word) {
    const uint32_t bytes = size % 4 == 0 ? 15 : word_bytes(offset, size, word);
    const WriteRecord& write = writes_[word];
    if ((write.bytes & bytes) != 0 && !(who.strong && write.strong)) {
      const bool ordered = write.warp == who.warp ? write.epoch < epoch || write.lane == who.lane
                                                  : seen.covers(write.warp, write.lane, write.epoch);
      if (!ordered) race(who, false, offset, write.warp, write.lane, true);
    }
    // A strong read is not recorded: what may follow it is ordered by release and acquire.
    if (who.strong) continue;
    const uint32_t old = reads[word];
    const uint32_t read = static_cast<uint32_t>(who.lane) << 4 | bytes;
    reads[word] = epoch << 10 | (old >> 10 == epoch ? merge_reads(old, read) : read);
  }
}

void SharedMemory::check_race_on_write(const Accessor& who, uint32_t offset, uint32_t size, const uint8_t* bytes) {
  const Clock& seen = ordering_->clock(who.warp);
  const uint32_t epoch = seen.local[who.warp];
  for (uint32_t word = offset / 4; word <= (offset + size - 1) / 4; ++word) {
    const uint32_t mask = word_bytes(offset, size, word);
    WriteRecord& write = writes_[word];
    if ((write.bytes & mask) != 0 && !(who.strong && write.strong)) {
      // Lanes that write the same value to one place agree on the result; where rules are lax, warps that do so, too.
      const auto same = [&] { return bytes != nullptr && std::memcmp(data_.data() + offset, bytes, size) == 0; };
      if (write.warp != who.warp) {
        const bool ordered = seen.covers(write.warp, write.lane, write.epoch);
        if (!ordered && !(lax_ && same())) race(who, true, offset, write.warp, write.lane, true);
      } else if (write.epoch == epoch && write.lane != who.lane && write.lane != kWholeWarp) {
        if (!same()) race(who, true, offset, write.warp, write.lane, true);
      }
    }
    for (int warp = 0; warp < static_cast<int>(reads_.size()); ++warp) {
      const uint32_t read = reads_[warp][word];
      if ((read & mask) == 0) continue;
      const int lane = static_cast<int>(read >> 4 & 63);
      if (warp != who.warp) {
        if (!seen.covers(warp, lane, read >> 10)) race(who, true, offset, warp, std::min(lane, kWholeWarp), false);
      } else if (read >> 10 == epoch && lane != who.lane && lane != kWholeWarp) {
        race(who, true, offset, warp, std::min(lane, kWholeWarp), false);
      }
    }
    const bool same_author = write.bytes != 0 && write.warp == who.warp && write.lane == who.lane &&
                             write.epoch == epoch && write.strong == who.strong;
    write = {epoch, static_cast<uint8_t>(who.warp), static_cast<uint8_t>(who.lane),
             static_cast<uint8_t>(same_author ? write.bytes | mask : mask), who.strong};
  }
}

const uint8_t* SharedMemory::read(const Accessor& who, uint32_t address, uint32_t size) {
  const uint32_t offset = check(address, size);
  if (std::memcmp(state_.data() + offset, kAllWritten.data(), size) != 0) require_written(offset, size);
  check_race_on_read(who, offset, size);
  return data_.data() + offset;
}

void SharedMemory::write(const Accessor& who, uint32_t address, uint32_t size, const uint8_t* bytes) {
  const uint32_t offset = check(address, size);
  require_idle(who, offset, size, "write of");
  check_race_on_write(who, offset, size, bytes);
  std::memset(state_.data() + offset, kWritten, size);
  std::memcpy(data_.data() + offset, bytes, size);
}

void SharedMemory::begin_copy(const Accessor& who, uint32_t address, uint32_t size) {
  const uint32_t offset = check(address, size);
  require_idle(who, offset, size, "cp.async to");
  check_race_on_write(who, offset, size, nullptr);
  std::memset(state_.data() + offset, kCopyPending, size);
}

void SharedMemory::finish_copy(const Accessor& who, uint32_t address, uint32_t size, const uint8_t* bytes) {
  const uint32_t offset = address - kSharedBase;
  std::memset(state_.data() + offset, kPoison, size);
  write(who, address, size, bytes);
}

const uint8_t* SharedMemory::begin_async_read(const Accessor& who, uint32_t address, uint32_t size) {
  const uint32_t offset = check_range(address, size);
  require_written(offset, size);
  const Clock& seen = ordering_->clock(who.warp);
  for (uint32_t word = offset / 4; word < (offset + size) / 4; ++word) {
    const WriteRecord& write = writes_[word];
    if (write.bytes == 0) continue;
    const bool ordered = write.warp == who.warp ? write.epoch < seen.local[who.warp] || write.lane == who.lane
                                                : seen.covers(write.warp, write.lane, write.epoch);
    if (!ordered) race(who, false, 4 * word, write.warp, write.lane, true);
  }
  require_proxy_fence(who, offset, size, "asynchronous read of");
  for (uint32_t granule = offset / kAsyncGranule; granule < (offset + size) / kAsyncGranule; ++granule) {
    ++async_readers_[granule];
  }
  ++n_async_reads_;
  return data_.data() + offset;
}

void SharedMemory::end_async_read(const Accessor& who, uint32_t address, uint32_t size) {
  const uint32_t offset = address - kSharedBase;
  for (uint32_t granule = offset / kAsyncGranule; granule < (offset + size) / kAsyncGranule; ++granule) {
    --async_readers_[granule];
  }
  --n_async_reads_;
  const uint32_t record = ordering_->epoch(who.warp) << 10 | static_cast<uint32_t>(who.lane) << 4 | 15;
  std::fill_n(reads_[who.warp].begin() + offset / 4, size / 4, record);
}

void SharedMemory::begin_bulk_copy(const Accessor& who, uint32_t address, uint32_t size) {
  const uint32_t offset = check_range(address, size);
  require_idle(who, offset, size, "bulk copy to");
  require_proxy_fence(who, offset, size, "bulk copy to");
  check_race_on_write(who, offset, size, nullptr);
  std::memset(state_.data() + offset, kBulkPending, size);
}

void SharedMemory::finish_bulk_copy(int agent, uint32_t epoch, uint32_t address, uint32_t size, const uint8_t* bytes) {
  const uint32_t offset = address - kSharedBase;
  std::memset(state_.data() + offset, kWritten, size);
  std::memcpy(data_.data() + offset, bytes, size);
  std::fill_n(writes_.begin() + offset / 4, size / 4,
              WriteRecord{epoch, static_cast<uint8_t>(agent), kWholeWarp, 15, false});
}

void SharedMemory::place_mbarrier(const Accessor& who, uint32_t address) {
  const uint32_t offset = check(address, 8);
  require_idle(who, offset, 8, "mbarrier.init in");
  check_race_on_write(who, offset, 8, nullptr);
  std::memset(state_.data() + offset, kMbarrier, 8);
}

void SharedMemory::remove_mbarrier(const Accessor& who, uint32_t address) {
  const uint32_t offset = address - kSharedBase;
  check_race_on_write(who, offset, 8, nullptr);
  std::memset(state_.data() + offset, kPoison, 8);
}

}  // namespace emulator
