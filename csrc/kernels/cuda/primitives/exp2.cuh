// Base-2 exponential and logarithm of the special-function unit.
#pragma once

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

}  // namespace anchor_attention::ptx
