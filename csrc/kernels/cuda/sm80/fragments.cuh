// Products of tiles in shared memory. Rows of a tile are `kStride` bytes apart.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/range_walk.cuh"
#include "kernels/cuda/primitives/ldmatrix.cuh"
#include "kernels/cuda/primitives/shared_memory.cuh"
#include "kernels/cuda/sm80/precision.cuh"

namespace anchor_attention::sm80 {

__device__ inline uint32_t lane() { return threadIdx.x % 32; }

// Where a lane reads, relative to the tile's first byte, for a (16 rows × 32 bytes), b (16 rows × 32 bytes, one row per
// column of the product) and transposed b (one row per contracted index).
template <int kStride>
__device__ inline uint32_t lane_offset_a() {
  return lane() % 16 * kStride + lane() / 16 * 16;
}

template <int kStride>
__device__ inline uint32_t lane_offset_b() {
  return (lane() % 8 + lane() / 16 * 8) * kStride + lane() / 8 % 2 * 16;
}

template <class P, int kStride>
__device__ inline uint32_t lane_offset_transposed_b() {
  if constexpr (kBytes<P> == 2) return lane_offset_a<kStride>();
  return lane() % 4 * 2 * kStride + lane() / 4 * 4;
}

template <class P>
__device__ inline void load_a(Fragment<P, 4>& a, uint32_t address) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, address);
#pragma unroll
  for (int i = 0; i < 4; ++i) set_fragment(a, i, r[i]);
}

// Two neighbouring column blocks of 8.
template <class P>
__device__ inline void load_b(Fragment<P, 2> (&b)[2], uint32_t address) {
  uint32_t r[4];
  ptx::ldmatrix_x4(r, address);
#pragma unroll
  for (int i = 0; i < 4; ++i) set_fragment(b[i / 2], i % 2, r[i]);
}

// The same from a tile whose rows are the contracted axis. There is no transposing load of 32-bit elements; those are
// read one by one, contracted indices 2t and 2t + 1 in the slots t and t + 4, which is where the accumulator of the
// preceding product has them.
template <class P, int kStride>
__device__ inline void load_transposed_b(Fragment<P, 2> (&b)[2], uint32_t address) {
  uint32_t r[4];
  if constexpr (kBytes<P> == 2) {
    ptx::ldmatrix_x4_transposed(r, address);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = ptx::load_shared(address + i % 2 * kStride + i / 2 * 32);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) set_fragment(b[i / 2], i % 2, r[i]);
}

// Accumulators of 16 rows × kMmaK columns, from column block `kMmaK / 8 · k` on, become operand a.
template <class P, int kColumnBlocks>
__device__ inline void accumulators_to_a(Fragment<P, 4>& a, const float (&acc)[kColumnBlocks][4], int k) {
  if constexpr (kBytes<P> == 2) {
    a.words[0] = P::pack(acc[2 * k][0], acc[2 * k][1]);
    a.words[1] = P::pack(acc[2 * k][2], acc[2 * k][3]);
    a.words[2] = P::pack(acc[2 * k + 1][0], acc[2 * k + 1][1]);
    a.words[3] = P::pack(acc[2 * k + 1][2], acc[2 * k + 1][3]);
  } else {
    set_fragment(a, 0, __float_as_uint(acc[k][0]));
    set_fragment(a, 1, __float_as_uint(acc[k][2]));
    set_fragment(a, 2, __float_as_uint(acc[k][1]));
    set_fragment(a, 3, __float_as_uint(acc[k][3]));
  }
}

template <int kRowBlocks, int kColumnBlocks>
using Accumulators = float[kRowBlocks][kColumnBlocks][4];

template <int kRowBlocks, int kColumnBlocks>
__device__ inline void clear(Accumulators<kRowBlocks, kColumnBlocks>& acc) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
    }
  }
}

// The row of the tile that a thread's accumulators of row block `m` hold, `row` 0 or 1.
template <int kRowBlocks>
__device__ inline int32_t accumulator_row(int m, int row) {
  return static_cast<int32_t>(threadIdx.x / 32) * 16 * kRowBlocks + 16 * m + static_cast<int32_t>(lane() / 4) + 8 * row;
}

// Warps whose rows lie beyond the end of a short group load and wait with the others, but compute nothing.
template <int kRowBlocks>
__device__ inline bool warp_has_rows(const WorkItem& work) {
  return work.begin + static_cast<int32_t>(threadIdx.x / 32) * 16 * kRowBlocks < work.end;
}

// Puts `value` into the columns whose bit of `valid` is clear.
template <int kRowBlocks, int kColumnBlocks>
__device__ inline void fill_masked(Accumulators<kRowBlocks, kColumnBlocks>& acc, uint64_t valid, float value) {
  if ((~valid & low_bits(8 * kColumnBlocks)) == 0) return;
  const uint64_t mine = valid >> lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((mine >> (8 * n + i % 2) & 1) != 0) continue;
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) acc[m][n][i] = value;
    }
  }
}

// How far to unroll over the contracted head_dim: operands loaded and split many steps ahead run out of registers.
template <class P, int kSteps>
inline constexpr int kUnrolledSteps = P::kPrecision == Precision::tf32x3 ? 1
                                      : kSteps > 8                       ? 4
                                                                         : kSteps;

// The widest tiles serve head sizes down to half their own and skip channels that do not exist, this many at a time.
// The branches also end the stretches over which the compiler schedules: without them it loads so far ahead that three
// products spill.
template <int kHeadDim>
inline constexpr bool kServesManySizes = kHeadDim > 128;
template <class P>
inline constexpr int kChannelsPassedOver = P::kPrecision == Precision::tf32x3 ? 32 : 64;

// acc += A · Bᵀ over `kHeadDim`: rows of A against rows of B.
template <class P, int kHeadDim, int kStride, int kRowBlocks, int kColumnBlocks>
__device__ inline void qk_gemm(Accumulators<kRowBlocks, kColumnBlocks>& acc, uint32_t a_address, uint32_t b_address,
                               int32_t head_dim) {
  constexpr int kSteps = kHeadDim / kMmaK<P>;
  constexpr int kUnrolled = kUnrolledSteps<P, kSteps>;
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kUnrolled) {
    if (kServesManySizes<kHeadDim> && first * kMmaK<P> >= head_dim) break;
#pragma unroll
    for (int k = first; k < first + kUnrolled; ++k) {
      Fragment<P, 4> a[kRowBlocks];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) load_a(a[m], a_address + m * 16 * kStride + k * 32);
#pragma unroll
      for (int n = 0; n < kColumnBlocks; n += 2) {
        Fragment<P, 2> b[2];
        load_b(b, b_address + n * 8 * kStride + k * 32);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          mma(acc[m][n], a[m], b[0]);
          mma(acc[m][n + 1], a[m], b[1]);
        }
      }
    }
  }
}

// acc += scores · B: scores are accumulators of an earlier product, the rows of B its columns.
template <class P, int kStride, int kRowBlocks, int kScoreBlocks, int kColumnBlocks>
__device__ inline void pv_gemm(Accumulators<kRowBlocks, kColumnBlocks>& acc,
                               const Accumulators<kRowBlocks, kScoreBlocks>& scores, uint32_t b_address,
                               int32_t head_dim) {
#pragma unroll
  for (int k = 0; k < kScoreBlocks * 8 / kMmaK<P>; ++k) {
    Fragment<P, 4> a[kRowBlocks];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) accumulators_to_a(a[m], scores[m], k);
#pragma unroll
    for (int n = 0; n < kColumnBlocks; n += 2) {
      if (kServesManySizes<8 * kColumnBlocks> && 8 * n % kChannelsPassedOver<P> == 0 && 8 * n >= head_dim) break;
      Fragment<P, 2> b[2];
      load_transposed_b<P, kStride>(b, b_address + k * kMmaK<P> * kStride + n * 8 * kBytes<P>);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        mma(acc[m][n], a[m], b[0]);
        mma(acc[m][n + 1], a[m], b[1]);
      }
    }
  }
}

}  // namespace anchor_attention::sm80
