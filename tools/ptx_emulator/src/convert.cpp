// cvt and cvta.
#include <algorithm>
#include <limits>

#include "floating.h"

namespace emulator {
namespace {

template <class D, class S>
D saturate(S value) {
  using Wide = __int128;
  const Wide low = std::numeric_limits<D>::min();
  const Wide high = std::numeric_limits<D>::max();
  return static_cast<D>(std::clamp<Wide>(value, low, high));
}

template <class D, class S>
void integer_to_integer(Registry& r, const std::string& d, const std::string& s) {
  r["cvt." + d + "." + s] = lanes<D, S>([](S a) { return static_cast<D>(a); });
  r["cvt.sat." + d + "." + s] = lanes<D, S>([](S a) { return saturate<D>(a); });
}

enum class Integral { nearest, zero, down, up };

template <Integral Mode, class T>
T integral(T x) {
  switch (Mode) {
    case Integral::nearest:
      return std::nearbyint(x);
    case Integral::zero:
      return std::trunc(x);
    case Integral::down:
      return std::floor(x);
    default:
      return std::ceil(x);
  }
}

// Out of range saturates, with or without .sat; NaN gives 0.
template <class D>
D to_integer(double x) {
  if (x != x) return 0;
  if (x <= static_cast<double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (x >= static_cast<double>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(x);
}

template <Integral Mode, class D, class S>
void float_to_integer(Registry& r, const std::string& mode, const std::string& d, const std::string& s) {
  const auto convert = [](S a) {
    if constexpr (std::is_same_v<S, double>) {
      return to_integer<D>(integral<Mode>(a));
    } else {
      return to_integer<D>(integral<Mode>(to_float(a)));
    }
  };
  r["cvt" + mode + "." + d + "." + s] = r["cvt" + mode + ".sat." + d + "." + s] = lanes<D, S>(convert);
  if constexpr (std::is_same_v<S, float>) {
    r["cvt" + mode + ".ftz." + d + "." + s] = r["cvt" + mode + ".ftz.sat." + d + "." + s] =
        lanes<D, S>([](S a) { return to_integer<D>(integral<Mode>(flush<true>(a))); });
  }
}

template <class D>
void to_integer_modes(Registry& r, const std::string& d) {
  const auto sources = [&]<Integral Mode>(const std::string& mode) {
    float_to_integer<Mode, D, float>(r, mode, d, "f32");
    float_to_integer<Mode, D, double>(r, mode, d, "f64");
    float_to_integer<Mode, D, Half>(r, mode, d, "f16");
    float_to_integer<Mode, D, Bfloat>(r, mode, d, "bf16");
  };
  sources.template operator()<Integral::nearest>(".rni");
  sources.template operator()<Integral::zero>(".rzi");
  sources.template operator()<Integral::down>(".rmi");
  sources.template operator()<Integral::up>(".rpi");
}

template <class S>
void from_integer(Registry& r, const std::string& s) {
  const auto modes = [&]<class D, int Mode>(const std::string& name) {
    r["cvt" + name + "." + s] = lanes<D, S>([](S a) {
      if constexpr (Mode == FE_TONEAREST) {
        return static_cast<D>(a);
      } else {
        return rounded<D>(Mode, [=] { return static_cast<D>(a); });
      }
    });
  };
  modes.template operator()<float, FE_TONEAREST>(".rn.f32");
  modes.template operator()<float, FE_TOWARDZERO>(".rz.f32");
  modes.template operator()<float, FE_DOWNWARD>(".rm.f32");
  modes.template operator()<float, FE_UPWARD>(".rp.f32");
  modes.template operator()<double, FE_TONEAREST>(".rn.f64");
  modes.template operator()<double, FE_TOWARDZERO>(".rz.f64");
  modes.template operator()<double, FE_DOWNWARD>(".rm.f64");
  modes.template operator()<double, FE_UPWARD>(".rp.f64");
  // 64-bit values round to float64 first: what they lose there lies far below what a 16-bit type keeps.
  r["cvt.rn.f16." + s] = lanes<Half, S>([](S a) { return from_double<Half>(static_cast<double>(a)); });
  r["cvt.rn.bf16." + s] = lanes<Bfloat, S>([](S a) { return from_double<Bfloat>(static_cast<double>(a)); });
}

template <class S>
void from_integer_type(Registry& r, const std::string& s) {
  const auto to = [&]<class D>(const std::string& d) { integer_to_integer<D, S>(r, d, s); };
  to.template operator()<uint8_t>("u8");
  to.template operator()<int8_t>("s8");
  to.template operator()<uint16_t>("u16");
  to.template operator()<int16_t>("s16");
  to.template operator()<uint32_t>("u32");
  to.template operator()<int32_t>("s32");
  to.template operator()<uint64_t>("u64");
  to.template operator()<int64_t>("s64");
  from_integer<S>(r, s);
}

template <Integral Mode>
void register_integral(Registry& r, const std::string& mode) {
  r["cvt" + mode + ".f32.f32"] = lanes<float, float>([](float a) { return canonical(integral<Mode>(a)); });
  r["cvt" + mode + ".ftz.f32.f32"] =
      lanes<float, float>([](float a) { return canonical(integral<Mode>(flush<true>(a))); });
  r["cvt" + mode + ".f64.f64"] = lanes<double, double>([](double a) { return integral<Mode>(a); });
  r["cvt" + mode + ".f16.f16"] = lanes<Half, Half>([](Half a) { return half_from_float(integral<Mode>(to_float(a))); });
}

// tf32 keeps 10 bits of the fraction; the rest of the register is 0.
uint32_t round_to_tf32(uint32_t bits, uint32_t increment) {
  if ((bits & 0x7f800000) == 0x7f800000) return (bits & 0x7fffff) ? 0x7fffffff : bits;
  return (bits + increment) & ~uint32_t{0x1fff};
}

template <class T, bool TowardZero, bool Relu>
T narrow(float x) {
  if (Relu && !(x > 0) && x == x) x = 0;
  if constexpr (!TowardZero && std::is_same_v<T, Half>) {
    return half_from_float(x);
  } else if constexpr (!TowardZero) {
    return bfloat_from_float(x);
  } else {
    return from_double<T, true>(x);
  }
}

// An infinite result becomes the largest finite one.
template <class T>
T limit_to_finite(T x) {
  constexpr uint16_t infinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
  return (x.bits & 0x7fff) == infinity ? T{static_cast<uint16_t>((x.bits & 0x8000) | (infinity - 1))} : x;
}

template <class T, bool TowardZero, bool Relu, bool Satfinite>
T to_sixteen_bits(float x) {
  T result = narrow<T, TowardZero, Relu>(x);
  return Satfinite ? limit_to_finite(result) : result;
}

template <class T, bool TowardZero, bool Relu, bool Satfinite>
void register_narrow(Registry& r, const std::string& modifiers, const std::string& type) {
  r["cvt" + modifiers + "." + type + ".f32"] =
      lanes<T, float>([](float a) { return to_sixteen_bits<T, TowardZero, Relu, Satfinite>(a); });
  // The first operand goes to the high half.
  r["cvt" + modifiers + "." + type + "x2.f32"] = lanes<Pair, float, float>([](float a, float b) {
    return Pair{static_cast<uint32_t>(to_sixteen_bits<T, TowardZero, Relu, Satfinite>(a).bits) << 16 |
                to_sixteen_bits<T, TowardZero, Relu, Satfinite>(b).bits};
  });
}

template <class T>
void register_narrow_type(Registry& r, const std::string& type) {
  register_narrow<T, false, false, false>(r, ".rn", type);
  register_narrow<T, false, true, false>(r, ".rn.relu", type);
  register_narrow<T, true, false, false>(r, ".rz", type);
  register_narrow<T, true, true, false>(r, ".rz.relu", type);
  register_narrow<T, false, false, true>(r, ".rn.satfinite", type);
  register_narrow<T, false, true, true>(r, ".rn.relu.satfinite", type);
}

template <int Mode>
float narrow_double(double a) {
  if constexpr (Mode == FE_TONEAREST) {
    return static_cast<float>(a);
  } else {
    return rounded<float>(Mode, [=] { return static_cast<float>(a); });
  }
}

template <uint64_t Window>
void register_window(Registry& r, const std::string& space) {
  r["cvta." + space + ".u64"] = lanes<uint64_t, uint64_t>([](uint64_t a) { return a | Window; });
  r["cvta.to." + space + ".u64"] = lanes<uint64_t, uint64_t>([](uint64_t a) { return a & ~Window; });
}

}  // namespace

void register_convert(Registry& r) {
  from_integer_type<uint8_t>(r, "u8");
  from_integer_type<int8_t>(r, "s8");
  from_integer_type<uint16_t>(r, "u16");
  from_integer_type<int16_t>(r, "s16");
  from_integer_type<uint32_t>(r, "u32");
  from_integer_type<int32_t>(r, "s32");
  from_integer_type<uint64_t>(r, "u64");
  from_integer_type<int64_t>(r, "s64");
  to_integer_modes<uint8_t>(r, "u8");
  to_integer_modes<int8_t>(r, "s8");
  to_integer_modes<uint16_t>(r, "u16");
  to_integer_modes<int16_t>(r, "s16");
  to_integer_modes<uint32_t>(r, "u32");
  to_integer_modes<int32_t>(r, "s32");
  to_integer_modes<uint64_t>(r, "u64");
  to_integer_modes<int64_t>(r, "s64");
  register_integral<Integral::nearest>(r, ".rni");
  register_integral<Integral::zero>(r, ".rzi");
  register_integral<Integral::down>(r, ".rmi");
  register_integral<Integral::up>(r, ".rpi");
  register_narrow_type<Half>(r, "f16");
  register_narrow_type<Bfloat>(r, "bf16");
  r["cvt.f32.f16"] = lanes<float, Half>([](Half a) { return canonical(to_float(a)); });
  r["cvt.ftz.f32.f16"] = r["cvt.f32.f16"];
  r["cvt.f32.bf16"] = lanes<float, Bfloat>([](Bfloat a) { return canonical(to_float(a)); });
  r["cvt.f64.f16"] = lanes<double, Half>([](Half a) { return static_cast<double>(to_float(a)); });
  r["cvt.f64.f32"] = lanes<double, float>([](float a) { return static_cast<double>(a); });
  r["cvt.ftz.f64.f32"] = lanes<double, float>([](float a) { return static_cast<double>(flush<true>(a)); });
  r["cvt.rn.f32.f64"] = lanes<float, double>([](double a) { return canonical(narrow_double<FE_TONEAREST>(a)); });
  r["cvt.rz.f32.f64"] = lanes<float, double>([](double a) { return canonical(narrow_double<FE_TOWARDZERO>(a)); });
  r["cvt.rm.f32.f64"] = lanes<float, double>([](double a) { return canonical(narrow_double<FE_DOWNWARD>(a)); });
  r["cvt.rp.f32.f64"] = lanes<float, double>([](double a) { return canonical(narrow_double<FE_UPWARD>(a)); });
  r["cvt.rn.f16.f64"] = lanes<Half, double>([](double a) { return from_double<Half>(a); });
  r["cvt.rn.bf16.f64"] = lanes<Bfloat, double>([](double a) { return from_double<Bfloat>(a); });
  r["cvt.f32.f32"] = lanes<float, float>([](float a) { return a; });
  r["cvt.ftz.f32.f32"] = lanes<float, float>([](float a) { return canonical(flush<true>(a)); });
  r["cvt.sat.f32.f32"] = lanes<float, float>([](float a) { return clamp_to_unit(a); });
  r["cvt.ftz.sat.f32.f32"] = lanes<float, float>([](float a) { return clamp_to_unit(flush<true>(a)); });
  using U = uint32_t;
  r["cvt.rna.tf32.f32"] = lanes<U, U>([](U a) { return round_to_tf32(a, 0x1000); });
  r["cvt.rn.tf32.f32"] = lanes<U, U>([](U a) { return round_to_tf32(a, 0xfff + (a >> 13 & 1)); });
  r["cvt.rz.tf32.f32"] = lanes<U, U>([](U a) { return round_to_tf32(a, 0); });
  register_window<kSharedWindow>(r, "shared");
  register_window<kLocalWindow>(r, "local");
  register_window<kConstWindow>(r, "const");
  register_window<kParamWindow>(r, "param");
  register_window<0>(r, "global");
}

}  // namespace emulator
