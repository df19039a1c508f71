// ld, st, atom, red.
#include <algorithm>
#include <bit>
#include <cstring>

#include "access.h"
#include "floating.h"

namespace emulator {

void Request::shared(uint32_t address, uint32_t size, int lane) {
  shared_size_ = size;
  shared_lanes_ |= 1u << lane;
  shared_address_[lane] = address;
}

void Request::global(uint64_t address, uint32_t size) {
  for (uint64_t sector = address / 32; sector <= (address + size - 1) / 32; ++sector) {
    if (std::find(sectors_.begin(), sectors_.begin() + n_sectors_, sector) == sectors_.begin() + n_sectors_) {
      sectors_[n_sectors_++] = sector;
    }
  }
}

// The number of different words that the busiest bank delivers.
uint32_t Request::count_wavefronts(int first_lane, int n_lanes) const {
  std::array<uint8_t, 32> depth{};
  std::array<std::array<uint32_t, 32>, 32> words;
  uint32_t wavefronts = 0;
  for (int lane = first_lane; lane < first_lane + n_lanes; ++lane) {
    if (!(shared_lanes_ >> lane & 1)) continue;
    const uint32_t end = (shared_address_[lane] + shared_size_ + 3) / 4;
    for (uint32_t word = shared_address_[lane] / 4; word < end; ++word) {
      const uint32_t bank = word % 32;
      auto& in_bank = words[bank];
      if (std::find(in_bank.begin(), in_bank.begin() + depth[bank], word) != in_bank.begin() + depth[bank]) continue;
      in_bank[depth[bank]++] = word;
      wavefronts = std::max<uint32_t>(wavefronts, depth[bank]);
    }
  }
  return wavefronts;
}

void Request::count_into(InstructionCounts& counts) const {
  ++counts.requests;
  counts.global_sectors += n_sectors_;
  if (shared_lanes_ == 0) return;
  // 8-byte accesses are served half a warp at a time, 16-byte ones a quarter. Within a phase, a bank delivers one word
  // per wavefront, to every lane that asks for that word.
  const int lanes_per_phase = shared_size_ <= 4 ? 32 : 128 / static_cast<int>(shared_size_);
  for (int first = 0; first < kLanes; first += lanes_per_phase) {
    uint32_t wavefronts = 0;
    uint32_t taken = 0;
    uint32_t previous = ~0u;
    for (int lane = first; lane < first + lanes_per_phase && wavefronts < 2; ++lane) {
      if (!(shared_lanes_ >> lane & 1) || shared_address_[lane] == previous) continue;
      previous = shared_address_[lane];
      const uint32_t n_words = (previous % 4 + shared_size_ + 3) / 4;
      const uint32_t banks = std::rotl((1u << n_words) - 1, static_cast<int>(previous / 4 % 32));
      wavefronts = taken & banks ? 2 : 1;
      taken |= banks;
    }
    if (wavefronts == 2) wavefronts = count_wavefronts(first, lanes_per_phase);
    counts.shared_wavefronts += wavefronts;
    counts.ideal_wavefronts += wavefronts > 0;
  }
}

Space resolve(Space space, uint64_t& address) {
  if (space != Space::generic) return space;
  const uint64_t window = address & kWindowMask;
  address &= ~kWindowMask;
  switch (window) {
    case 0:
      return Space::global;
    case kSharedWindow:
      return Space::shared;
    case kLocalWindow:
      return Space::local;
    case kConstWindow:
      return Space::constant;
    case kParamWindow:
      return Space::parameter;
    default:
      raise(FaultKind::out_of_bounds, "generic address " + hex(address | window) + " belongs to no state space");
  }
}

const uint8_t* read_global(Warp& warp, uint64_t address, uint32_t size, bool strong) {
  const uint8_t* bytes = warp.launch->global->access(address, size, false);
  // What nothing can write needs no record of who reads it.
  if (warp.launch->global->is_writable(address)) {
    const Ordering& ordering = warp.block->ordering;
    warp.launch->races->read({warp.index, warp.lane, strong}, ordering.clock(warp.index), ordering.epoch(warp.index),
                             address, size);
  }
  return bytes;
}

namespace {

struct Access {
  Space space;
  uint32_t bytes;  // of one element
  uint32_t count;
  bool is_signed;
  Strength strength;

  int64_t pack() const {
    return static_cast<int64_t>(space) | int64_t{bytes} << 8 | int64_t{count} << 16 | int64_t{is_signed} << 24 |
           static_cast<int64_t>(strength) << 32;
  }
  static Access unpack(int64_t variant) {
    return {static_cast<Space>(variant & 0xff), static_cast<uint32_t>(variant >> 8 & 0xff),
            static_cast<uint32_t>(variant >> 16 & 0xff), (variant >> 24 & 1) != 0,
            static_cast<Strength>(variant >> 32)};
  }
};

const uint8_t* bank_read(const std::vector<uint8_t>& bank, const char* name, uint64_t address, uint32_t size) {
  if (address % size != 0) {
    raise(FaultKind::misaligned,
          std::string("read of ") + std::to_string(size) + " bytes at " + name + " address " + std::to_string(address));
  }
  if (address + size > bank.size()) {
    raise(FaultKind::out_of_bounds, std::string("read of ") + std::to_string(size) + " bytes at " + name + " address " +
                                        std::to_string(address) + " of " + std::to_string(bank.size()) + " bytes");
  }
  return bank.data() + address;
}

uint32_t shared_address(uint64_t address) {
  if (address >> 32) raise(FaultKind::out_of_bounds, "shared address " + hex(address) + " is out of range");
  return static_cast<uint32_t>(address);
}

const uint8_t* read(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong, Request& request) {
  switch (resolve(space, address)) {
    case Space::shared:
      request.shared(shared_address(address), size, warp.lane);
      return warp.block->shared.read({warp.index, warp.lane, strong}, shared_address(address), size);
    case Space::local:
      if (warp.local.empty()) raise(FaultKind::out_of_bounds, "the kernel has no local memory");
      return warp.local[warp.lane].access(address, size, false);
    case Space::constant:
      return bank_read(warp.launch->constants, "constant", address, size);
    case Space::parameter:
      return bank_read(warp.launch->parameters, "parameter", address, size);
    default:
      request.global(address, size);
      return read_global(warp, address, size, strong);
  }
}

void write(Warp& warp, Space space, uint64_t address, uint32_t size, const uint8_t* bytes, bool strong,
           Request& request) {
  switch (resolve(space, address)) {
    case Space::shared:
      request.shared(shared_address(address), size, warp.lane);
      warp.block->shared.write({warp.index, warp.lane, strong}, shared_address(address), size, bytes);
      return;
    case Space::local:
      if (warp.local.empty()) raise(FaultKind::out_of_bounds, "the kernel has no local memory");
      std::memcpy(warp.local[warp.lane].access(address, size, true), bytes, size);
      return;
    case Space::constant:
    case Space::parameter:
      raise(FaultKind::out_of_bounds, "write to constant or parameter memory");
    default:
      request.global(address, size);
      uint8_t* destination = warp.launch->global->access(address, size, true);
      const Ordering& ordering = warp.block->ordering;
      warp.launch->races->write({warp.index, warp.lane, strong}, ordering.clock(warp.index), ordering.epoch(warp.index),
                                address, size, std::memcmp(destination, bytes, size) == 0);
      std::memcpy(destination, bytes, size);
  }
}

Publications& publications(Warp& warp, Space space) {
  return space == Space::shared ? warp.block->ordering.in_shared_memory : warp.launch->published;
}

template <uint32_t Bytes>
void load(Warp& warp, const Instruction& in) {
  const Access access = Access::unpack(in.variant);
  const int32_t* address = &in.operand[access.count];
  Request request;
  for_each_lane(warp, warp.exec, [&](int lane) {
    const uint64_t at = address_of(warp, address, lane);
    if (access.strength != Strength::weak) {
      uint64_t location = at;
      const Space where = resolve(access.space, location);
      warp.block->ordering.read(warp.index, access.strength, publications(warp, where), location);
    }
    const uint8_t* bytes =
        read(warp, access.space, at, Bytes * access.count, access.strength != Strength::weak, request);
    for (uint32_t i = 0; i < access.count; ++i, bytes += Bytes) {
      if (in.operand[i] == kNoRow) continue;
      uint64_t value = 0;
      std::memcpy(&value, bytes, Bytes);
      if (access.is_signed) {
        constexpr int shift = 64 - 8 * static_cast<int>(Bytes);
        value = static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift);
      }
      if (in.wide_operands >> i & 1) {
        warp.row64(in.operand[i])[lane] = value;
      } else {
        warp.row32(in.operand[i])[lane] = static_cast<uint32_t>(value);
      }
    }
  });
  request.count_into(warp.counts());
}

void store(Warp& warp, const Instruction& in) {
  const Access access = Access::unpack(in.variant);
  Request request;
  for_each_lane(warp, warp.exec, [&](int lane) {
    alignas(16) uint8_t bytes[64];
    for (uint32_t i = 0; i < access.count; ++i) {
      const uint32_t operand = kAddressOperands + i;
      const uint64_t value = in.wide_operands >> operand & 1 ? warp.row64(in.operand[operand])[lane]
                                                             : warp.row32(in.operand[operand])[lane];
      std::memcpy(bytes + i * access.bytes, &value, access.bytes);
    }
    const uint64_t at = address_of(warp, in.operand.data(), lane);
    write(warp, access.space, at, access.bytes * access.count, bytes, access.strength != Strength::weak, request);
    if (access.strength != Strength::weak) {
      uint64_t location = at;
      const Space where = resolve(access.space, location);
      warp.block->ordering.write(warp.index, access.strength, publications(warp, where), location, true);
    }
  });
  warp.launch->progress();
  request.count_into(warp.counts());
}

int64_t pack_atomic(Space space, Strength strength) {
  return static_cast<int64_t>(space) | static_cast<int64_t>(strength) << 8;
}

// One atomic read-modify-write per lane, in an order that the seed decides.
template <class F, class T, bool HasResult>
void atomic(Warp& warp, const Instruction& in) {
  const auto space = static_cast<Space>(in.variant & 0xff);
  const auto strength = static_cast<Strength>(in.variant >> 8);
  const int32_t* address = &in.operand[HasResult ? 1 : 0];
  const int32_t* sources = address + kAddressOperands;
  const int n_sources = in.n_operands - kAddressOperands - (HasResult ? 1 : 0);
  const int rotation = static_cast<int>(warp.launch->random() % kLanes);
  Request request;
  for (int i = 0; i < kLanes; ++i) {
    const int lane = (i + rotation) % kLanes;
    if (!(warp.exec >> lane & 1)) continue;
    warp.lane = lane;
    uint64_t at = address_of(warp, address, lane);
    const Space where = resolve(space, at);
    if (where != Space::global && where != Space::shared) {
      raise(FaultKind::out_of_bounds, "atomic operation outside of global and shared memory");
    }
    const T b = decode<T>(row<T>(warp, sources[0])[lane]);
    const T c = n_sources > 1 ? decode<T>(row<T>(warp, sources[1])[lane]) : b;
    warp.block->ordering.read(warp.index, strength, publications(warp, where), at);
    Request uncounted;
    T old;
    std::memcpy(&old, read(warp, where, at, sizeof(T), true, uncounted), sizeof(T));
    const T result = F{}(old, b, c, where == Space::global);
    uint8_t bytes[sizeof(T)];
    std::memcpy(bytes, &result, sizeof(T));
    write(warp, where, at, sizeof(T), bytes, true, request);
    warp.block->ordering.write(warp.index, strength, publications(warp, where), at, false);
    if (std::memcmp(&old, &result, sizeof(T)) != 0) warp.launch->progress();
    if (HasResult) row<T>(warp, in.operand[0])[lane] = encode<T>(old);
  }
  request.count_into(warp.counts());
}

template <class T, class F>
void register_atomic(Registry& r, const std::string& operation, F) {
  const std::pair<std::string, Space> spaces[] = {
      {"", Space::generic}, {".global", Space::global}, {".shared", Space::shared}};
  const std::pair<std::string, Strength> strengths[] = {{"", Strength::relaxed},
                                                        {".acquire", Strength::acquire},
                                                        {".release", Strength::release},
                                                        {".acq_rel", Strength::acquire_release}};
  for (const auto& [space_name, space] : spaces) {
    for (const auto& [strength_name, strength] : strengths) {
      const std::string suffix = strength_name + space_name + "." + operation;
      r["atom" + suffix] = {&atomic<F, T, true>, pack_atomic(space, strength)};
      r["red" + suffix] = {&atomic<F, T, false>, pack_atomic(space, strength)};
    }
  }
}

template <class T>
void register_atomic_integer(Registry& r, const std::string& type) {
  register_atomic<T>(r, "add." + type, [](T old, T b, T, bool) { return static_cast<T>(old + b); });
  register_atomic<T>(r, "min." + type, [](T old, T b, T, bool) { return std::min(old, b); });
  register_atomic<T>(r, "max." + type, [](T old, T b, T, bool) { return std::max(old, b); });
}

template <class T>
void register_atomic_bits(Registry& r, const std::string& type) {
  register_atomic<T>(r, "and." + type, [](T old, T b, T, bool) { return static_cast<T>(old & b); });
  register_atomic<T>(r, "or." + type, [](T old, T b, T, bool) { return static_cast<T>(old | b); });
  register_atomic<T>(r, "xor." + type, [](T old, T b, T, bool) { return static_cast<T>(old ^ b); });
  register_atomic<T>(r, "exch." + type, [](T, T b, T, bool) { return b; });
  register_atomic<T>(r, "cas." + type, [](T old, T b, T c, bool) { return old == b ? c : old; });
}

template <class T>
Pair add_pairs(Pair a, Pair b) {
  const auto sum = [&](int i) {
    const T x{static_cast<uint16_t>(a.bits >> 16 * i)};
    const T y{static_cast<uint16_t>(b.bits >> 16 * i)};
    return static_cast<uint32_t>(from_double<T>(static_cast<double>(to_float(x)) + to_float(y)).bits) << 16 * i;
  };
  return {sum(0) | sum(1)};
}

}  // namespace

void register_memory(Registry& r) {
  const std::pair<std::string, Space> spaces[] = {{"", Space::generic},        {".global", Space::global},
                                                  {".shared", Space::shared},  {".local", Space::local},
                                                  {".const", Space::constant}, {".param", Space::parameter}};
  const std::pair<std::string, Strength> strengths[] = {{"", Strength::weak},
                                                        {".relaxed", Strength::relaxed},
                                                        {".acquire", Strength::acquire},
                                                        {".release", Strength::release}};
  constexpr Handler loads[] = {&load<1>, &load<2>, &load<4>, &load<8>};
  const std::pair<std::string, uint32_t> vectors[] = {{"", 1}, {".v2", 2}, {".v4", 4}};
  for (const auto& [space_name, space] : spaces) {
    for (const auto& [strength_name, strength] : strengths) {
      for (const auto& [vector_name, count] : vectors) {
        for (const char kind : {'b', 'u', 's', 'f'}) {
          for (const uint32_t bytes : {1u, 2u, 4u, 8u}) {
            if (bytes * count > 16 || (kind == 'f' && bytes < 4)) continue;
            const Access access{space, bytes, count, kind == 's', strength};
            const std::string suffix =
                strength_name + space_name + vector_name + "." + kind + std::to_string(8 * bytes);
            if (strength != Strength::release) r["ld" + suffix] = {loads[std::countr_zero(bytes)], access.pack()};
            if (strength != Strength::acquire) r["st" + suffix] = {&store, access.pack()};
          }
        }
      }
    }
  }
  register_atomic_integer<uint32_t>(r, "u32");
  register_atomic_integer<int32_t>(r, "s32");
  register_atomic_integer<uint64_t>(r, "u64");
  register_atomic_integer<int64_t>(r, "s64");
  register_atomic_bits<uint32_t>(r, "b32");
  register_atomic_bits<uint64_t>(r, "b64");
  register_atomic<uint32_t>(r, "inc.u32",
                            [](uint32_t old, uint32_t b, uint32_t, bool) { return old >= b ? 0 : old + 1; });
  register_atomic<uint32_t>(r, "dec.u32",
                            [](uint32_t old, uint32_t b, uint32_t, bool) { return old == 0 || old > b ? b : old - 1; });
  // Global float32 additions flush subnormals, shared ones keep them.
  register_atomic<float>(r, "add.f32", [](float old, float b, float, bool global) {
    return canonical(global ? flush<true>(flush<true>(old) + flush<true>(b)) : old + b);
  });
  register_atomic<double>(r, "add.f64", [](double old, double b, double, bool) { return old + b; });
  register_atomic<Pair>(r, "add.noftz.f16x2", [](Pair old, Pair b, Pair, bool) { return add_pairs<Half>(old, b); });
  register_atomic<Pair>(r, "add.noftz.bf16x2", [](Pair old, Pair b, Pair, bool) { return add_pairs<Bfloat>(old, b); });
}

}  // namespace emulator
