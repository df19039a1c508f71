// float16 and bfloat16 arithmetic, single and packed in pairs. Sums and products are formed in float64, where they are
// exact or far finer than the result, and rounded once.
#include "floating.h"

namespace emulator {
namespace {

template <class T, bool Ftz, bool Sat, bool Relu>
T finish(double x) {
  if constexpr (Sat) x = clamp_to_unit(x);
  if constexpr (Relu) x = x > 0 || x != x ? x : 0.0;
  T result = from_double<T>(x);
  // Only float16 has an ftz variant.
  if constexpr (Ftz) {
    if ((result.bits & 0x7c00) == 0) result.bits &= 0x8000;
  }
  return result;
}

template <class T, bool Ftz>
double value(T x) {
  if constexpr (Ftz) {
    if ((x.bits & 0x7c00) == 0) x.bits &= 0x8000;
  }
  return to_float(x);
}

template <class T, class F>
Pair each(F f, Pair a, Pair b, Pair c) {
  const auto part = [](Pair p, int i) { return T{static_cast<uint16_t>(p.bits >> 16 * i)}; };
  return {static_cast<uint32_t>(f(part(a, 0), part(b, 0), part(c, 0)).bits) |
          static_cast<uint32_t>(f(part(a, 1), part(b, 1), part(c, 1)).bits) << 16};
}

// Registers f for the type and its pair, with one, two or three operands.
template <class T, int N, class F>
void both(Registry& r, const std::string& name, const std::string& type, F) {
  if constexpr (N == 1) {
    r[name + type] = lanes<T, T>([](T a) { return F{}(a, a, a); });
    r[name + type + "x2"] = lanes<Pair, Pair>([](Pair a) { return each<T>(F{}, a, a, a); });
  } else if constexpr (N == 2) {
    r[name + type] = lanes<T, T, T>([](T a, T b) { return F{}(a, b, b); });
    r[name + type + "x2"] = lanes<Pair, Pair, Pair>([](Pair a, Pair b) { return each<T>(F{}, a, b, b); });
  } else {
    r[name + type] = lanes<T, T, T, T>([](T a, T b, T c) { return F{}(a, b, c); });
    r[name + type + "x2"] = lanes<Pair, Pair, Pair, Pair>([](Pair a, Pair b, Pair c) { return each<T>(F{}, a, b, c); });
  }
}

template <class T, bool Ftz, bool Sat>
void register_arithmetic(Registry& r, const std::string& modifiers, const std::string& type) {
  for (const std::string rounding : {"", ".rn"}) {
    const std::string m = rounding + modifiers;
    both<T, 2>(r, "add" + m, type,
               [](T a, T b, T) { return finish<T, Ftz, Sat, false>(value<T, Ftz>(a) + value<T, Ftz>(b)); });
    both<T, 2>(r, "sub" + m, type,
               [](T a, T b, T) { return finish<T, Ftz, Sat, false>(value<T, Ftz>(a) - value<T, Ftz>(b)); });
    both<T, 2>(r, "mul" + m, type,
               [](T a, T b, T) { return finish<T, Ftz, Sat, false>(value<T, Ftz>(a) * value<T, Ftz>(b)); });
  }
  both<T, 3>(r, "fma.rn" + modifiers, type, [](T a, T b, T c) {
    return finish<T, Ftz, Sat, false>(value<T, Ftz>(a) * value<T, Ftz>(b) + value<T, Ftz>(c));
  });
}

template <class T, bool NaN>
T smaller(T a, T b) {
  const float x = to_float(a);
  const float y = to_float(b);
  if (x != x || y != y) return NaN || (x != x && y != y) ? T{0x7fff} : (x != x ? b : a);
  return x < y || (x == y && std::signbit(x)) ? a : b;
}

template <class T, bool NaN>
T larger(T a, T b) {
  const float x = to_float(a);
  const float y = to_float(b);
  if (x != x || y != y) return NaN || (x != x && y != y) ? T{0x7fff} : (x != x ? b : a);
  return x > y || (x == y && !std::signbit(x)) ? a : b;
}

template <class T>
void register_type(Registry& r, const std::string& type) {
  register_arithmetic<T, false, false>(r, "", type);
  both<T, 3>(r, "fma.rn.relu", type, [](T a, T b, T c) {
    return finish<T, false, false, true>(value<T, false>(a) * value<T, false>(b) + value<T, false>(c));
  });
  both<T, 1>(r, "neg", type, [](T a, T, T) { return T{static_cast<uint16_t>(a.bits ^ 0x8000)}; });
  both<T, 1>(r, "abs", type, [](T a, T, T) { return T{static_cast<uint16_t>(a.bits & 0x7fff)}; });
  both<T, 2>(r, "min", type, [](T a, T b, T) { return smaller<T, false>(a, b); });
  both<T, 2>(r, "max", type, [](T a, T b, T) { return larger<T, false>(a, b); });
  both<T, 2>(r, "min.NaN", type, [](T a, T b, T) { return smaller<T, true>(a, b); });
  both<T, 2>(r, "max.NaN", type, [](T a, T b, T) { return larger<T, true>(a, b); });
}

}  // namespace

void register_half(Registry& r) {
  register_type<Half>(r, ".f16");
  register_type<Bfloat>(r, ".bf16");
  register_arithmetic<Half, true, false>(r, ".ftz", ".f16");
  register_arithmetic<Half, false, true>(r, ".sat", ".f16");
  register_arithmetic<Half, true, true>(r, ".ftz.sat", ".f16");
  both<Half, 1>(r, "ex2.approx", ".f16", [](Half a, Half, Half) { return half_from_float(std::exp2(to_float(a))); });
  both<Bfloat, 1>(r, "ex2.approx.ftz", ".bf16",
                  [](Bfloat a, Bfloat, Bfloat) { return bfloat_from_float(std::exp2(to_float(a))); });
  both<Half, 1>(r, "tanh.approx", ".f16", [](Half a, Half, Half) { return half_from_float(std::tanh(to_float(a))); });
  both<Bfloat, 1>(r, "tanh.approx", ".bf16",
                  [](Bfloat a, Bfloat, Bfloat) { return bfloat_from_float(std::tanh(to_float(a))); });
}

}  // namespace emulator
