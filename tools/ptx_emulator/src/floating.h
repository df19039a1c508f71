// Rules of PTX floating point that C++ does not share: flushed subnormals, canonical NaN, rounding modes, 16-bit types.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>

#include "lanewise.h"

namespace emulator {

inline float canonical(float x) { return x != x ? std::bit_cast<float>(0x7fffffffu) : x; }
inline double canonical(double x) { return x; }

template <bool Ftz>
inline float flush(float x) {
  if constexpr (!Ftz) return x;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7f800000u) == 0 ? std::bit_cast<float>(bits & 0x80000000u) : x;
}
template <bool Ftz>
inline double flush(double x) {
  return x;
}

// NaN saturates to +0.
template <class T>
inline T clamp_to_unit(T x) {
  return x > T{0} ? (x < T{1} ? x : T{1}) : T{0};
}

// The barriers keep the compiler from moving the operation out of the region with the changed mode.
template <class T, class F>
inline T rounded(int mode, F operation) {
  const int old = std::fegetround();
  std::fesetround(mode);
  asm volatile("" ::: "memory");
  T result = operation();
  asm volatile("" : "+m"(result)::"memory");
  std::fesetround(old);
  return result;
}

inline float to_float(float x) { return x; }
// In integers and one exact product, which vectorise where the conversion instruction is not used.
inline float to_float(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return std::bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}
inline float to_float(Bfloat x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest even, or toward zero.
template <class T, bool TowardZero = false>
inline T from_double(double x);

template <>
inline Half from_double<Half, false>(double x) {
  if (x != x) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <>
inline Half from_double<Half, true>(double x) {
  if (x != x) return {0x7fff};
  _Float16 nearest = static_cast<_Float16>(x);
  uint16_t bits = std::bit_cast<uint16_t>(nearest);
  if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;
  return {bits};
}

// Truncates x to a float so that a second rounding to fewer bits rounds x correctly: the last bit is set when anything
// was lost (round to odd).
inline float round_to_odd(double x) {
  float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || x != x || std::isinf(nearest)) {
    // An overflow of the conversion is an overflow of every narrower format with float's exponent range.
    return nearest;
  }
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;
  return std::bit_cast<float>(bits | 1);
}

template <>
inline Bfloat from_double<Bfloat, false>(double x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(round_to_odd(x));
  if ((bits & 0x7f800000u) == 0x7f800000u) return {static_cast<uint16_t>(bits >> 16)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Bfloat from_double<Bfloat, true>(double x) {
  if (x != x) return {0x7fff};
  float nearest = static_cast<float>(x);
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;
  return {static_cast<uint16_t>(bits >> 16)};
}

inline Bfloat bfloat_from_float(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded_bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fff : rounded_bits)};
}

inline Half half_from_float(float x) {
  return {static_cast<uint16_t>(x != x ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(x)))};
}

}  // namespace emulator
