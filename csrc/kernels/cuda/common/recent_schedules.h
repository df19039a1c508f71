// Schedules of the tables that a thread has planned for last: a model calls with the same few tables over and over.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "params.h"

namespace anchor_attention::cuda {

// Whatever `make` depends on is compared in full, so that nothing here becomes stale: plans stay pure functions.
template <class Schedule, size_t kSizes>
class RecentSchedules {
 public:
  using Sizes = std::array<int64_t, kSizes>;

  // What `make()` gives, which depends on the table and `sizes` alone.
  std::shared_ptr<const Schedule> find_or_make(const KeyRangeTableView& table, const Sizes& sizes, const auto& make) {
    for (const Entry& entry : entries_) {
      if (entry.schedule != nullptr && entry.sizes == sizes && entry.holds(table)) return entry.schedule;
    }
    Entry& oldest = entries_[next_++ % kEntries];
    oldest.schedule = nullptr;
    auto schedule = std::make_shared<const Schedule>(make());
    if (table.n_ranges <= kMaxRanges) {
      oldest = {{table.q_ranges, table.q_ranges + 2 * table.n_groups},
                {table.k_offsets, table.k_offsets + table.n_groups + (table.n_groups > 0 ? 1 : 0)},
                {table.k_ranges, table.k_ranges + 2 * table.n_ranges},
                sizes,
                schedule};
    }
    return schedule;
  }

 private:
  static constexpr size_t kEntries = 8;
  // The ranges of a schedule may be as many as their square.
  static constexpr int32_t kMaxRanges = 512;

  struct Entry {
    std::vector<int32_t> q_ranges;
    std::vector<int32_t> k_offsets;
    std::vector<int32_t> k_ranges;
    Sizes sizes;
    std::shared_ptr<const Schedule> schedule;  // null: empty

    bool holds(const KeyRangeTableView& table) const {
      return q_ranges.size() == 2 * static_cast<size_t>(table.n_groups) &&
             k_ranges.size() == 2 * static_cast<size_t>(table.n_ranges) &&
             std::equal(q_ranges.begin(), q_ranges.end(), table.q_ranges) &&
             std::equal(k_offsets.begin(), k_offsets.end(), table.k_offsets) &&
             std::equal(k_ranges.begin(), k_ranges.end(), table.k_ranges);
    }
  };

  std::array<Entry, kEntries> entries_{};
  size_t next_ = 0;
};

}  // namespace anchor_attention::cuda
