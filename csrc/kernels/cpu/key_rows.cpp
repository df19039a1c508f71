#include "kernels/cpu/key_rows.h"

#include <algorithm>

namespace anchor_attention::cpu {

KeyRowLayout::Places KeyRowLayout::lay_out(int64_t n_rows, char* buffer) const {
  constexpr int64_t kCacheLine = 64;
  const RowBytes packed = plan_.packed_row_bytes(), sum = plan_.sum_row_bytes();
  Places places{};
  const auto take = [&](bool is_wanted, int64_t row_bytes) -> char* {
    if (!is_wanted) return nullptr;
    char* const first = buffer == nullptr ? nullptr : buffer + places.bytes;
    places.bytes += (n_rows * row_bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    return first;
  };
  KeyRows& rows = places.rows;
  rows.k = take(true, packed.k);
  rows.k_stack = plan_.has_stacks() ? take(true, packed.k) : rows.k;
  rows.v = take(true, packed.v);
  if (second_ != nullptr) {
    rows.k_tangent = take(second_->k_tangent.data != nullptr, packed.k);
    rows.v_tangent = take(second_->v_tangent.data != nullptr, packed.v);
  }
  places.sums = places.bytes;
  rows.grad_k = take(params_.grad_k != nullptr, sum.k);
  rows.grad_v = take(params_.grad_v != nullptr, sum.v);
  return places;
}

int64_t KeyRowLayout::rows_of(int64_t bytes) const {
  constexpr int64_t kMany = 1 << 10;
  const int64_t row_bytes = lay_out(kMany, nullptr).bytes / kMany;
  return std::max<int64_t>(bytes / row_bytes / kCutKeys, 1) * kCutKeys;
}

KeyRows KeyRowLayout::from_row(KeyRows rows, int64_t row) const {
  const RowBytes packed = plan_.packed_row_bytes(), sum = plan_.sum_row_bytes();
  const auto skip = [row](char*& first, int64_t row_bytes) {
    if (first != nullptr) first += row * row_bytes;
  };
  skip(rows.k, packed.k);
  skip(rows.k_stack, packed.k);
  skip(rows.v, packed.v);
  skip(rows.k_tangent, packed.k);
  skip(rows.v_tangent, packed.v);
  skip(rows.grad_k, sum.k);
  skip(rows.grad_v, sum.v);
  return rows;
}

std::vector<PackedTensor> KeyRowLayout::packed_tensors(const KeyRows& rows) const {
  const AttentionParams& p = params_.forward;
  const RowBytes packed = plan_.packed_row_bytes();
  std::vector<PackedTensor> tensors{
      {p.k, p.k_strides, p.head_dim, PackedLayout::rows, rows.k, packed.k},
      {p.v, p.v_strides, p.value_dim, PackedLayout::rows, rows.v, packed.v},
  };
  if (rows.k_stack != rows.k) {
    tensors.push_back({p.k, p.k_strides, p.head_dim, PackedLayout::stack, rows.k_stack, packed.k});
  }
  const auto add_tangent = [&](const Tangents& tangent, int64_t head_dim, char* first, int64_t row_bytes) {
    tensors.push_back({tangent.data, tangent.strides, head_dim, PackedLayout::rows, first, row_bytes});
  };
  if (rows.k_tangent != nullptr) add_tangent(second_->k_tangent, p.head_dim, rows.k_tangent, packed.k);
  if (rows.v_tangent != nullptr) add_tangent(second_->v_tangent, p.value_dim, rows.v_tangent, packed.v);
  return tensors;
}

}  // namespace anchor_attention::cpu
