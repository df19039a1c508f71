// The one matrix product that all passes are made of: C[m, n] = Σ_k A(m, k) · B(k, n), with C in registers.
#pragma once

#include <utility>

#include "kernels/cpu/vector/simd.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// C's register block, rows × vectors. B's vectors and one broadcast of A must fit beside it; more vectors than rows
// would load more than it multiplies. Other values are for trying them out.
#if defined(ANCHOR_ATTENTION_BLOCK_VECTORS)
constexpr int kBlockVectors = ANCHOR_ATTENTION_BLOCK_VECTORS;
#else
constexpr int kBlockVectors = kRegisters == 32 ? 4 : 2;
#endif
template <int kVectors>
constexpr int kBlockRows = kRegisters == 32 || kVectors < 3 ? 6 : 12 / kVectors;

// Steps of the summed axis in one turn of the loop: a step of 6 × 2 has 20 instructions, and those of the loop itself
// would be three more in every step.
#if defined(ANCHOR_ATTENTION_UNROLL)
constexpr int kUnroll = ANCHOR_ATTENTION_UNROLL;
#else
constexpr int kUnroll = kRegisters == 32 ? 1 : 4;
#endif

// A is read operand by operand: A(m, k) = a[m * row_stride + k * step_stride]. So it may be transposed at no cost.
template <typename Operand>
struct Broadcast {
  const Operand* data;
  int64_t row_stride;
  int64_t step_stride;
};

// Columns of a block: panels lie strip by strip, so that a block's operands are neighbours in the cache.
template <typename T>
constexpr int64_t kStripColumns = kBlockVectors * kLanes<T>;

// B is read in whole vectors: B(k, n) = b[n / kStripColumns * strip_stride + k * step_stride + n % kStripColumns].
template <typename Operand>
struct Rows {
  const Operand* data;
  int64_t step_stride;
  int64_t strip_stride = kStripColumns<Operand>;
};

template <int kRows, int kVectors, typename T>
struct Block {
  Vector<T> value[kRows][kVectors];
};

template <int kRows, int kVectors, typename Operand>
ANCHOR_ATTENTION_INLINE Block<kRows, kVectors, Sum<Operand>> multiply(Broadcast<Operand> a, Rows<Operand> b,
                                                                      int64_t steps) {
  // Not in the block itself: where an epilogue loops over its rows the block has to be in memory, and the compiler
  // would write every sum to it in every step.
  Vector<Sum<Operand>> sums[kRows][kVectors] = {};
  const Operand* a_step = a.data;
  const Operand* b_step = b.data;
#pragma GCC unroll kUnroll
  for (int64_t k = 0; k < steps; ++k) {
    Vector<Operand> vectors[kVectors];
    for (int j = 0; j < kVectors; ++j) vectors[j] = load(b_step + j * kLanes<Operand>);
    for (int i = 0; i < kRows; ++i) {
      const Vector<Operand> scalar = splat(a_step[i * a.row_stride]);
      for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add(scalar, vectors[j], sums[i][j]);
    }
    a_step += a.step_stride;
    b_step += b.step_stride;
  }
  Block<kRows, kVectors, Sum<Operand>> c;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) c.value[i][j] = sums[i][j];
  }
  return c;
}

template <int kRows, int kVectors, typename Operand, typename Epilogue>
ANCHOR_ATTENTION_INLINE void row_block(int64_t rows, Broadcast<Operand> a, Rows<Operand> b, int64_t steps, int64_t row,
                                       int64_t column, const Epilogue& epilogue) {
  if (rows == kRows) {
    epilogue(multiply<kRows, kVectors>(a, b, steps), row, column);
  } else if constexpr (kRows > 1) {
    row_block<kRows - 1, kVectors>(rows, a, b, steps, row, column, epilogue);
  }
}

// Asks for what an epilogue adds to, while the sums are formed: rows of a wide matrix lie too far apart for the
// processor to foresee them.
template <int kRows, typename Epilogue>
ANCHOR_ATTENTION_INLINE void prefetch(const Epilogue& epilogue, int64_t row, int64_t column) {
  if constexpr (requires { epilogue.template prefetch<kRows>(row, column); }) {
    epilogue.template prefetch<kRows>(row, column);
  }
}

// A separate function: inside a larger one the compiler gives registers that the block needs to other values.
template <int kVectors, typename Operand, typename Epilogue>
static ANCHOR_ATTENTION_NOINLINE void row_blocks(int64_t rows, Broadcast<Operand> a, Rows<Operand> b, int64_t steps,
                                                 int64_t column, Epilogue epilogue) {
  constexpr int kRows = kBlockRows<kVectors>;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    prefetch<kRows>(epilogue, row, column);
    epilogue(multiply<kRows, kVectors>(a, b, steps), row, column);
    a.data += kRows * a.row_stride;
  }
  if (row < rows) row_block<kRows - 1, kVectors>(rows - row, a, b, steps, row, column, epilogue);
}

// One strip of columns. Calls epilogue(block, row, column) for every block of C.
template <int kVectors = kBlockVectors, typename Operand, typename Epilogue>
ANCHOR_ATTENTION_INLINE void strip_product(int64_t vectors, int64_t rows, int64_t steps, Broadcast<Operand> a,
                                           Rows<Operand> b, int64_t column, const Epilogue& epilogue) {
  if (vectors >= kVectors) {
    row_blocks<kVectors>(rows, a, b, steps, column, epilogue);
  } else if constexpr (kVectors > 1) {
    strip_product<kVectors - 1>(vectors, rows, steps, a, b, column, epilogue);
  }
}

// `columns` is a multiple of the vector's lanes; `steps` counts operands.
template <typename Operand, typename Epilogue>
ANCHOR_ATTENTION_INLINE void outer_product(int64_t rows, int64_t columns, int64_t steps, Broadcast<Operand> a,
                                           Rows<Operand> b, const Epilogue& epilogue) {
  for (int64_t column = 0; column < columns; column += kStripColumns<Operand>) {
    strip_product((columns - column) / kLanes<Operand>, rows, steps, a, b, column, epilogue);
    b.data += b.strip_stride;
  }
}

// An epilogue that adds the block to a matrix in memory.
template <typename T>
struct AddTo {
  T* target;
  int64_t row_stride;

  template <int kRows>
  ANCHOR_ATTENTION_INLINE void prefetch(int64_t row, int64_t column) const {
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(target + (row + i) * row_stride + column, 1);
  }

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t column) const {
    for (int i = 0; i < kRows; ++i) {
      T* out = target + (row + i) * row_stride + column;
      for (int j = 0; j < kVectors; ++j) store(out + j * kLanes<T>, load(out + j * kLanes<T>) + block.value[i][j]);
    }
  }
};

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
