// Base-2 exponential and logarithm, on the special-function unit and on the FMA units.
#pragma once

#include <cstdint>

namespace anchor_attention::ptx {

// Maximum relative error 2^-22; −inf gives 0. Results below 2^-126 are flushed to zero.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Maximum absolute error 2^-22 within (0.5, 2), maximum relative error 2^-22 elsewhere.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float maximum_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 2^x for x ≤ 126 by eleven instructions of the FMA and integer units; what is below 2^-126 becomes zero, NaN stays.
// Maximum relative error 2^-22.5: the polynomial is the minimax one of degree 5 on [−1/2, 1/2] with p(0) = 1.
__device__ inline float exp2_polynomial(float x) {
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 · 2^23: the sum's low bits are the rounded integer
  const float clamped = maximum_or_nan(x, -127.0f);
  const float shifted = __fadd_rn(clamped, kRoundToInteger);
  const float fraction = __fsub_rn(clamped, __fsub_rn(shifted, kRoundToInteger));
  float value = 0.00132647273f;
  value = fmaf(value, fraction, 0.00967151299f);
  value = fmaf(value, fraction, 0.0555073358f);
  value = fmaf(value, fraction, 0.240222424f);
  value = fmaf(value, fraction, 0.693147004f);
  value = fmaf(value, fraction, 1.0f);
  const uint32_t power = (__float_as_uint(shifted) << 23) + 0x3f800000u;
  float result;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(__uint_as_float(power)));
  return result;
}

}  // namespace anchor_attention::ptx
