// The key-range table: checks, merging, transpose. No torch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "params.h"

namespace anchor_attention {

// Owns what KeyRangeTableView points to, in the canonical form described there.
struct KeyRangeTable {
  std::vector<int32_t> q_ranges;
  std::vector<int32_t> k_offsets;
  std::vector<int32_t> k_ranges;

  KeyRangeTableView view() const;

  // Σ over groups of |queries| · |keys|: the number of scores, to which time is proportional.
  int64_t area() const;
};

// Checks a table given in CSR form and brings it into canonical form: empty ranges and groups without keys are dropped
// (their rows behave like rows in no range), groups are sorted by their queries, a group's key ranges are rewritten in
// a form that depends only on the multiset of its keys, and touching groups with equal key ranges are joined. Throws
// std::invalid_argument that names the argument, the position and the value.
KeyRangeTable make_key_range_table(std::span<const int64_t> q_ranges, std::span<const int64_t> k_offsets,
                                   std::span<const int64_t> k_ranges, int64_t n_queries, int64_t n_keys);

// The keys that are read, cut where ranges of the table begin or end, and the groups that read each piece.
struct ReadKeys {
  std::vector<int32_t> k_ranges;  // [n_entries, 2], disjoint, ascending
  std::vector<int32_t> offsets;   // [n_entries + 1]
  std::vector<int32_t> groups;    // [offsets[n_entries]], ascending within an entry, each as often as it reads the keys
};

// Takes time in proportion to its result, and the sorting of the ranges.
ReadKeys keys_with_readers(const KeyRangeTableView& table);

// The same attention seen from the keys. Entry s holds the keys [k_ranges[s][0], k_ranges[s][1]) and the query ranges
// that read them; entries are disjoint, ascending and cover the read keys exactly. A query range appears as often as
// the forward table reads the key.
struct TransposedKeyRangeTable {
  std::vector<int32_t> k_ranges;   // [n_entries, 2]
  std::vector<int32_t> q_offsets;  // [n_entries + 1]
  std::vector<int32_t> q_ranges;   // [n_ranges, 2]
};

TransposedKeyRangeTable transpose(const KeyRangeTableView& table);

// The keys [begin, end) are read by n_queries queries, each counted as often as it reads them.
struct KeyReaders {
  int32_t begin;
  int32_t end;
  int64_t n_queries;
};

// For the keys that are read, ascending. Takes time and memory in proportion to the ranges (and the logarithm of their
// number), where the transposed table may have as many ranges as the product of groups and keys.
std::vector<KeyReaders> count_readers(const KeyRangeTableView& table);

// Renumbers the keys so that only those that are read and kept remain, in their order. With an alignment above 1 every
// range of the new table begins at a multiple of it, and between its end and the next multiple there is no key. For
// this, gaps are left where ranges begin or end; a range that spans a gap is cut in two. Where many ranges span the
// place, as with nested ones, no gap is left: then the keys in the blocks at the ends of a range are copied into
// separate blocks after all other keys. So the new table has at most a few ranges for each of the old one.
struct CompactedKeys {
  std::vector<int32_t> source;  // the original index of compacted key j, −1 in gaps; a multiple of the alignment long
  int32_t first_copy;           // below it every key occurs once, from it on are copies
  KeyRangeTable table;          // the table over compacted keys; groups that lost every key are gone
};

// `key_mask` is [n_keys], true = kept, or null when all are.
CompactedKeys compact_keys(const KeyRangeTableView& table, const bool* key_mask, int64_t alignment = 1);

}  // namespace anchor_attention
