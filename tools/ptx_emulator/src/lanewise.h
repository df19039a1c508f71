// Instructions that treat every lane alike: a lambda from source values to a result becomes a handler.
#pragma once

#include <bit>
#include <concepts>
#include <type_traits>

#include "machine.h"

namespace emulator {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
struct Pair {  // two 16-bit values, the first in the low half
  uint32_t bits;
};

template <class T>
using Storage = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T decode(Storage<T> bits) {
  if constexpr (sizeof(T) == sizeof(Storage<T>)) {
    return std::bit_cast<T>(bits);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(static_cast<uint16_t>(bits));
  } else {
    return std::bit_cast<T>(static_cast<uint8_t>(bits));
  }
}

// A narrow signed result extends its sign, as a wider destination register demands.
template <class T>
inline Storage<T> encode(T value) {
  if constexpr (std::integral<T>) {
    return static_cast<Storage<T>>(value);
  } else if constexpr (sizeof(T) == 2) {
    return value.bits;
  } else {
    return std::bit_cast<Storage<T>>(value);
  }
}

template <class T>
inline Storage<T>* row(Warp& warp, int32_t index) {
  if constexpr (sizeof(T) == 8) {
    return warp.row64(index);
  } else {
    return warp.row32(index);
  }
}

template <class S>
inline void commit(S* destination, const S* result, Mask exec) {
  if (exec == kFullMask) {
    for (int lane = 0; lane < kLanes; ++lane) destination[lane] = result[lane];
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      destination[lane] = exec >> lane & 1 ? result[lane] : destination[lane];
    }
  }
}

template <class F, class D, class... S, size_t... I>
inline void lanewise_indexed(Warp& warp, const Instruction& in, std::index_sequence<I...>) {
  alignas(64) Storage<D> result[kLanes];
  const auto sources = std::make_tuple(row<S>(warp, in.operand[I + 1])...);
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = encode<D>(F{}(decode<S>(std::get<I>(sources)[lane])...));
  commit(row<D>(warp, in.operand[0]), result, warp.exec);
}

template <class F, class D, class... S>
void lanewise(Warp& warp, const Instruction& in) {
  lanewise_indexed<F, D, S...>(warp, in, std::index_sequence_for<S...>{});
}

template <class D, class... S, class F>
Operation lanes(F) {
  return {&lanewise<F, D, S...>, 0};
}

void register_integer(Registry&);
void register_bits(Registry&);
void register_floating(Registry&);
void register_half(Registry&);
void register_convert(Registry&);
void register_predicate(Registry&);
void register_memory(Registry&);
void register_copy(Registry&);
void register_warp(Registry&);
void register_control(Registry&);
void register_tensor_core(Registry&);
void register_mbarrier(Registry&);
void register_bulk_copy(Registry&);
void register_warpgroup(Registry&);

}  // namespace emulator
