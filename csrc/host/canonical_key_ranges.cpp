#include "host/canonical_key_ranges.h"

#include "key_ranges.h"

namespace anchor_attention {

std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>> canonical_key_ranges(
    std::vector<int64_t> q_ranges, std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges, int64_t n_queries,
    int64_t n_keys) {
  const KeyRangeTable table = make_key_range_table(q_ranges, k_offsets, k_ranges, n_queries, n_keys);
  const auto widen = [](const std::vector<int32_t>& numbers) {
    return std::vector<int64_t>(numbers.begin(), numbers.end());
  };
  return {widen(table.q_ranges), widen(table.k_offsets), widen(table.k_ranges)};
}

}  // namespace anchor_attention
