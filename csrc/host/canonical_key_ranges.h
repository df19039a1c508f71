// canonical_key_ranges: the table of csrc/key_ranges.h for Python.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

namespace anchor_attention {

std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>> canonical_key_ranges(
    std::vector<int64_t> q_ranges, std::vector<int64_t> k_offsets, std::vector<int64_t> k_ranges, int64_t n_queries,
    int64_t n_keys);

}  // namespace anchor_attention
