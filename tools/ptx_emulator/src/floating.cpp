// float32 and float64 arithmetic, and the approximations of the special function unit.
#include "floating.h"

#include <cfloat>

namespace emulator {
namespace {

// 2^x to about 1e-13, in a form that the compiler vectorises: Taylor on |f| <= 1/2, then the exponent.
double exp2_double(double x) {
  const double limited = x < -1000.0 ? -1000.0 : (x > 1000.0 ? 1000.0 : x);
  // Adding and subtracting 1.5·2^52 rounds to an integer.
  const double shifted = limited + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double f = (limited - n) * 0.69314718055994530942;
  double sum = 1.0 / 479001600;
  sum = sum * f + 1.0 / 39916800;
  sum = sum * f + 1.0 / 3628800;
  sum = sum * f + 1.0 / 362880;
  sum = sum * f + 1.0 / 40320;
  sum = sum * f + 1.0 / 5040;
  sum = sum * f + 1.0 / 720;
  sum = sum * f + 1.0 / 120;
  sum = sum * f + 1.0 / 24;
  sum = sum * f + 1.0 / 6;
  sum = sum * f + 1.0 / 2;
  sum = sum * f + 1.0;
  sum = sum * f + 1.0;
  const uint64_t exponent = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(n)) + 1023) << 52;
  const double result = sum * std::bit_cast<double>(exponent);
  return x != x ? x : result;
}

template <class T>
T minimum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

template <class T>
T maximum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// x / y for |y| in (2^126, 2^128) gives 0, as the reciprocal underflows.
float divide_approx(float a, float b) {
  const float magnitude = std::abs(b);
  if (magnitude > 0x1p126f && !std::isinf(b))
    return std::isinf(a) ? NAN : std::copysign(0.0f, a) * std::copysign(1.0f, b);
  return a / b;
}

template <class T, bool Ftz, bool Sat>
T finish(T x) {
  x = flush<Ftz>(x);
  if constexpr (Sat) x = clamp_to_unit(x);
  return canonical(x);
}

template <class T, bool Ftz, bool Sat, int Mode>
void register_rounded(Registry& r, const std::string& modifiers) {
  const auto in_mode = [](auto operation) {
    if constexpr (Mode == FE_TONEAREST) {
      return operation();
    } else {
      return rounded<T>(Mode, operation);
    }
  };
  using In = decltype(in_mode);
  r["add" + modifiers] =
      lanes<T, T, T>([](T a, T b) { return finish<T, Ftz, Sat>(In{}([=] { return flush<Ftz>(a) + flush<Ftz>(b); })); });
  r["sub" + modifiers] =
      lanes<T, T, T>([](T a, T b) { return finish<T, Ftz, Sat>(In{}([=] { return flush<Ftz>(a) - flush<Ftz>(b); })); });
  r["mul" + modifiers] =
      lanes<T, T, T>([](T a, T b) { return finish<T, Ftz, Sat>(In{}([=] { return flush<Ftz>(a) * flush<Ftz>(b); })); });
  r["fma" + modifiers] = r["mad" + modifiers] = lanes<T, T, T, T>([](T a, T b, T c) {
    return finish<T, Ftz, Sat>(In{}([=] { return std::fma(flush<Ftz>(a), flush<Ftz>(b), flush<Ftz>(c)); }));
  });
  if constexpr (!Sat) {
    r["div" + modifiers] = lanes<T, T, T>(
        [](T a, T b) { return finish<T, Ftz, false>(In{}([=] { return flush<Ftz>(a) / flush<Ftz>(b); })); });
    r["rcp" + modifiers] =
        lanes<T, T>([](T a) { return finish<T, Ftz, false>(In{}([=] { return T{1} / flush<Ftz>(a); })); });
    r["sqrt" + modifiers] =
        lanes<T, T>([](T a) { return finish<T, Ftz, false>(In{}([=] { return std::sqrt(flush<Ftz>(a)); })); });
  }
}

template <class T, bool Ftz, bool Sat>
void register_modes(Registry& r, const std::string& modifiers) {
  register_rounded<T, Ftz, Sat, FE_TONEAREST>(r, ".rn" + modifiers);
  register_rounded<T, Ftz, Sat, FE_TOWARDZERO>(r, ".rz" + modifiers);
  register_rounded<T, Ftz, Sat, FE_DOWNWARD>(r, ".rm" + modifiers);
  register_rounded<T, Ftz, Sat, FE_UPWARD>(r, ".rp" + modifiers);
  for (const char* opcode : {"add", "sub", "mul"}) r[opcode + modifiers] = r[std::string(opcode) + ".rn" + modifiers];
}

template <class T, bool Ftz>
void register_simple(Registry& r, const std::string& modifiers) {
  r["min" + modifiers] = lanes<T, T, T>([](T a, T b) { return canonical(minimum(flush<Ftz>(a), flush<Ftz>(b))); });
  r["max" + modifiers] = lanes<T, T, T>([](T a, T b) { return canonical(maximum(flush<Ftz>(a), flush<Ftz>(b))); });
  r["abs" + modifiers] = lanes<T, T>([](T a) { return std::abs(flush<Ftz>(a)); });
  r["neg" + modifiers] = lanes<T, T>([](T a) { return -flush<Ftz>(a); });
}

template <bool Ftz>
void register_float(Registry& r, const std::string& ftz) {
  const std::string suffix = ftz + ".f32";
  register_simple<float, Ftz>(r, suffix);
  r["min" + ftz + ".NaN.f32"] = lanes<float, float, float>(
      [](float a, float b) { return canonical(a != a || b != b ? NAN : minimum(flush<Ftz>(a), flush<Ftz>(b))); });
  r["max" + ftz + ".NaN.f32"] = lanes<float, float, float>(
      [](float a, float b) { return canonical(a != a || b != b ? NAN : maximum(flush<Ftz>(a), flush<Ftz>(b))); });
  const auto unary = [](auto f) {
    using F = decltype(f);
    return lanes<float, float>(
        [](float a) { return canonical(flush<Ftz>(static_cast<float>(F{}(static_cast<double>(flush<Ftz>(a)))))); });
  };
  r["ex2.approx" + suffix] = unary([](double a) { return exp2_double(a); });
  r["lg2.approx" + suffix] = unary([](double a) { return std::log2(a); });
  r["rcp.approx" + suffix] = unary([](double a) { return 1 / a; });
  r["sqrt.approx" + suffix] = unary([](double a) { return std::sqrt(a); });
  r["rsqrt.approx" + suffix] = unary([](double a) { return 1 / std::sqrt(a); });
  r["sin.approx" + suffix] = unary([](double a) { return std::sin(a); });
  r["cos.approx" + suffix] = unary([](double a) { return std::cos(a); });
  r["div.approx" + suffix] = lanes<float, float, float>(
      [](float a, float b) { return finish<float, Ftz, false>(divide_approx(flush<Ftz>(a), flush<Ftz>(b))); });
  r["div.full" + suffix] = lanes<float, float, float>(
      [](float a, float b) { return finish<float, Ftz, false>(flush<Ftz>(a) / flush<Ftz>(b)); });
}

// From the upper half of the operand, to the upper half of the result; subnormal numbers count as zero.
double reciprocal_of_upper_half(double a) {
  const auto upper_half = [](double value) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(value) & 0xffffffff00000000);
  };
  const auto flushed = [](double value) { return std::abs(value) < DBL_MIN ? std::copysign(0.0, value) : value; };
  if (std::isnan(a)) return std::bit_cast<double>(uint64_t{0x7fffffff00000000});
  return flushed(upper_half(1 / flushed(upper_half(a))));
}

}  // namespace

void register_floating(Registry& r) {
  register_modes<float, false, false>(r, ".f32");
  register_modes<float, true, false>(r, ".ftz.f32");
  register_modes<float, false, true>(r, ".sat.f32");
  register_modes<float, true, true>(r, ".ftz.sat.f32");
  register_modes<double, false, false>(r, ".f64");
  register_float<false>(r, "");
  register_float<true>(r, ".ftz");
  register_simple<double, false>(r, ".f64");
  r["rcp.approx.ftz.f64"] = lanes<double, double>([](double a) { return reciprocal_of_upper_half(a); });
  r["tanh.approx.f32"] = lanes<float, float>([](float a) { return canonical(std::tanh(a)); });
  // The sign of the first operand on the magnitude of the second.
  r["copysign.f32"] = lanes<float, float, float>([](float a, float b) { return std::copysign(b, a); });
  r["copysign.f64"] = lanes<double, double, double>([](double a, double b) { return std::copysign(b, a); });
}

}  // namespace emulator
