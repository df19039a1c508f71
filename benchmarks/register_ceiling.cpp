// Multiply-adds that never leave the registers: the rates that no kernel built on these instructions can pass.
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Two units with a latency of four or five cycles: ten chains keep them busy, and twelve fit into sixteen registers.
constexpr int kChains = 12;

using Vector = float __attribute__((vector_size(kVectorBytes)));

template <typename V, typename Step>
void run_chains(long iterations, V first, Step step, float* sink) {
  V accumulators[kChains];
  // Chains that start alike would be one chain to the compiler.
  for (int c = 0; c < kChains; ++c) accumulators[c] = first + static_cast<float>(c);
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) accumulators[c] = step(accumulators[c]);
  }
  V sum{};
  for (const V& accumulator : accumulators) sum += accumulator;
  *sink = sum[0];
}

#ifdef __AMX_BF16__
// Linux gives a process its tile registers on request.
bool has_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Four accumulators: a product's latency is that of three or four products.
double tile_products(long iterations, float* sink) {
  struct alignas(64) {
    unsigned char palette = 1, reserved[15] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) float values[16 * 16] = {};
  const long steps = iterations / 8;
  asm volatile("ldtilecfg %0" : : "m"(config));
  asm volatile(
      "tilezero %%tmm0; tilezero %%tmm1; tilezero %%tmm2; tilezero %%tmm3;"
      "tilezero %%tmm4; tilezero %%tmm5; tilezero %%tmm6; tilezero %%tmm7" ::);
  for (long i = 0; i < steps; ++i) {
    asm volatile(
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0; tdpbf16ps %%tmm7, %%tmm4, %%tmm1;"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2; tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(values), "r"(64L) : "memory");
  asm volatile("tilerelease");
  *sink = values[0];
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(steps);
}
#endif

// Both return the floating-point operations done, 0 where the processor that this is compiled for lacks the
// instruction. What was computed goes to `sink`, so that it has to be.
extern "C" double fma_float32(long iterations, float* sink) {
  const Vector factor = Vector{} + 0.999f;
  const Vector addend = Vector{} + 0.001f;
  run_chains(iterations, factor, [=](Vector x) { return x * factor + addend; }, sink);
  return 2.0 * kChains * (kVectorBytes / sizeof(float)) * static_cast<double>(iterations);
}

extern "C" double dot_bfloat16([[maybe_unused]] long iterations, [[maybe_unused]] float* sink) {
#ifdef __AMX_BF16__
  if (has_tiles()) return tile_products(iterations, sink);
#endif
#ifdef __AVX512BF16__
  const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.01f), _mm512_set1_ps(0.01f));
  run_chains(iterations, _mm512_setzero_ps(), [=](__m512 x) { return _mm512_dpbf16_ps(x, pairs, pairs); }, sink);
  return 2.0 * kChains * 32 * static_cast<double>(iterations);
#else
  return 0.0;
#endif
}
