// Integer arithmetic. Compiled with -fwrapv: signed overflow wraps, as in PTX.
#include <algorithm>
#include <limits>

#include "lanewise.h"

namespace emulator {
namespace {

template <class T>
struct Wider;
template <>
struct Wider<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using type = __int128;
};

template <class T>
T high_product(T a, T b) {
  using W = typename Wider<T>::type;
  return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T)));
}

// The result of a division by zero is unspecified in PTX; all ones is what the hardware's expansion gives.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - a);
  return a / b;
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return a % b;
}

int32_t saturate(int64_t value) { return static_cast<int32_t>(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX)); }

template <class T>
void register_type(Registry& r, const std::string& type) {
  r["add." + type] = lanes<T, T, T>([](T a, T b) { return static_cast<T>(a + b); });
  r["sub." + type] = lanes<T, T, T>([](T a, T b) { return static_cast<T>(a - b); });
  r["mul.lo." + type] = lanes<T, T, T>([](T a, T b) {
    using U = std::make_unsigned_t<std::common_type_t<T, int>>;
    return static_cast<T>(static_cast<U>(a) * static_cast<U>(b));
  });
  r["mul.hi." + type] = lanes<T, T, T>([](T a, T b) { return high_product(a, b); });
  r["mad.lo." + type] = lanes<T, T, T, T>([](T a, T b, T c) {
    using U = std::make_unsigned_t<std::common_type_t<T, int>>;
    return static_cast<T>(static_cast<U>(a) * static_cast<U>(b) + static_cast<U>(c));
  });
  r["mad.hi." + type] = lanes<T, T, T, T>([](T a, T b, T c) { return static_cast<T>(high_product(a, b) + c); });
  r["div." + type] = lanes<T, T, T>([](T a, T b) { return quotient(a, b); });
  r["rem." + type] = lanes<T, T, T>([](T a, T b) { return remainder(a, b); });
  r["min." + type] = lanes<T, T, T>([](T a, T b) { return std::min(a, b); });
  r["max." + type] = lanes<T, T, T>([](T a, T b) { return std::max(a, b); });
  if constexpr (std::is_signed_v<T>) {
    r["neg." + type] = lanes<T, T>([](T a) { return static_cast<T>(-a); });
    r["abs." + type] = lanes<T, T>([](T a) { return static_cast<T>(a < 0 ? -a : a); });
  }
  r["sad." + type] = lanes<T, T, T, T>([](T a, T b, T c) { return static_cast<T>(c + (a < b ? b - a : a - b)); });
  r["shr." + type] = lanes<T, T, uint32_t>([](T a, uint32_t n) {
    constexpr uint32_t bits = 8 * sizeof(T);
    return static_cast<T>(a >> std::min(n, bits - 1) >> (n >= bits ? 1 : 0));
  });
  if constexpr (sizeof(T) < 8) {
    using W = typename Wider<T>::type;
    r["mul.wide." + type] = lanes<W, T, T>([](T a, T b) { return static_cast<W>(a) * static_cast<W>(b); });
    r["mad.wide." + type] =
        lanes<W, T, T, W>([](T a, T b, W c) { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b) + c); });
  }
}

// d = a ± b, with the carry or borrow of the instruction before it (`Takes`) and for the next one (`Gives`).
template <class U, bool Subtracts, bool Takes, bool Gives>
void put_sum(Warp& warp, const Instruction& in, const U* a, const U* b) {
  alignas(64) Storage<U> result[kLanes];
  Mask carries = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const U carry = Takes ? warp.carry >> lane & 1 : 0;
    U sum;
    bool over;
    if constexpr (Subtracts) {
      over = __builtin_sub_overflow(a[lane], b[lane], &sum);
      over |= __builtin_sub_overflow(sum, carry, &sum);
    } else {
      over = __builtin_add_overflow(a[lane], b[lane], &sum);
      over |= __builtin_add_overflow(sum, carry, &sum);
    }
    result[lane] = sum;
    carries |= static_cast<Mask>(over) << lane;
  }
  commit(row<U>(warp, in.operand[0]), result, warp.exec);
  if (Gives) warp.carry = (warp.carry & ~warp.exec) | (carries & warp.exec);
}

template <class U, bool Subtracts, bool Takes, bool Gives>
void extended_sum(Warp& warp, const Instruction& in) {
  put_sum<U, Subtracts, Takes, Gives>(warp, in, row<U>(warp, in.operand[1]), row<U>(warp, in.operand[2]));
}

template <class T, bool High, bool Takes, bool Gives>
void extended_mad(Warp& warp, const Instruction& in) {
  using U = std::make_unsigned_t<T>;
  U product[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const T a = decode<T>(row<T>(warp, in.operand[1])[lane]);
    const T b = decode<T>(row<T>(warp, in.operand[2])[lane]);
    product[lane] = High ? static_cast<U>(high_product(a, b)) : static_cast<U>(a) * static_cast<U>(b);
  }
  put_sum<U, false, Takes, Gives>(warp, in, product, row<U>(warp, in.operand[3]));
}

template <class T>
void register_extended(Registry& r, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  r["add.cc." + type] = {&extended_sum<U, false, false, true>, 0};
  r["addc." + type] = {&extended_sum<U, false, true, false>, 0};
  r["addc.cc." + type] = {&extended_sum<U, false, true, true>, 0};
  r["sub.cc." + type] = {&extended_sum<U, true, false, true>, 0};
  r["subc." + type] = {&extended_sum<U, true, true, false>, 0};
  r["subc.cc." + type] = {&extended_sum<U, true, true, true>, 0};
  r["mad.lo.cc." + type] = {&extended_mad<T, false, false, true>, 0};
  r["mad.hi.cc." + type] = {&extended_mad<T, true, false, true>, 0};
  r["madc.lo." + type] = {&extended_mad<T, false, true, false>, 0};
  r["madc.hi." + type] = {&extended_mad<T, true, true, false>, 0};
  r["madc.lo.cc." + type] = {&extended_mad<T, false, true, true>, 0};
  r["madc.hi.cc." + type] = {&extended_mad<T, true, true, true>, 0};
}

int32_t multiply24(int32_t a, int32_t b) { return ((a << 8) >> 8) * ((b << 8) >> 8); }
uint32_t multiply24(uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); }

template <class A, class B>
auto dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<uint32_t>(static_cast<int32_t>(static_cast<A>(a >> 8 * i)) *
                               static_cast<int32_t>(static_cast<B>(b >> 8 * i)));
  }
  return c;
}

}  // namespace

void register_integer(Registry& r) {
  register_type<uint16_t>(r, "u16");
  register_type<int16_t>(r, "s16");
  register_type<uint32_t>(r, "u32");
  register_type<int32_t>(r, "s32");
  register_type<uint64_t>(r, "u64");
  register_type<int64_t>(r, "s64");
  register_extended<uint32_t>(r, "u32");
  register_extended<int32_t>(r, "s32");
  register_extended<uint64_t>(r, "u64");
  register_extended<int64_t>(r, "s64");
  r["shr.b16"] = r["shr.u16"];
  r["shr.b32"] = r["shr.u32"];
  r["shr.b64"] = r["shr.u64"];
  r["add.sat.s32"] = lanes<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) { return saturate(int64_t{a} + b); });
  r["sub.sat.s32"] = lanes<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) { return saturate(int64_t{a} - b); });
  r["mul24.lo.s32"] = lanes<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) { return multiply24(a, b); });
  r["mul24.lo.u32"] = lanes<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) { return multiply24(a, b); });
  r["min.relu.s32"] =
      lanes<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) { return std::max(0, std::min(a, b)); });
  r["max.relu.s32"] =
      lanes<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) { return std::max(0, std::max(a, b)); });
  const auto dot = [](auto f) { return lanes<uint32_t, uint32_t, uint32_t, uint32_t>(f); };
  r["dp4a.u32.u32"] = dot([](uint32_t a, uint32_t b, uint32_t c) { return dot4<uint8_t, uint8_t>(a, b, c); });
  r["dp4a.u32.s32"] = dot([](uint32_t a, uint32_t b, uint32_t c) { return dot4<uint8_t, int8_t>(a, b, c); });
  r["dp4a.s32.u32"] = dot([](uint32_t a, uint32_t b, uint32_t c) { return dot4<int8_t, uint8_t>(a, b, c); });
  r["dp4a.s32.s32"] = dot([](uint32_t a, uint32_t b, uint32_t c) { return dot4<int8_t, int8_t>(a, b, c); });
}

}  // namespace emulator
