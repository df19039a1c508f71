#include "key_ranges.h"

#include <algorithm>
#include <limits>
#include <map>
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

// Rewrites ranges, as a multiset of numbers, in a form that depends only on the multiset: the maximal ranges of the
// numbers that occur at least once, at least twice, and so on, sorted by their begin. Empty ranges vanish.
void normalise(std::vector<Range>& ranges) {
  std::erase_if(ranges, [](const Range& range) { return range.first == range.second; });
  const auto meet = [](const Range& range, const Range& next) { return next.first <= range.second; };
  if (std::adjacent_find(ranges.begin(), ranges.end(), meet) == ranges.end()) return;
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
  const auto earlier = [&](size_t a, size_t b) { return queries[a] < queries[b]; };
  if (!std::is_sorted(order.begin(), order.end(), earlier)) std::sort(order.begin(), order.end(), earlier);

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

ReadKeys keys_with_readers(const KeyRangeTableView& table) {
  std::vector<int32_t> bounds(table.k_ranges, table.k_ranges + 2 * static_cast<int64_t>(table.n_ranges));
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  const size_t n_segments = bounds.empty() ? 0 : bounds.size() - 1;

  const auto segment_of = [&](int32_t key) {
    return static_cast<size_t>(std::lower_bound(bounds.begin(), bounds.end(), key) - bounds.begin());
  };
  std::vector<std::pair<size_t, size_t>> segments(table.n_ranges);  // of each range
  std::vector<int64_t> places(n_segments + 2);                      // differences, then counts, then where to write
  for (int32_t r = 0; r < table.n_ranges; ++r) {
    segments[r] = {segment_of(table.k_ranges[2 * r]), segment_of(table.k_ranges[2 * r + 1])};
    ++places[segments[r].first + 1];
    --places[segments[r].second + 1];
  }
  std::partial_sum(places.begin(), places.end(), places.begin());
  std::partial_sum(places.begin(), places.end(), places.begin());

  ReadKeys read;
  read.offsets.push_back(0);
  read.groups.resize(n_segments == 0 ? 0 : places[n_segments]);
  for (size_t s = 0; s < n_segments; ++s) {
    if (places[s] == places[s + 1]) continue;
    read.k_ranges.insert(read.k_ranges.end(), {bounds[s], bounds[s + 1]});
    read.offsets.push_back(static_cast<int32_t>(places[s + 1]));
  }
  for (int32_t g = 0; g < table.n_groups; ++g) {
    for (int32_t r = table.k_offsets[g]; r < table.k_offsets[g + 1]; ++r) {
      for (size_t s = segments[r].first; s < segments[r].second; ++s) read.groups[places[s]++] = g;
    }
  }
  return read;
}

TransposedKeyRangeTable transpose(const KeyRangeTableView& table) {
  ReadKeys read = keys_with_readers(table);
  TransposedKeyRangeTable out{std::move(read.k_ranges), {0}, {}};
  std::vector<Range> readers;
  for (size_t entry = 0; entry + 1 < read.offsets.size(); ++entry) {
    readers.clear();
    for (int32_t i = read.offsets[entry]; i < read.offsets[entry + 1]; ++i) {
      const int32_t* queries = table.q_ranges + 2 * read.groups[i];
      // Most groups that touch are one range then, and nothing is left to normalise.
      if (!readers.empty() && readers.back().second == queries[0]) {
        readers.back().second = queries[1];
      } else {
        readers.push_back({queries[0], queries[1]});
      }
    }
    normalise(readers);
    for (const Range& queries : readers) out.q_ranges.insert(out.q_ranges.end(), {queries.first, queries.second});
    out.q_offsets.push_back(static_cast<int32_t>(out.q_ranges.size() / 2));
  }
  return out;
}

std::vector<KeyReaders> count_readers(const KeyRangeTableView& table) {
  std::vector<std::pair<int32_t, int64_t>> changes;  // (key, change of the number of queries that read it)
  changes.reserve(2 * static_cast<size_t>(table.n_ranges));
  for (int32_t g = 0; g < table.n_groups; ++g) {
    const int64_t n_queries = table.q_ranges[2 * g + 1] - table.q_ranges[2 * g];
    for (int32_t r = table.k_offsets[g]; r < table.k_offsets[g + 1]; ++r) {
      changes.push_back({table.k_ranges[2 * r], n_queries});
      changes.push_back({table.k_ranges[2 * r + 1], -n_queries});
    }
  }
  std::sort(changes.begin(), changes.end());
  std::vector<KeyReaders> readers;
  int64_t n_queries = 0;
  int32_t begin = 0;
  for (size_t i = 0; i < changes.size();) {
    const int32_t key = changes[i].first;
    if (n_queries > 0) readers.push_back({begin, key, n_queries});
    for (; i < changes.size() && changes[i].first == key; ++i) n_queries += changes[i].second;
    begin = key;
  }
  return readers;
}

namespace {

// Lays out the keys that are read, and then rewrites ranges of the table to where their keys have come to lie.
class Compaction {
 public:
  Compaction(const KeyRangeTableView& table, const bool* key_mask, int64_t alignment)
      : alignment_(static_cast<int32_t>(alignment)) {
    keys_.assign(table.k_ranges, table.k_ranges + 2 * static_cast<int64_t>(table.n_ranges));
    std::sort(keys_.begin(), keys_.end());
    keys_.erase(std::unique(keys_.begin(), keys_.end()), keys_.end());
    std::vector<int32_t> begins(keys_.size(), 0), ends(keys_.size(), 0);
    for (int32_t r = 0; r < table.n_ranges; ++r) {
      ++begins[bound_of(table.k_ranges[2 * r])];
      ++ends[bound_of(table.k_ranges[2 * r + 1])];
    }
    lay_out(begins, ends, key_mask);
  }

  // Appends the pieces of a range: each begins at a multiple of the alignment, and up to the next multiple behind its
  // end there is nothing.
  void append_pieces(Range range, std::vector<Range>& pieces) {
    const size_t first = bound_of(range.first), last = bound_of(range.second);
    int32_t begin = rows_begin_[first];
    for (auto gap = std::upper_bound(gaps_.begin(), gaps_.end(), first); gap != gaps_.end() && *gap < last; ++gap) {
      append_aligned(begin, rows_end_[*gap], true, pieces);
      begin = rows_begin_[*gap];
    }
    const bool ends_at_gap = rows_begin_[last] % alignment_ == 0;
    append_aligned(begin, rows_end_[last], ends_at_gap, pieces);
  }

  std::vector<int32_t> source;
  int32_t first_copy = 0;

 private:
  size_t bound_of(int32_t key) const { return std::lower_bound(keys_.begin(), keys_.end(), key) - keys_.begin(); }

  void fill_up() { source.resize((source.size() + alignment_ - 1) / alignment_ * alignment_, -1); }

  void lay_out(const std::vector<int32_t>& begins, const std::vector<int32_t>& ends, const bool* key_mask) {
    // A gap cuts the ranges that span it. Where it would cut many, their number would grow with the square of the
    // table:
    // there the ranges that begin or end use copies of some keys instead.
    constexpr int64_t kMaxCuts = 2;
    int64_t depth = 0;  // ranges around the keys before the bound
    for (size_t i = 0; i < keys_.size(); ++i) {
      rows_end_.push_back(static_cast<int32_t>(source.size()));
      if (source.size() % alignment_ != 0 && depth - ends[i] <= kMaxCuts) {
        fill_up();
        gaps_.push_back(i);
      }
      rows_begin_.push_back(static_cast<int32_t>(source.size()));
      depth += begins[i] - ends[i];
      if (depth == 0) continue;
      for (int32_t key = keys_[i]; key < keys_[i + 1]; ++key) {
        if (key_mask == nullptr || key_mask[key]) source.push_back(key);
      }
    }
    fill_up();
    first_copy = static_cast<int32_t>(source.size());
  }

  void append_aligned(int32_t begin, int32_t end, bool nothing_behind, std::vector<Range>& pieces) {
    if (begin < end && begin % alignment_ != 0) {
      const int32_t stop = std::min(end, (begin + alignment_ - 1) / alignment_ * alignment_);
      pieces.push_back(copy(begin, stop));
      begin = stop;
    }
    const int32_t body_end = nothing_behind ? end : end / alignment_ * alignment_;
    if (begin < body_end) {
      pieces.push_back({begin, body_end});
      begin = body_end;
    }
    if (begin < end) pieces.push_back(copy(begin, end));
  }

  // Rows of one aligned block, copied into a separate block after all others.
  Range copy(int32_t begin, int32_t end) {
    const auto [place, is_new] = copies_.try_emplace({begin, end}, static_cast<int32_t>(source.size()));
    if (is_new) {
      for (int32_t row = begin; row < end; ++row) source.push_back(source[row]);
      fill_up();
    }
    return {place->second, place->second + end - begin};
  }

  int32_t alignment_;
  std::vector<int32_t> keys_;  // bounds of the ranges, ascending
  // For each bound: where the keys before it end and where those after it begin.
  std::vector<int32_t> rows_end_;
  std::vector<int32_t> rows_begin_;
  std::vector<size_t> gaps_;  // bounds at which the two differ
  std::map<Range, int32_t> copies_;
};

}  // namespace

CompactedKeys compact_keys(const KeyRangeTableView& table, const bool* key_mask, int64_t alignment) {
  Compaction compaction(table, key_mask, alignment);
  TableBuilder builder;
  std::vector<Range> pieces;
  for (int32_t g = 0; g < table.n_groups; ++g) {
    pieces.clear();
    for (int32_t r = table.k_offsets[g]; r < table.k_offsets[g + 1]; ++r) {
      compaction.append_pieces({table.k_ranges[2 * r], table.k_ranges[2 * r + 1]}, pieces);
    }
    normalise(pieces);
    builder.add({table.q_ranges[2 * g], table.q_ranges[2 * g + 1]}, pieces);
  }
  return {std::move(compaction.source), compaction.first_copy, builder.take()};
}

}  // namespace anchor_attention
