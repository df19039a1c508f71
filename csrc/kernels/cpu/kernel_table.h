// The steps that are compiled once per instruction set, and the table that holds one set of them.
// Everything in between (work plan, buffers, threads) is in attention.cpp and rope.cpp and compiled once.
#pragma once

#include <cstdint>

#include "params.h"

namespace anchor_attention::cpu {

// The "working type" of a call is float, or double for float64: sums and softmax are formed in it. The products take
// "operands": elements of the working type or, where the processor multiplies them itself, pairs of bfloat16 along the
// summed axis, or on a matrix unit runs of 32. So keys and values, of which some products sum along the row and others
// over the rows, can be packed in two layouts, which are the same where an operand is one element. Rows are padded with
// zeros to whole vectors.
enum class PackedLayout {
  rows,   // operands along the row
  stack,  // operands of the same column in consecutive rows
};

// Keys or values of one head, gathered by index. A source index below 0 makes a row of zeros.
struct PackRows {
  const void* source;      // first row of the head, `dtype`
  int64_t source_stride;   // elements between tokens
  const int32_t* indices;  // [n_rows], source tokens; n_rows is a multiple of key_alignment
  int64_t n_rows;
  int64_t head_dim;
  ScalarType dtype;
  PackedLayout layout;
  void* packed;  // [n_rows] · packed_row_bytes
};

struct UnpackRows {
  const void* packed;  // [·] · packed_row_bytes, working type, times `scale`
  int64_t packed_row_bytes;
  const int32_t* indices;  // [n_tokens], packed row of each token, below 0: the token's row is zero
  int64_t n_tokens;
  int64_t head_dim;
  double scale;
  ScalarType dtype;
  void* target;           // first row of the head, `dtype`
  int64_t target_stride;  // elements between tokens
};

// Up to tile_queries queries of one group and head against all of their keys.
struct ForwardTile {
  const AttentionParams* params;
  int64_t batch;
  int64_t head;
  int64_t q_begin;
  int64_t n_queries;
  const void* k_rows;         // [packed keys] in PackedLayout::rows
  const void* v_stack;        // [packed keys] in PackedLayout::stack
  const int32_t* key_ranges;  // [n_key_ranges, 2] over packed keys, begins are multiples of key_alignment
  int64_t n_key_ranges;
  void* scratch;  // forward_scratch_bytes
  // The keys of a tile may come in several calls with the same scratch: the first one begins it, the last one writes.
  bool first = true;
  bool last = true;
  // Where to write results in the working type, of a tile whose keys are split; null: to out and lse of params.
  void* partial_out = nullptr;  // [n_queries, head_dim]
  void* partial_lse = nullptr;  // [n_queries]
};

// The same tile against the keys of its ranges that lie in [key_begin, key_end).
struct BackwardTile {
  const AttentionBackwardParams* params;
  int64_t batch;
  int64_t head;
  int64_t q_begin;
  int64_t n_queries;
  const void* k_rows;         // [packed keys] in PackedLayout::rows
  const void* k_stack;        // [packed keys] in PackedLayout::stack
  const void* v_rows;         // [packed keys] in PackedLayout::rows
  const int32_t* key_ranges;  // as in ForwardTile
  int64_t n_key_ranges;
  int32_t key_begin;
  int32_t key_end;
  void* grad_q;           // [n_queries, head_dim] working type, added to, without `scale`; may be null
  int64_t grad_q_stride;  // elements between its rows
  void* grad_k_rows;      // [packed keys] · sum_row_bytes(head_dim), added to, without `scale`; may be null
  void* grad_v_rows;      // [packed keys] · sum_row_bytes(value_dim), added to; may be null
  void* scratch;          // backward_scratch_bytes
};

// Values and tangents of a tile: `n_tangents` of them, which share scores and probabilities. Keys and values are packed
// in the working type; those of a tangent lie one tensor of all heads behind the other.
struct JvpTile {
  const AttentionJvpParams* params;
  int64_t batch;
  int64_t head;
  int64_t q_begin;
  int64_t n_queries;
  int64_t first_tangent;
  int64_t n_tangents;
  const void* k_rows;          // [packed keys, padded head_dim]
  const void* v_rows;          // [packed keys, padded value_dim]
  const void* k_tangent_rows;  // [n_tangents, ·, padded head_dim] of the first tangent, may be null
  const void* v_tangent_rows;  // [n_tangents, ·, padded value_dim] likewise
  int64_t tangent_rows;        // rows from one tangent's to the next one's
  const int32_t* key_ranges;   // [n_key_ranges, 2] over packed keys
  int64_t n_key_ranges;
  void* scratch;  // jvp_scratch_bytes
};

// As BackwardTile, whose gradients are those of <grad_out, tangent of out> + <grad_lse, tangent of lse> here, and whose
// rows are of the working type.
struct DoubleBackwardTile {
  BackwardTile tile;
  const AttentionDoubleBackwardParams* params;
  const void* k_tangent_rows;  // [packed keys, padded head_dim], may be null
  const void* v_tangent_rows;  // [packed keys, padded value_dim], may be null
};

// Turns the sums of grad_q in the working type into gradients of the unrotated q, and of its rotary factors.
// A factor that several heads or several batch elements share gets its gradient from all of them: its first call must
// be that of head 0, and of batch element 0.
struct FinishGradQ {
  const AttentionBackwardParams* params;
  int64_t batch;
  int64_t head;
  int64_t token_begin;
  int64_t token_end;
  const void* grad_q;     // [tokens, head_dim] working type; may lie in params->grad_q itself
  int64_t grad_q_stride;  // elements between its rows
};

struct RopeTokens {
  const RopeParams* params;
  int64_t batch;
  int64_t token_begin;
  int64_t token_end;
};

struct RopeBackwardTokens {
  const RopeBackwardParams* params;
  int64_t token_begin;
  int64_t token_end;
};

// How keys and values lie in memory for the products, and the sums of their gradients.
struct Packing {
  int64_t (*key_alignment)(ScalarType dtype);  // elements of the summed axis in one operand
  int64_t (*packed_row_bytes)(int64_t head_dim, ScalarType dtype);
  int64_t (*sum_row_bytes)(int64_t head_dim, ScalarType dtype);
  void (*pack_rows)(const PackRows&);
};

// The steps that multiply matrices: each set of them chooses the layout of its packed operands.
struct ProductKernels {
  Packing packing;
  int64_t (*forward_tile_queries)(const AttentionParams&);
  int64_t (*backward_tile_queries)(ScalarType dtype);
  int64_t (*forward_scratch_bytes)(const AttentionParams&);
  int64_t (*backward_scratch_bytes)(const AttentionParams&);
  void (*forward_tile)(const ForwardTile&);
  void (*backward_tile)(const BackwardTile&);
};

// Forward derivatives and second derivatives. Their operands are elements of the working type, whatever the dtype.
struct DerivativeKernels {
  Packing packing;
  int64_t (*tile_queries)(ScalarType dtype);
  int64_t (*jvp_scratch_bytes)(const AttentionJvpParams&);
  int64_t (*double_backward_scratch_bytes)(const AttentionParams&);
  void (*jvp_tile)(const JvpTile&);
  void (*double_backward_tile)(const DoubleBackwardTile&);
};

// The steps of a set of vector instructions, for every type.
struct Kernels {
  const char* name;
  ProductKernels products;
  DerivativeKernels derivatives;
  void (*unpack_rows)(const UnpackRows&);
  void (*finish_grad_q)(const FinishGradQ&);
  void (*rope)(const RopeTokens&);
  void (*rope_backward)(const RopeBackwardTokens&);
};

// The products of a set with a matrix unit, which is used together with a set of vectors.
struct TileKernels {
  const char* name;
  bool needs_amx;  // false for a model in software, which runs everywhere
  ProductKernels bfloat16;
  ProductKernels split_float32;  // products of float32 from those of bfloat16 parts
};

inline int64_t working_size(ScalarType dtype) { return dtype == ScalarType::float64 ? 8 : 4; }

}  // namespace anchor_attention::cpu
