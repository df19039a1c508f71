// What a kernel sees: plain pointers, sizes, strides, the key-range table. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace anchor_attention {

enum class ScalarType : int32_t { float32, bfloat16, float16, float64 };

// Element strides of a [batch, tokens, heads, head_dim] tensor. The last axis is contiguous.
struct Strides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// Element strides of complex rotary factors [batch or 1, tokens, head_dim / 2], last axis contiguous, counted in
// complex elements. `batch` is 0 when one set of factors serves the whole batch.
struct FreqsStrides {
  int64_t batch;
  int64_t token;
};

// The checked, merged key-range table in CSR form: group g holds the queries [q_ranges[g][0], q_ranges[g][1]) and
// attends to the key ranges k_ranges[k_offsets[g]] … k_ranges[k_offsets[g + 1] - 1].
struct KeyRangeTableView {
  const int32_t* q_ranges;   // [n_groups, 2], non-empty, disjoint, ascending
  const int32_t* k_offsets;  // [n_groups + 1], ascending, k_offsets[0] = 0
  const int32_t* k_ranges;   // [n_ranges, 2], non-empty, ascending by begin; maximal, apart from repeats of a part
  int32_t n_groups;
  int32_t n_ranges;
};

struct AttentionParams {
  const void* q;  // [batch, n_queries, heads, head_dim]
  const void* k;  // [batch, n_keys, kv_heads, head_dim], rotated already
  const void* v;  // [batch, n_keys, kv_heads, value_dim]
  const void*
      q_freqs;  // [batch or 1, n_queries, head_dim / 2] complex (float32 parts; float64 for float64), may be null
  const bool* key_mask;  // [batch, n_keys], true = the key exists, may be null
  void* out;             // [batch, n_queries, heads, value_dim], contiguous
  void* lse;             // [batch, heads, n_queries], contiguous, float32 (float64 for float64)

  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  FreqsStrides q_freqs_strides;
  int64_t key_mask_batch_stride;  // the token axis is contiguous

  int64_t batch;
  int64_t n_queries;
  int64_t n_keys;
  int64_t heads;
  int64_t kv_heads;  // head h reads keys and values of head h / (heads / kv_heads)
  int64_t head_dim;
  int64_t value_dim;
  double scale;
  ScalarType dtype;  // of q, k, v, out
  KeyRangeTableView table;

  int64_t heads_per_kv_head() const { return heads / kv_heads; }
};

// The forward's `out` and `lse` are inputs here.
struct AttentionBackwardParams {
  AttentionParams forward;
  const void* grad_out;  // [batch, n_queries, heads, value_dim]
  Strides grad_out_strides;
  const void* grad_lse;  // [batch, heads, n_queries], contiguous, type of lse, may be null
  void* grad_q;          // [batch, n_queries, heads, head_dim], contiguous, null when not wanted
  void* grad_k;          // [batch, n_keys, kv_heads, head_dim], contiguous, null when not wanted
  void* grad_v;          // [batch, n_keys, kv_heads, value_dim], contiguous, null when not wanted
  void* grad_q_freqs;    // [batch or 1, n_queries, head_dim / 2] complex, contiguous, null when not wanted
};

// Tangents of a tensor, one after the other; null when they are zero.
struct Tangents {
  const void* data;  // [n_tangents, batch, tokens, heads, head_dim]
  int64_t stride;    // elements between tangents
  Strides strides;
};

// Directions along which q, k and v change, and how out and lse change with them. q is rotated already.
struct AttentionJvpParams {
  AttentionParams forward;  // out and lse are inputs where `knows_value`
  bool knows_value;
  int64_t n_tangents;
  Tangents q_tangents;
  Tangents k_tangents;
  Tangents v_tangents;
  void* out_tangents;  // [n_tangents, batch, n_queries, heads, value_dim], contiguous
  void* lse_tangents;  // [n_tangents, batch, heads, n_queries], contiguous, type of lse
};

// Gradients of <grad_out, tangent of out> + <grad_lse, tangent of lse> with respect to q, k and v, along one direction.
struct AttentionDoubleBackwardParams {
  AttentionBackwardParams backward;  // without q_freqs; its gradients are the outputs
  Tangents q_tangent;
  Tangents k_tangent;
  Tangents v_tangent;
  const void* out_tangent;  // [batch, n_queries, heads, value_dim], contiguous
  const void* lse_tangent;  // [batch, heads, n_queries], contiguous, type of lse
};

// y = x · freqs on interleaved pairs (2i, 2i + 1), computed in float32 and rounded to x's type.
struct RopeParams {
  const void* x;      // [batch, tokens, heads, head_dim]
  const void* freqs;  // [batch or 1, tokens, head_dim / 2] complex
  void* out;          // [batch, tokens, heads, head_dim], contiguous
  Strides x_strides;
  FreqsStrides freqs_strides;
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  ScalarType dtype;
};

// grad_x = grad_out · conj(freqs);  grad_freqs = Σ over heads (and over the batch where freqs are shared by it) of
// grad_out · conj(x).
struct RopeBackwardParams {
  RopeParams forward;    // `out` unused
  const void* grad_out;  // [batch, tokens, heads, head_dim]
  Strides grad_out_strides;
  void* grad_x;      // [batch, tokens, heads, head_dim], contiguous, null when not wanted
  void* grad_freqs;  // [batch or 1, tokens, head_dim / 2] complex, contiguous, null when not wanted
};

}  // namespace anchor_attention
