// What kernels of every generation receive by value. Plain C++: launch plans are built, stored and compared without
// CUDA.
#pragma once

#include <cstdint>

#include "params.h"

namespace anchor_attention::cuda {

// A strided [batch, tokens, heads, head_dim] tensor. `vectorised` when every 16-byte chunk of a row is 16-byte aligned.
struct TensorView {
  const void* data;
  Strides strides;
  int32_t vectorised;
};

// Rows [begin, end) of the stationary axis that attend to ranges [first_range, next group's first_range) of the
// streamed axis. Each of its tiles is processed by `n_splits` items, which share accumulators when there are
// several.
struct ScheduleGroup {
  int32_t first_item;
  int32_t begin;
  int32_t end;
  int32_t first_range;
  int32_t n_splits;
  int32_t first_accumulator;
};
constexpr int kWordsPerGroup = 6;
static_assert(sizeof(ScheduleGroup) == kWordsPerGroup * sizeof(int32_t));

// Words: n_groups + 1 groups (the last one closes the prefix sums), then the ranges as pairs. They cover every row of
// the stationary axis: rows that attend to nothing are groups without ranges.
constexpr int kInlineWords = 448;
struct ScheduleView {
  const int32_t* device_words;  // null when `inline_words` hold the schedule
  int32_t n_groups;
  int32_t n_items;
  int32_t n_accumulators;
  int32_t inline_words[kInlineWords];
};

// Results of the items that share the keys of a tile, one accumulator per item.
struct PartialResults {
  float* out;         // [batch · heads, n_accumulators, rows of a tile, value_dim]: not yet divided by the sum
  float* statistics;  // [batch · heads, n_accumulators, rows of a tile, 2]: maximum in base 2 (−inf: no key), sum
};

// Partial results → out and lse, in the order of the splits. It has as many blocks as the forward.
struct MergeKernelParams {
  PartialResults partial;
  void* out;   // [batch, n_queries, heads, value_dim]
  float* lse;  // [batch, heads, n_queries]
  int32_t n_queries;
  int32_t heads;
  int32_t value_dim;
  int32_t rows;  // of a tile
  ScheduleView schedule;
};

// delta = Σ out · grad_out − grad_lse per row, lse in base 2; zeroes the counters of the key pass on the way. Where the
// tangents of out and lse are given, that of lse and Σ out_tangent · grad_out follow.
struct StatisticsKernelParams {
  TensorView out;
  TensorView grad_out;
  const float* lse;          // [batch, heads, n_queries]
  TensorView out_tangent;    // data may be null
  const float* grad_lse;     // [batch, heads, n_queries], may be null
  const float* lse_tangent;  // [batch, heads, n_queries], null as out_tangent is
  float* row_statistics;     // [batch, heads, n_queries, 2], or 4 with tangents
  int32_t* counters;
  int64_t n_counters;
  int64_t n_rows;  // batch · n_queries · heads
  int32_t n_queries;
  int32_t heads;
  int32_t value_dim;
};

// out = x · freqs, or x · conj(freqs).
struct RopeKernelParams {
  TensorView x;
  const float* freqs;
  void* out;  // [batch, tokens, heads, head_dim]
  FreqsStrides freqs_strides;
  int64_t n_rows;  // batch · tokens · heads
  int32_t tokens;
  int32_t heads;
  int32_t head_dim;
  float imaginary_sign;  // −1 conjugates
};

// grad_freqs = Σ over heads, and over the batch where freqs are shared by it, of grad_out · conj(x).
struct RopeFreqsKernelParams {
  TensorView x;
  TensorView grad_out;
  float* grad_freqs;     // [batch or 1, tokens, head_dim / 2] complex
  int64_t n_pairs;       // of grad_freqs
  int32_t summed_batch;  // batch elements that share a factor
  int32_t tokens;
  int32_t heads;
  int32_t head_dim;
};

// Carries schedule words to device memory inside a launch: unlike a copy from host memory, it needs no synchronisation,
// and a captured graph owns the words.
constexpr int kUploadWords = 8000;
struct UploadKernelParams {
  int32_t* destination;
  int32_t n_words;
  int32_t words[kUploadWords];
};

}  // namespace anchor_attention::cuda
