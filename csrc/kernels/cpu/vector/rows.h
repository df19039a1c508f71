// Rows of one head between memory, in the type of the tensor, and scratch, in the working type.
#pragma once

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/simd.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

// The lengths of a tile's scratch: keys are processed in chunks that fit into the first-level cache with their
// operands.
#if defined(ANCHOR_ATTENTION_CHUNK_KEYS)
constexpr int64_t kChunkKeys = ANCHOR_ATTENTION_CHUNK_KEYS;
#else
// With 16 registers a multiple of the block's rows: a last block of four rows has too few independent sums.
constexpr int64_t kChunkKeys = kRegisters == 32 ? 64 : 96;
#endif
#if defined(ANCHOR_ATTENTION_TILE_VECTORS)
constexpr int64_t kTileVectors = ANCHOR_ATTENTION_TILE_VECTORS;
#else
constexpr int64_t kTileVectors = kVectorBytes == 64 ? 4 : 8;
#endif
static_assert(kTileVectors % kBlockVectors == 0);

template <typename T>
constexpr int64_t kTileQueries = kTileVectors * kLanes<T>;

template <typename T>
constexpr int64_t round_up_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Elements from one row of a head to the next where rows are read one below the other. Rows that are a multiple of
// eight cache lines apart would share the few sets of the first-level cache: 64 of them don't fit, and one more line
// separates them.
template <typename T>
constexpr int64_t row_stride(int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t padded = round_up_to_lanes<T>(n);
  return padded % (8 * kLine) == 0 ? padded + kLine : padded;
}

// Hands out pieces of a scratch buffer, or counts them where there is none.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void widen_row(const Storage* source, int64_t n, int64_t padded, T* target) {
  if constexpr (std::is_same_v<Storage, T>) {
    std::memcpy(target, source, n * sizeof(T));
  } else {
    for (int64_t d = 0; d < n; ++d) target[d] = widen(source[d]);
  }
  for (int64_t d = n; d < padded; ++d) target[d] = 0;
}

// Multiplies interleaved pairs by complex factors and rounds to the storage type, as the reference does.
template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void rotate_row(const T* source, const T* freqs, int64_t n, T* target) {
  for (int64_t i = 0; i < n; i += 2) {
    const T re = source[i] * freqs[i] - source[i + 1] * freqs[i + 1];
    const T im = source[i] * freqs[i + 1] + source[i + 1] * freqs[i];
    target[i] = widen(narrow<Storage>(re));
    target[i + 1] = widen(narrow<Storage>(im));
  }
}

// The inverse for gradients: multiplies by the conjugate factors, in the working type.
template <typename T>
ANCHOR_ATTENTION_INLINE void unrotate_row(const T* source, const T* freqs, int64_t n, T* target) {
  for (int64_t i = 0; i < n; i += 2) {
    const T re = source[i] * freqs[i] + source[i + 1] * freqs[i + 1];
    const T im = source[i + 1] * freqs[i] - source[i] * freqs[i + 1];
    target[i] = re;
    target[i + 1] = im;
  }
}

// grad_freqs += grad · conj(x)
template <typename T>
ANCHOR_ATTENTION_INLINE void add_freqs_grad(const T* grad, const T* x, int64_t n, T* grad_freqs) {
  for (int64_t i = 0; i < n; i += 2) {
    grad_freqs[i] += grad[i] * x[i] + grad[i + 1] * x[i + 1];
    grad_freqs[i + 1] += grad[i + 1] * x[i] - grad[i] * x[i + 1];
  }
}

template <typename Storage>
ANCHOR_ATTENTION_INLINE const Storage* row_of(const void* tensor, const Strides& strides, int64_t batch, int64_t token,
                                              int64_t head) {
  return static_cast<const Storage*>(tensor) + batch * strides.batch + token * strides.token + head * strides.head;
}

template <typename T>
ANCHOR_ATTENTION_INLINE const T* freqs_of(const void* freqs, const FreqsStrides& strides, int64_t batch,
                                          int64_t token) {
  return static_cast<const T*>(freqs) + 2 * (batch * strides.batch + token * strides.token);
}

// Some tokens of a head as rows [n_tokens, stride] of the working type.
template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void load_rows(const void* tensor, const Strides& strides, int64_t batch, int64_t head,
                                       int64_t begin, int64_t n_tokens, int64_t n, int64_t stride, T* rows) {
  for (int64_t i = 0; i < n_tokens; ++i) {
    widen_row(row_of<Storage>(tensor, strides, batch, begin + i, head), n, stride, rows + i * stride);
  }
}

// The queries of a tile as rows [n_queries, stride] of the working type, rotated.
template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void load_queries(const AttentionParams& p, int64_t batch, int64_t head, int64_t q_begin,
                                          int64_t n_queries, int64_t stride, T* rows) {
  load_rows<Storage>(p.q, p.q_strides, batch, head, q_begin, n_queries, p.head_dim, stride, rows);
  if (p.q_freqs == nullptr) return;
  for (int64_t i = 0; i < n_queries; ++i) {
    T* row = rows + i * stride;
    rotate_row<Storage>(row, freqs_of<T>(p.q_freqs, p.q_freqs_strides, batch, q_begin + i), p.head_dim, row);
  }
}

// A sum for each lane: one chain of additions would take longer than all other set-up of a tile.
template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE T dot(const T* a, const Storage* b, int64_t n) {
  Vector<T> sums{};
  int64_t d = 0;
  for (; d + kLanes<T> <= n; d += kLanes<T>) {
    T piece[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) piece[i] = widen(b[d + i]);
    sums += load(a + d) * load(piece);
  }
  T sum = 0;
  for (; d < n; ++d) sum += a[d] * widen(b[d]);
  for (int i = 0; i < kLanes<T>; ++i) sum += sums[i];
  return sum;
}

// What the backward needs of a tile in addition to its queries: dO as rows, and for each of `columns` queries lse in
// units of log 2 and delta = Σ_d dO · O − grad_lse. An lse of +inf makes a row's probabilities 0.
template <typename Storage, typename T = Working<Storage>>
ANCHOR_ATTENTION_INLINE void load_statistics(const BackwardTile& tile, int64_t columns, int64_t stride,
                                             T* grad_out_rows, T* tile_lse, T* tile_delta) {
  constexpr double kLog2E = 1.4426950408889634;
  const AttentionBackwardParams& p = *tile.params;
  const AttentionParams& f = p.forward;
  const int64_t out_stride = f.heads * f.value_dim;
  const int64_t first_row = (tile.batch * f.heads + tile.head) * f.n_queries + tile.q_begin;
  const T* lse = static_cast<const T*>(f.lse) + first_row;
  const T* grad_lse = p.grad_lse == nullptr ? nullptr : static_cast<const T*>(p.grad_lse) + first_row;
  const Storage* out = static_cast<const Storage*>(f.out) + (tile.batch * f.n_queries + tile.q_begin) * out_stride +
                       tile.head * f.value_dim;
  for (int64_t i = 0; i < columns; ++i) {
    tile_lse[i] = kInfinity<T>;
    tile_delta[i] = 0;
    if (i >= tile.n_queries) continue;
    T* grad_out_row = grad_out_rows + i * stride;
    widen_row(row_of<Storage>(p.grad_out, p.grad_out_strides, tile.batch, tile.q_begin + i, tile.head), f.value_dim,
              stride, grad_out_row);
    const T delta = dot(grad_out_row, out + i * out_stride, f.value_dim);
    tile_delta[i] = delta - (grad_lse == nullptr ? T(0) : grad_lse[i]);
    if (lse[i] != -kInfinity<T>) tile_lse[i] = static_cast<T>(lse[i] * kLog2E);
  }
}

// Adds rows [n_queries, stride] to the sums of grad_q.
template <typename T>
ANCHOR_ATTENTION_INLINE void add_grad_q(const BackwardTile& tile, int64_t stride, const T* rows) {
  const AttentionParams& f = tile.params->forward;
  T* grad_q = static_cast<T*>(tile.grad_q);
  for (int64_t i = 0; i < tile.n_queries; ++i) {
    for (int64_t d = 0; d < f.head_dim; ++d) grad_q[i * tile.grad_q_stride + d] += rows[i * stride + d];
  }
}

template <typename Operand>
constexpr int64_t operands(int64_t n) {
  return (n + kDepth<Operand> - 1) / kDepth<Operand>;
}

template <typename Operand>
ANCHOR_ATTENTION_INLINE Operand to_operand(Sum<Operand> first, [[maybe_unused]] Sum<Operand> second) {
  if constexpr (kDepth<Operand> == 2) {
    return {narrow<BFloat16>(first), narrow<BFloat16>(second)};
  } else {
    return first;
  }
}

// Rows [n_rows, row_stride] → [strips, operands along the row, strip_columns]: B of a product that sums along the row.
// Columns beyond the rows become zero. row_stride is a multiple of the vector's lanes, and the rows are padded to it.
template <typename Operand>
ANCHOR_ATTENTION_INLINE void to_panel(const Sum<Operand>* rows, int64_t n_rows, int64_t row_stride, int64_t row_length,
                                      Operand* panel) {
  constexpr int64_t kStrip = kStripColumns<Sum<Operand>>;
  constexpr int kStep = kDepth<Operand>;
  if constexpr (kStep == 1) {
    using T = Sum<Operand>;
    for (int64_t column = 0; column < kTileQueries<T>; column += kLanes<T>) {
      T* out = panel + column / kStrip * kStrip * row_length + column % kStrip;
      for (int64_t d = 0; d < row_length; d += kLanes<T>) {
        Vector<T> block[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) {
          block[i] = column + i < n_rows ? load(rows + (column + i) * row_stride + d) : Vector<T>{};
        }
        transpose_block<T>(block);
        for (int i = 0; i < kLanes<T>; ++i) {
          if (d + i < row_length) store(out + (d + i) * kStrip, block[i]);
        }
      }
    }
  } else {
    for (int64_t strip = 0; strip < kTileQueries<Sum<Operand>>; strip += kStrip) {
      const int64_t n = n_rows - strip < 0 ? 0 : n_rows - strip < kStrip ? n_rows - strip : kStrip;
      for (int64_t d = 0; d < row_length; d += kStep, panel += kStrip) {
        const int64_t next = d + kStep - 1 < row_length ? d + kStep - 1 : d;
        for (int64_t i = 0; i < n; ++i) {
          const Sum<Operand>* row = rows + (strip + i) * row_stride;
          panel[i] = to_operand<Operand>(row[d], next == d ? Sum<Operand>(0) : row[next]);
        }
        for (int64_t i = n; i < kStrip; ++i) panel[i] = Operand{};
      }
    }
  }
}

// Columns [strips, row_length, strip_columns] → rows [n_rows, stride], each divided by its sum. A sum of 0 says that
// every score was −inf: the row is 0, as without keys. Writes whole blocks of rows, and padding.
template <typename T>
ANCHOR_ATTENTION_INLINE void from_panel(const T* panel, const T* sums, int64_t n_rows, int64_t row_length,
                                        int64_t stride, T* rows) {
  constexpr int64_t kStrip = kStripColumns<T>;
  for (int64_t column = 0; column < n_rows; column += kLanes<T>) {
    const T* columns = panel + column / kStrip * kStrip * row_length + column % kStrip;
    const Vector<T> sum = load(sums + column);
    const Vector<T> inverse = sum == T(0) ? Vector<T>{} : 1 / sum;
    for (int64_t d = 0; d < stride; d += kLanes<T>) {
      Vector<T> block[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        block[i] = d + i < row_length ? load(columns + (d + i) * kStrip) * inverse : Vector<T>{};
      }
      transpose_block<T>(block);
      for (int i = 0; i < kLanes<T>; ++i) store(rows + (column + i) * stride + d, block[i]);
    }
  }
}

// Rows [n_rows, stride] → [operands along the rows, stride]: B of a product that sums over the rows.
template <typename Operand>
ANCHOR_ATTENTION_INLINE void to_stack(const Sum<Operand>* rows, int64_t n_rows, int64_t stride, Operand* stack) {
  constexpr int kStep = kDepth<Operand>;
  for (int64_t i = 0; i < n_rows; i += kStep) {
    const Sum<Operand>* row = rows + i * stride;
    const Sum<Operand>* next = row + (kStep - 1) * stride;
    for (int64_t d = 0; d < stride; ++d) {
      stack[i / kStep * stride + d] = to_operand<Operand>(row[d], i + kStep <= n_rows ? next[d] : Sum<Operand>(0));
    }
  }
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
