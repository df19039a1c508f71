// Bit manipulation, moves, selections.
#include <algorithm>
#include <bit>

#include "lanewise.h"

namespace emulator {
namespace {

template <class T>
void register_logic(Registry& r, const std::string& type) {
  r["and." + type] = lanes<T, T, T>([](T a, T b) { return static_cast<T>(a & b); });
  r["or." + type] = lanes<T, T, T>([](T a, T b) { return static_cast<T>(a | b); });
  r["xor." + type] = lanes<T, T, T>([](T a, T b) { return static_cast<T>(a ^ b); });
  r["not." + type] = lanes<T, T>([](T a) { return static_cast<T>(~a); });
  r["cnot." + type] = lanes<T, T>([](T a) { return static_cast<T>(a == 0); });
  r["shl." + type] = lanes<T, T, uint32_t>([](T a, uint32_t n) {
    constexpr uint32_t bits = 8 * sizeof(T);
    return static_cast<T>(n >= bits ? T{0} : static_cast<T>(a << (n & (bits - 1))));
  });
}

template <class T>
void register_move(Registry& r, std::initializer_list<const char*> types) {
  for (const std::string type : types) {
    r["mov." + type] = lanes<T, T>([](T a) { return a; });
    r["slct." + type + ".s32"] = lanes<T, T, T, int32_t>([](T a, T b, int32_t c) { return c >= 0 ? a : b; });
    r["slct." + type + ".f32"] = lanes<T, T, T, float>([](T a, T b, float c) { return c >= 0 ? a : b; });
  }
}

template <class T, class U>
T extract_field(T value, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  U result = position < bits ? static_cast<U>(value) >> position : 0;
  if (length < bits) result &= (U{1} << length) - 1;
  if (std::is_signed_v<T>) {
    const uint32_t sign_at = std::min(position + length - 1, bits - 1);
    const bool negative = static_cast<U>(value) >> sign_at & 1;
    const uint32_t available = position < bits ? std::min(length, bits - position) : 0;
    if (negative && available < bits) result |= ~U{0} << available;
  }
  return static_cast<T>(result);
}

template <class U>
U insert_field(U field, U into, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(U);
  position &= 0xff;
  length &= 0xff;
  if (position >= bits || length == 0) return into;
  const U mask = (length >= bits ? ~U{0} : (U{1} << length) - 1) << position;
  return (into & ~mask) | ((field << position) & mask);
}

template <class U>
U reverse_bits(U value) {
  U result = 0;
  for (uint32_t i = 0; i < 8 * sizeof(U); ++i) result |= (value >> i & 1) << (8 * sizeof(U) - 1 - i);
  return result;
}

template <class T, class U, bool Shift>
uint32_t find_leading(T value) {
  U bits = static_cast<U>(value);
  if (std::is_signed_v<T> && value < 0) bits = ~bits;
  if (bits == 0) return ~0u;
  const uint32_t position = 8 * sizeof(U) - 1 - std::countl_zero(bits);
  return Shift ? 8 * sizeof(U) - 1 - position : position;
}

template <class T>
void register_fields(Registry& r, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  r["bfe." + type] = lanes<T, T, uint32_t, uint32_t>(
      [](T a, uint32_t position, uint32_t length) { return extract_field<T, U>(a, position, length); });
  r["bfind." + type] = lanes<uint32_t, T>([](T a) { return find_leading<T, U, false>(a); });
  r["bfind.shiftamt." + type] = lanes<uint32_t, T>([](T a) { return find_leading<T, U, true>(a); });
}

template <class U>
void register_unsigned(Registry& r, const std::string& type) {
  r["bfi." + type] = lanes<U, U, U, uint32_t, uint32_t>(
      [](U a, U b, uint32_t position, uint32_t length) { return insert_field(a, b, position, length); });
  r["brev." + type] = lanes<U, U>([](U a) { return reverse_bits(a); });
  r["popc." + type] = lanes<uint32_t, U>([](U a) { return static_cast<uint32_t>(std::popcount(a)); });
  r["clz." + type] = lanes<uint32_t, U>([](U a) { return static_cast<uint32_t>(std::countl_zero(a)); });
}

uint32_t permute_default(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// The named modes are selectors of their own, indexed by the low two bits.
template <uint32_t S0, uint32_t S1, uint32_t S2, uint32_t S3>
uint32_t permute_mode(uint32_t a, uint32_t b, uint32_t selector) {
  constexpr uint32_t selectors[] = {S0, S1, S2, S3};
  return permute_default(a, b, selectors[selector & 3]);
}

uint32_t lookup3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t match = (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    result |= table >> i & 1 ? match : 0;
  }
  return result;
}

uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>(((uint64_t{high} << 32 | low) << n) >> 32);
}
uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> n);
}

// mov between one register of variant·n bits and n registers of variant bits.
template <class Whole, class Part>
void unpack(Warp& warp, const Instruction& in) {
  constexpr int n = sizeof(Whole) / sizeof(Part);
  alignas(64) Storage<Whole> source[kLanes];
  std::copy_n(row<Whole>(warp, in.operand[n]), kLanes, source);
  for (int part = 0; part < n; ++part) {
    if (in.operand[part] == kNoRow) continue;
    alignas(64) Storage<Part> result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      result[lane] = static_cast<Part>(static_cast<Whole>(source[lane]) >> (8 * sizeof(Part) * part));
    }
    commit(row<Part>(warp, in.operand[part]), result, warp.exec);
  }
}

template <class Whole, class Part>
void pack(Warp& warp, const Instruction& in) {
  constexpr int n = sizeof(Whole) / sizeof(Part);
  alignas(64) Storage<Whole> result[kLanes] = {};
  for (int part = 0; part < n; ++part) {
    const auto* source = row<Part>(warp, in.operand[part + 1]);
    for (int lane = 0; lane < kLanes; ++lane) {
      result[lane] |= static_cast<Whole>(static_cast<Part>(source[lane])) << (8 * sizeof(Part) * part);
    }
  }
  commit(row<Whole>(warp, in.operand[0]), result, warp.exec);
}

}  // namespace

void register_bits(Registry& r) {
  register_logic<uint16_t>(r, "b16");
  register_logic<uint32_t>(r, "b32");
  register_logic<uint64_t>(r, "b64");
  register_move<uint16_t>(r, {"b16", "u16", "s16"});
  register_move<uint32_t>(r, {"b32", "u32", "s32", "f32"});
  register_move<uint64_t>(r, {"b64", "u64", "s64", "f64"});
  register_fields<uint32_t>(r, "u32");
  register_fields<int32_t>(r, "s32");
  register_fields<uint64_t>(r, "u64");
  register_fields<int64_t>(r, "s64");
  register_unsigned<uint32_t>(r, "b32");
  register_unsigned<uint64_t>(r, "b64");
  const auto ternary = [](auto f) { return lanes<uint32_t, uint32_t, uint32_t, uint32_t>(f); };
  using U = uint32_t;
  r["prmt.b32"] = ternary([](U a, U b, U s) { return permute_default(a, b, s); });
  r["prmt.b32.f4e"] = ternary([](U a, U b, U s) { return permute_mode<0x3210, 0x4321, 0x5432, 0x6543>(a, b, s); });
  r["prmt.b32.b4e"] = ternary([](U a, U b, U s) { return permute_mode<0x5670, 0x6701, 0x7012, 0x0123>(a, b, s); });
  r["prmt.b32.rc8"] = ternary([](U a, U b, U s) { return permute_mode<0x0000, 0x1111, 0x2222, 0x3333>(a, b, s); });
  r["prmt.b32.ecl"] = ternary([](U a, U b, U s) { return permute_mode<0x3210, 0x3211, 0x3222, 0x3333>(a, b, s); });
  r["prmt.b32.ecr"] = ternary([](U a, U b, U s) { return permute_mode<0x0000, 0x1110, 0x2210, 0x3210>(a, b, s); });
  r["prmt.b32.rc16"] = ternary([](U a, U b, U s) { return permute_mode<0x1010, 0x3232, 0x1010, 0x3232>(a, b, s); });
  r["shf.l.wrap.b32"] = ternary([](U low, U high, U n) { return funnel_left(low, high, n & 31); });
  r["shf.l.clamp.b32"] = ternary([](U low, U high, U n) { return funnel_left(low, high, std::min(n, 32u)); });
  r["shf.r.wrap.b32"] = ternary([](U low, U high, U n) { return funnel_right(low, high, n & 31); });
  r["shf.r.clamp.b32"] = ternary([](U low, U high, U n) { return funnel_right(low, high, std::min(n, 32u)); });
  r["lop3.b32"] = lanes<U, U, U, U, U>([](U a, U b, U c, U table) { return lookup3(a, b, c, table); });
  r["unpack.2.b32"] = {&unpack<uint32_t, uint16_t>, 0};
  r["unpack.2.b64"] = {&unpack<uint64_t, uint32_t>, 0};
  r["unpack.4.b64"] = {&unpack<uint64_t, uint16_t>, 0};
  r["pack.2.b32"] = {&pack<uint32_t, uint16_t>, 0};
  r["pack.2.b64"] = {&pack<uint64_t, uint32_t>, 0};
  r["pack.4.b64"] = {&pack<uint64_t, uint16_t>, 0};
}

}  // namespace emulator
