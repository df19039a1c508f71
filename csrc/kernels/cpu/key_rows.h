// What exists for packed keys in the backward: rows that tiles read, and sums that they add to.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/work_plan.h"

namespace anchor_attention::cpu {

// First rows of them. Null where not wanted.
struct KeyRows {
  char* k = nullptr;
  char* k_stack = nullptr;  // k itself, where the two layouts are the same
  char* v = nullptr;
  char* k_tangent = nullptr;
  char* v_tangent = nullptr;
  char* grad_k = nullptr;
  char* grad_v = nullptr;
};

// Where in one buffer the rows of some keys lie.
class KeyRowLayout {
 public:
  // `second`: the second derivative's parameters, or null.
  KeyRowLayout(const AttentionBackwardParams& params, const AttentionDoubleBackwardParams* second, const WorkPlan& plan)
      : params_(params), second_(second), plan_(plan) {}

  int64_t bytes(int64_t n_rows) const { return lay_out(n_rows, nullptr).bytes; }
  KeyRows rows(int64_t n_rows, char* buffer) const { return lay_out(n_rows, buffer).rows; }
  // The sums are the buffer's end, from here on.
  int64_t first_byte_of_sums(int64_t n_rows) const { return lay_out(n_rows, nullptr).sums; }

  // How many keys take about so many bytes: a multiple of kCutKeys, one at least.
  int64_t rows_of(int64_t bytes) const;

  KeyRows from_row(KeyRows rows, int64_t row) const;

  // What is packed into rows.
  std::vector<PackedTensor> packed_tensors(const KeyRows& rows) const;

 private:
  struct Places {
    KeyRows rows;
    int64_t sums;
    int64_t bytes;
  };

  Places lay_out(int64_t n_rows, char* buffer) const;

  const AttentionBackwardParams& params_;
  const AttentionDoubleBackwardParams* second_;
  const WorkPlan& plan_;
};

}  // namespace anchor_attention::cpu
