// The steps that are compiled once per instruction set, and the table that holds one set of them.
// Everything in between (schedule, buffers, threads) is in attention.cpp and rope.cpp and compiled once.
#pragma once

#include <cstdint>

#include "../../params.h"

namespace anchor_attention::cpu {

// Keys or values of one head, gathered by index, converted to the type of the arithmetic ("working type": float, or
// double for float64) and padded with zeros to whole vectors. A source index below 0 makes a row of zeros.
struct PackRows {
  const void* source;      // first row of the head, `dtype`
  int64_t source_stride;   // elements between tokens
  const int32_t* indices;  // [n_rows], source tokens
  int64_t n_rows;
  int64_t head_dim;
  ScalarType dtype;
  void* packed;  // [n_rows, padded_head_dim]
};

struct UnpackRows {
  const void* packed;      // [·, padded_head_dim] working type, times `scale`
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
  const void* k_rows;         // [packed keys, padded_head_dim] working type
  const void* v_rows;         // [packed keys, padded_head_dim] working type
  const int32_t* key_ranges;  // [n_key_ranges, 2] over packed keys
  int64_t n_key_ranges;
  void* scratch;  // forward_scratch_bytes
};

// The same tile against the keys of its ranges that lie in [key_begin, key_end).
struct BackwardTile {
  const AttentionBackwardParams* params;
  int64_t batch;
  int64_t head;
  int64_t q_begin;
  int64_t n_queries;
  const void* k_rows;  // as in ForwardTile
  const void* v_rows;
  const int32_t* key_ranges;
  int64_t n_key_ranges;
  int32_t key_begin;
  int32_t key_end;
  void* grad_q;       // [batch, n_queries, heads, head_dim] working type, added to, without `scale`; may be null
  void* grad_k_rows;  // like k_rows, added to, without `scale`; may be null
  void* grad_v_rows;  // like v_rows, added to; may be null
  void* scratch;      // backward_scratch_bytes
};

// Turns the sums of grad_q in the working type into gradients of the unrotated q, and of its rotary factors.
struct FinishGradQ {
  const AttentionBackwardParams* params;
  const void* grad_q;  // [batch, n_queries, heads, head_dim] working type; may be params->grad_q itself
  int64_t token_begin;
  int64_t token_end;
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

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  int64_t tile_queries[2];  // by working type: float, double
  int64_t (*forward_scratch_bytes)(int64_t head_dim, ScalarType dtype);
  int64_t (*backward_scratch_bytes)(int64_t head_dim, ScalarType dtype);
  void (*pack_rows)(const PackRows&);
  void (*unpack_rows)(const UnpackRows&);
  void (*forward_tile)(const ForwardTile&);
  void (*backward_tile)(const BackwardTile&);
  void (*finish_grad_q)(const FinishGradQ&);
  void (*rope)(const RopeTokens&);
  void (*rope_backward)(const RopeBackwardTokens&);
};

// The sets that are compiled in and that this processor runs, best first; the last one runs everywhere.
// `ANCHOR_ATTENTION_CPU_ISA` pins one by name. Throws std::invalid_argument if it names none of them.
const Kernels& selected_kernels();
const char* compiled_instruction_sets();  // comma-separated names, best first

inline int64_t working_size(ScalarType dtype) { return dtype == ScalarType::float64 ? 8 : 4; }

inline int64_t padded_head_dim(int64_t head_dim, ScalarType dtype, int64_t vector_bytes) {
  const int64_t lanes = vector_bytes / working_size(dtype);
  return (head_dim + lanes - 1) / lanes * lanes;
}

}  // namespace anchor_attention::cpu
