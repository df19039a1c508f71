// Vectors of the instruction set that this file is compiled for, on the compiler's own vector extensions.
// Everything here is in a namespace named after the set: no symbol can clash with that of another set in the linker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "params.h"

#ifndef ANCHOR_ATTENTION_ISA
#error "compile with -DANCHOR_ATTENTION_ISA=<name of the instruction set>"
#endif

#define ANCHOR_ATTENTION_INLINE inline __attribute__((always_inline))
#define ANCHOR_ATTENTION_NOINLINE __attribute__((noinline))

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <typename T>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorTypes<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vector = typename VectorTypes<T>::Value;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
ANCHOR_ATTENTION_INLINE Vector<T> load(const T* source) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(source);
}

template <typename T>
ANCHOR_ATTENTION_INLINE void store(T* target, Vector<T> value) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(target) = value;
}

template <typename T>
ANCHOR_ATTENTION_INLINE Vector<T> splat(T value) {
  // Not a sum: −0 + 0 is +0, so that the compiler would have to add. x − 0 is x, and all of it one broadcasting load.
  return value - Vector<T>{};
}

// Where one of the two is NaN the result is b: pass the one whose NaN must propagate second.
template <typename V>
ANCHOR_ATTENTION_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

template <int kStep, typename V, int... kLane>
ANCHOR_ATTENTION_INLINE V merge_low(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  return __builtin_shufflevector(a, b, ((kLane & kStep) != 0 ? kCount + kLane - kStep : kLane)...);
}

template <int kStep, typename V, int... kLane>
ANCHOR_ATTENTION_INLINE V merge_high(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  return __builtin_shufflevector(a, b, ((kLane & kStep) != 0 ? kCount + kLane : kLane + kStep)...);
}

// Transposes a square block of as many vectors as a vector has lanes: swaps 1 × 1 blocks across the diagonal, then
// 2 × 2, and so on.
template <typename T, int kStep = 1>
ANCHOR_ATTENTION_INLINE void transpose_block(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (kStep < kLanes<T>) {
    constexpr std::make_integer_sequence<int, kLanes<T>> kSequence{};
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & kStep) != 0) continue;
      const Vector<T> low = merge_low<kStep>(rows[i], rows[i + kStep], kSequence);
      rows[i + kStep] = merge_high<kStep>(rows[i], rows[i + kStep], kSequence);
      rows[i] = low;
    }
    transpose_block<T, 2 * kStep>(rows);
  }
}

// 2^x for x ≤ 127, relative error ≤ 2e-7; 0 below −127, NaN for NaN.
#if defined(__AVX512DQ__)
// Eight instructions instead of thirteen: the fraction above the floor is one, and scaling by 2^⌊x⌋ is another.
ANCHOR_ATTENTION_INLINE Vector<float> exp2(Vector<float> x) {
  constexpr int kFractionAboveFloor = 1;
  const Vector<float> f = (Vector<float>)_mm512_reduce_ps((__m512)x, kFractionAboveFloor);
  // Minimax polynomial of 2^f on [0, 1) with 2^0 = 1, relative error 8.3e-8.
  Vector<float> p = splat(1.86713021195e-3f);
  p = p * f + 9.01702996253e-3f;
  p = p * f + 5.57999134252e-2f;
  p = p * f + 2.40164450039e-1f;
  p = p * f + 6.93151311818e-1f;
  p = p * f + 1.0f;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vector<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
}
#else
ANCHOR_ATTENTION_INLINE Vector<float> exp2(Vector<float> x) {
  // Adding 1.5 · 2²³ + 127 leaves the exponent of 2^round(x) with its bias in the low bits of the sum: of 2⁻¹²⁷ that is
  // the exponent of 0. A NaN comes out of the polynomial and stays one in the product, whatever its other factor is.
  constexpr float kRound = 12582912.0f + 127.0f;
#if defined(__AVX__)
  x = (Vector<float>)_mm256_max_ps(_mm256_set1_ps(-127.0f), (__m256)x);
#else
  x = maximum(splat(-127.0f), x);
#endif
  const Vector<float> shifted = x + kRound;
  const Vector<float> f = x - (shifted - kRound);
  // Minimax polynomial of 2^f on [−½, ½] with 2^0 = 1, relative error 9.2e-8.
  Vector<float> p = splat(1.3264727207e-3f);
  p = p * f + 9.6715127069e-3f;
  p = p * f + 5.5507337438e-2f;
  p = p * f + 2.4022242084e-1f;
  p = p * f + 6.9314697760e-1f;
  p = p * f + 1.0f;
  return p * reinterpret_cast<Vector<float>>(reinterpret_cast<VectorTypes<float>::Bits>(shifted) << 23);
}
#endif

ANCHOR_ATTENTION_INLINE Vector<double> exp2(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp2(x[lane]);
  return x;
}

ANCHOR_ATTENTION_INLINE float log2(float x) { return __builtin_log2f(x); }
ANCHOR_ATTENTION_INLINE double log2(double x) { return __builtin_log2(x); }

template <typename T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// Scalar conversions of 16-bit types, written without branches so that the compiler vectorises loops over them.
ANCHOR_ATTENTION_INLINE float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
ANCHOR_ATTENTION_INLINE uint32_t bits_of_float(float value) { return __builtin_bit_cast(uint32_t, value); }

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

ANCHOR_ATTENTION_INLINE float widen(float value) { return value; }
ANCHOR_ATTENTION_INLINE double widen(double value) { return value; }
ANCHOR_ATTENTION_INLINE float widen(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

// No operation takes or produces a denormal float: how the processor treats those is a setting of each thread.
ANCHOR_ATTENTION_INLINE float widen(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  // The exponent's bias differs by 112. A denormal is what its bits add to 2⁻¹⁴.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude + 0x38800000u) - 0x1p-14f);
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t finite = magnitude < 0x00800000u ? denormal : normal;
  return float_of_bits((magnitude >= 0x0f800000u ? special : finite) | sign);
}

template <typename To>
To narrow(float value);

template <>
ANCHOR_ATTENTION_INLINE float narrow<float>(float value) {
  return value;
}

template <>
ANCHOR_ATTENTION_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>(value != value ? nan : rounded)};
}

template <>
ANCHOR_ATTENTION_INLINE Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2⁻¹⁴ the sum with 0.5 leaves the denormal's bits, rounded to nearest even, in the low end of the mantissa.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>((magnitude >= 0x477ff000u ? infinite : finite) | sign)};
}

template <typename To>
ANCHOR_ATTENTION_INLINE double narrow(double value) {
  return value;
}

// The arithmetic type of a storage type.
template <typename Storage>
using Working = decltype(widen(Storage{}));

// Operands of the products. Two bfloat16 in one: neighbours along the summed axis, multiplied and added in one step
// where the processor has dot products of bfloat16.
struct BFloat16Pair {
  BFloat16 values[2];
};

template <>
struct VectorTypes<BFloat16Pair> {
  typedef uint32_t Value __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16Dot = true;
#else
constexpr bool kHasBFloat16Dot = false;
#endif

template <typename Operand>
struct OperandTraits {
  using Sum = Operand;
  static constexpr int kDepth = 1;  // elements of the summed axis in one operand
};

template <>
struct OperandTraits<BFloat16Pair> {
  using Sum = float;
  static constexpr int kDepth = 2;
};

template <typename Operand>
using Sum = typename OperandTraits<Operand>::Sum;

template <typename Operand>
constexpr int kDepth = OperandTraits<Operand>::kDepth;

template <typename Storage>
struct OperandOf {
  using Type = Working<Storage>;
};

template <>
struct OperandOf<BFloat16> {
  using Type = std::conditional_t<kHasBFloat16Dot, BFloat16Pair, float>;
};

ANCHOR_ATTENTION_INLINE Vector<BFloat16Pair> splat(BFloat16Pair pair) {
  return Vector<BFloat16Pair>{} + __builtin_bit_cast(uint32_t, pair);
}

template <typename V>
ANCHOR_ATTENTION_INLINE V multiply_add(V a, V b, V sum) {
  return a * b + sum;
}

#if defined(__AVX512BF16__)
ANCHOR_ATTENTION_INLINE Vector<float> multiply_add(Vector<BFloat16Pair> a, Vector<BFloat16Pair> b, Vector<float> sum) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The two vectors rounded to bfloat16, one after the other.
ANCHOR_ATTENTION_INLINE __m512i round_to_bfloat16(Vector<float> first, Vector<float> second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// The two vectors rounded to bfloat16, element by element side by side.
ANCHOR_ATTENTION_INLINE Vector<BFloat16Pair> pair_up(Vector<float> first, Vector<float> second) {
  const __m512i even_odd = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vector<BFloat16Pair>)_mm512_permutexvar_epi16(even_odd, round_to_bfloat16(first, second));
}
#endif

// The two vectors rounded to bfloat16, one after the other, to 2 · kLanes<float> elements.
ANCHOR_ATTENTION_INLINE void store_rounded(BFloat16* target, Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(target, round_to_bfloat16(first, second));
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    target[i] = narrow<BFloat16>(first[i]);
    target[kLanes<float> + i] = narrow<BFloat16>(second[i]);
  }
#endif
}

// The two vectors rounded to bfloat16, element by element side by side, to kLanes<float> pairs.
ANCHOR_ATTENTION_INLINE void store_pairs(BFloat16Pair* target, Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(target, (__m512i)pair_up(first, second));
#else
  for (int i = 0; i < kLanes<float>; ++i) target[i] = {narrow<BFloat16>(first[i]), narrow<BFloat16>(second[i])};
#endif
}

// What rounding to bfloat16 removes: finite where the value and its rounding are.
ANCHOR_ATTENTION_INLINE Vector<float> rounding_remainder(Vector<float> value) {
  using Bits = VectorTypes<float>::Bits;
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return value - reinterpret_cast<Vector<float>>(rounded);
}

// A vector in the type of the tensor. Loops over `narrow` of a vector's lanes are not vectorised.
ANCHOR_ATTENTION_INLINE void store_narrow(float* target, Vector<float> value) { store(target, value); }

ANCHOR_ATTENTION_INLINE void store_narrow(BFloat16* target, Vector<float> value) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  using Bits = VectorTypes<float>::Bits;
  const Bits bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (bits >> 16) | 0x40u;
  const Halves halves = __builtin_convertvector(value != value ? nan : rounded, Halves);
  std::memcpy(target, &halves, sizeof(halves));
}

// Whether some lane differs.
ANCHOR_ATTENTION_INLINE bool any_differs(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ) != 0;
#else
  bool differs = false;
  for (int i = 0; i < kLanes<float>; ++i) differs |= a[i] != b[i];
  return differs;
#endif
}

// Calls function(Storage{}) for the storage type of `dtype`.
template <typename Function>
ANCHOR_ATTENTION_INLINE auto dispatch(ScalarType dtype, Function&& function) {
  switch (dtype) {
    case ScalarType::bfloat16:
      return function(BFloat16{});
    case ScalarType::float16:
      return function(Float16{});
    case ScalarType::float64:
      return function(double{});
    default:
      return function(float{});
  }
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
