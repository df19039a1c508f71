// Softmax over chunks of keys with a running maximum, queries in the vectors' lanes.
#pragma once

#include "kernels/cpu/vector/outer_product.h"
#include "kernels/cpu/vector/rows.h"

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Stores scores and keeps the maximum of every column.
template <typename T>
struct StoreScores {
  T* scores;
  T* chunk_max;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t) const {
    T* out = scores + row * kStripColumns<T>;
    for (int j = 0; j < kVectors; ++j) {
      Vector<T> max = load(chunk_max + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        max = maximum(block.value[i][j], max);
        store(out + i * kStripColumns<T> + j * kLanes<T>, block.value[i][j]);
      }
      store(chunk_max + j * kLanes<T>, max);
    }
  }
};

template <typename T>
struct RescaleAndAdd {
  T* out_strip;
  const T* correction;

  template <int kRows, int kVectors>
  ANCHOR_ATTENTION_INLINE void operator()(const Block<kRows, kVectors, T>& block, int64_t row, int64_t) const {
    for (int j = 0; j < kVectors; ++j) {
      const Vector<T> factor = load(correction + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        T* out = out_strip + (row + i) * kStripColumns<T> + j * kLanes<T>;
        store(out, load(out) * factor + block.value[i][j]);
      }
    }
  }
};

// Takes the chunk's maximum into the running one and turns scores into probabilities, relative to it. They overwrite
// the scores: an operand lies no later than the first of its scores. factor ≥ 0.
//
// `Scratch` holds scores [chunk_keys, strip_columns], chunk_max and correction [strip_columns], row_max in units of log
// 2 and row_sum [tile_queries].
template <typename Operand, typename Scratch, typename T = Sum<Operand>>
static ANCHOR_ATTENTION_NOINLINE void online_softmax(const Scratch& s, int64_t n_keys, int64_t vectors,
                                                     int64_t strip_begin, T factor) {
  constexpr int64_t kStride = kStripColumns<T>;
  for (int64_t column = 0; column < vectors * kLanes<T>; column += kLanes<T>) {
    const Vector<T> old_max = load(s.row_max + strip_begin + column);
    const Vector<T> max = maximum(load(s.chunk_max + column) * factor, old_max);
    const Vector<T> correction = exp2(old_max - max);
    // The chunk is summed by itself: one long chain would round each small term at the size of the whole sum.
    Vector<T> sum{};
    const T* scores = s.scores + column;
    Operand* probabilities = reinterpret_cast<Operand*>(s.scores) + column;
    if constexpr (kDepth<Operand> == 1) {
      int64_t key = 0;
      for (; key + 4 <= n_keys; key += 4) {
        Vector<T> p[4];
        for (int i = 0; i < 4; ++i) p[i] = load(scores + (key + i) * kStride) * factor - max;
        for (int i = 0; i < 4; ++i) p[i] = exp2(p[i]);
        for (int i = 0; i < 4; ++i) store(probabilities + (key + i) * kStride, p[i]);
        sum += (p[0] + p[1]) + (p[2] + p[3]);
      }
      for (; key < n_keys; ++key) {
        const Vector<T> probability = exp2(load(scores + key * kStride) * factor - max);
        store(probabilities + key * kStride, probability);
        sum += probability;
      }
    } else {
      for (int64_t key = 0; key < n_keys; key += 2) {
        const Vector<T> first = exp2(load(scores + key * kStride) * factor - max);
        Vector<T> second{};
        if (key + 1 < n_keys) second = exp2(load(scores + (key + 1) * kStride) * factor - max);
        store(probabilities + key / 2 * kStride, pair_up(first, second));
        sum += first + second;
      }
    }
    store(s.row_max + strip_begin + column, max);
    store(s.row_sum + strip_begin + column, load(s.row_sum + strip_begin + column) * correction + sum);
    store(s.correction + column, correction);
  }
}

}  // namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA
