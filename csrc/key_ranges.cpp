#include "key_ranges.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace anchor_attention {
namespace {

using Range = std::pair<int32_t, int32_t>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

Range checked_range(const char* name, std::span<const int64_t> ranges, size_t row, int64_t limit,
                    const char* limit_name) {
  const int64_t begin = ranges[2 * row];
  const int64_t end = ranges[2 * row + 1];
  if (begin < 0 || end > limit) {
    fail(name, "[", row, "] = [", begin, ", ", end, ") is out of bounds for ", limit_name, " = ", limit);
  }
  if (begin > end) fail(name, "[", row, "] = [", begin, ", ", end, ") is reversed");
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

void check_offsets(std::span<const int64_t> k_offsets, size_t n_groups, size_t n_ranges) {
  if (k_offsets.size() != n_groups + 1) {
    fail("k_offsets must have one entry more than q_ranges has rows, got ", k_offsets.size(), " entries for ", n_groups,
         " rows");
  }
  if (k_offsets.front() != 0) fail("k_offsets[0] must be 0, got ", k_offsets.front());
  for (size_t g = 0; g < n_groups; ++g) {
    if (k_offsets[g + 1] < k_offsets[g]) {
      fail("k_offsets must not decrease, got k_offsets[", g, "] = ", k_offsets[g], " and k_offsets[", g + 1,
           "] = ", k_offsets[g + 1]);
    }
  }
  if (k_offsets.back() != static_cast<int64_t>(n_ranges)) {
    fail("k_offsets must end at the number of rows of k_ranges, got ", k_offsets.back(), " for ", n_ranges, " rows");
  }
}

// Rewrites ranges, as a multiset of numbers, in the one way that depends on the multiset alone: the maximal ranges of
// the numbers that occur at least once, at least twice, and so on, by their begin. Empty ranges vanish.
void normalise(std::vector<Range>& ranges) {
  if (ranges.size() < 2) {
    std::erase_if(ranges, [](const Range& range) { return range.first == range.second; });
    return;
  }
  std::vector<std::pair<int32_t, int32_t>> changes;  // (position, change of multiplicity)
  for (const Range& range : ranges) {
    changes.push_back({range.first, 1});
    changes.push_back({range.second, -1});
  }
  std::sort(changes.begin(), changes.end());
  ranges.clear();
  std::vector<int32_t> open;  // begins of the ranges that the position is in
  for (size_t i = 0; i < changes.size();) {
    const int32_t position = changes[i].first;
    int32_t change = 0;
    for (; i < changes.size() && changes[i].first == position; ++i) change += changes[i].second;
    for (; change > 0; --change) open.push_back(position);
    for (; change < 0; ++change) {
      ranges.push_back({open.back(), position});
      open.pop_back();
    }
  }
  std::sort(ranges.begin(), ranges.end());
}

// Appends groups in ascending order, joining a group to the last one where they touch and read the same keys.
class TableBuilder {
 public:
  TableBuilder() { table_.k_offsets.push_back(0); }

  void add(Range queries, const std::vector<Range>& keys) {
    if (keys.empty()) return;
    if (continues_last(queries, keys)) {
      table_.q_ranges.back() = queries.second;
      return;
    }
    table_.q_ranges.insert(table_.q_ranges.end(), {queries.first, queries.second});
    for (const Range& range : keys) table_.k_ranges.insert(table_.k_ranges.end(), {range.first, range.second});
    table_.k_offsets.push_back(static_cast<int32_t>(table_.k_ranges.size() / 2));
  }

  KeyRangeTable take() { return std::move(table_); }

 private:
  bool continues_last(Range queries, const std::vector<Range>& keys) const {
    if (table_.q_ranges.empty() || table_.q_ranges.back() != queries.first) return false;
    const size_t begin = table_.k_offsets[table_.k_offsets.size() - 2];
    if (table_.k_ranges.size() / 2 - begin != keys.size()) return false;
    for (size_t r = 0; r < keys.size(); ++r) {
      if (table_.k_ranges[2 * (begin + r)] != keys[r].first) return false;
      if (table_.k_ranges[2 * (begin + r) + 1] != keys[r].second) return false;
    }
    return true;
  }

  KeyRangeTable table_;
};

}  // namespace

KeyRangeTableView KeyRangeTable::view() const {
  return {q_ranges.data(), k_offsets.data(), k_ranges.data(), static_cast<int32_t>(q_ranges.size() / 2),
          static_cast<int32_t>(k_ranges.size() / 2)};
}

int64_t KeyRangeTable::area() const {
  int64_t area = 0;
  for (size_t g = 0; g + 1 < k_offsets.size(); ++g) {
    int64_t keys = 0;
    for (int32_t r = k_offsets[g]; r < k_offsets[g + 1]; ++r) keys += k_ranges[2 * r + 1] - k_ranges[2 * r];
    area += keys * (q_ranges[2 * g + 1] - q_ranges[2 * g]);
  }
  return area;
}

KeyRangeTable make_key_range_table(std::span<const int64_t> q_ranges, std::span<const int64_t> k_offsets,
                                   std::span<const int64_t> k_ranges, int64_t n_queries, int64_t n_keys) {
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  if (n_queries > kMaxTokens) fail("n_queries must be at most ", kMaxTokens, ", got ", n_queries);
  if (n_keys > kMaxTokens) fail("n_keys must be at most ", kMaxTokens, ", got ", n_keys);
  if (q_ranges.size() % 2 != 0) fail("q_ranges must hold (begin, end) pairs, got ", q_ranges.size(), " numbers");
  if (k_ranges.size() % 2 != 0) fail("k_ranges must hold (begin, end) pairs, got ", k_ranges.size(), " numbers");
  const size_t n_groups = q_ranges.size() / 2;
  const size_t n_ranges = k_ranges.size() / 2;
  check_offsets(k_offsets, n_groups, n_ranges);

  std::vector<Range> queries(n_groups);
  std::vector<Range> keys(n_ranges);
  for (size_t g = 0; g < n_groups; ++g) queries[g] = checked_range("q_ranges", q_ranges, g, n_queries, "n_queries");
  for (size_t r = 0; r < n_ranges; ++r) keys[r] = checked_range("k_ranges", k_ranges, r, n_keys, "n_keys");

  std::vector<size_t> order;
  for (size_t g = 0; g < n_groups; ++g) {
    if (queries[g].first < queries[g].second) order.push_back(g);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return queries[a] < queries[b]; });

  TableBuilder builder;
  std::vector<Range> group_keys;
  for (size_t i = 0; i < order.size(); ++i) {
    const size_t g = order[i];
    if (i > 0 && queries[g].first < queries[order[i - 1]].second) {
      const Range& other = queries[order[i - 1]];
      fail("q_ranges must be disjoint, got q_ranges[", order[i - 1], "] = [", other.first, ", ", other.second,
           ") and q_ranges[", g, "] = [", queries[g].first, ", ", queries[g].second, ")");
    }
    group_keys.clear();
    group_keys.assign(keys.begin() + k_offsets[g], keys.begin() + k_offsets[g + 1]);
    normalise(group_keys);
    builder.add(queries[g], group_keys);
  }
  return builder.take();
}

TransposedKeyRangeTable transpose(const KeyRangeTableView& table) {
  std::vector<int32_t> bounds(table.k_ranges, table.k_ranges + 2 * static_cast<int64_t>(table.n_ranges));
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  const size_t n_segments = bounds.empty() ? 0 : bounds.size() - 1;

  // Groups are visited in ascending order, so every segment's query ranges come out ascending and join in passing.
  std::vector<std::vector<Range>> readers(n_segments);
  for (int32_t g = 0; g < table.n_groups; ++g) {
    const Range queries{table.q_ranges[2 * g], table.q_ranges[2 * g + 1]};
    for (int32_t r = table.k_offsets[g]; r < table.k_offsets[g + 1]; ++r) {
      const auto first = std::lower_bound(bounds.begin(), bounds.end(), table.k_ranges[2 * r]) - bounds.begin();
      for (size_t s = first; s < n_segments && bounds[s] < table.k_ranges[2 * r + 1]; ++s)
        readers[s].push_back(queries);
    }
  }

  TransposedKeyRangeTable out;
  out.q_offsets.push_back(0);
  for (size_t s = 0; s < n_segments; ++s) {
    if (readers[s].empty()) continue;
    normalise(readers[s]);
    out.k_ranges.insert(out.k_ranges.end(), {bounds[s], bounds[s + 1]});
    for (const Range& queries : readers[s]) out.q_ranges.insert(out.q_ranges.end(), {queries.first, queries.second});
    out.q_offsets.push_back(static_cast<int32_t>(out.q_ranges.size() / 2));
  }
  return out;
}

CompactedKeys compact_keys(const KeyRangeTableView& table, const bool* key_mask, int64_t n_keys, int64_t alignment) {
  CompactedKeys out;
  std::vector<int32_t> multiplicity(n_keys + 1, 0);  // of the ranges that begin at a key, less those that end there
  std::vector<bool> is_bound(n_keys + 1, false);
  for (int32_t r = 0; r < table.n_ranges; ++r) {
    ++multiplicity[table.k_ranges[2 * r]];
    --multiplicity[table.k_ranges[2 * r + 1]];
    is_bound[table.k_ranges[2 * r]] = is_bound[table.k_ranges[2 * r + 1]] = true;
  }

  struct Gap {
    int32_t before;  // original key
    int32_t begin;   // compacted
    int32_t end;
  };
  std::vector<Gap> gaps;
  std::vector<int32_t>& new_index = multiplicity;  // each entry is read for the last time where it is overwritten
  int32_t depth = 0;
  for (int64_t j = 0; j <= n_keys; ++j) {
    const auto begin = static_cast<int32_t>(out.source.size());
    if (is_bound[j] && begin % alignment != 0) {
      out.source.resize((begin + alignment - 1) / alignment * alignment, -1);
      gaps.push_back({static_cast<int32_t>(j), begin, static_cast<int32_t>(out.source.size())});
    }
    depth += multiplicity[j];
    new_index[j] = static_cast<int32_t>(out.source.size());
    if (depth > 0 && (key_mask == nullptr || key_mask[j])) out.source.push_back(static_cast<int32_t>(j));
  }

  TableBuilder builder;
  std::vector<Range> keys;
  for (int32_t g = 0; g < table.n_groups; ++g) {
    keys.clear();
    for (int32_t r = table.k_offsets[g]; r < table.k_offsets[g + 1]; ++r) {
      int32_t begin = new_index[table.k_ranges[2 * r]];
      auto gap = std::upper_bound(gaps.begin(), gaps.end(), table.k_ranges[2 * r],
                                  [](int32_t key, const Gap& other) { return key < other.before; });
      for (; gap != gaps.end() && gap->before < table.k_ranges[2 * r + 1]; ++gap) {
        keys.push_back({begin, gap->begin});
        begin = gap->end;
      }
      const bool ends_at_gap = gap != gaps.end() && gap->before == table.k_ranges[2 * r + 1];
      keys.push_back({begin, ends_at_gap ? gap->begin : new_index[table.k_ranges[2 * r + 1]]});
    }
    normalise(keys);
    builder.add({table.q_ranges[2 * g], table.q_ranges[2 * g + 1]}, keys);
  }
  out.table = builder.take();
  return out;
}

}  // namespace anchor_attention
