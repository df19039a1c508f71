#include "kernels/cpu/backward_division.h"

#include <algorithm>
#include <tuple>

namespace anchor_attention::cpu {

void order_by_queries(std::vector<Tile>& tiles) {
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) {
    return std::tie(a.batch, a.q_begin) < std::tie(b.batch, b.q_begin);
  });
}

std::vector<int64_t> split_tiles(const std::vector<Tile>& tiles, int64_t n) {
  double total = 0;
  for (const Tile& tile : tiles) total += static_cast<double>(tile.n_queries) * tile.n_keys;
  std::vector<int64_t> bounds{0};
  double done = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    done += static_cast<double>(tiles[i].n_queries) * tiles[i].n_keys;
    while (static_cast<int64_t>(bounds.size()) < n && done >= total * bounds.size() / n) bounds.push_back(i + 1);
  }
  bounds.resize(n + 1, static_cast<int64_t>(tiles.size()));
  bounds.back() = static_cast<int64_t>(tiles.size());
  return bounds;
}

std::vector<int32_t> split_keys(const CompactedKeys& keys, int64_t n) {
  const std::vector<KeyReaders> readers = count_readers(keys.table.view());
  double total = 0;
  for (const KeyReaders& r : readers) total += static_cast<double>(r.n_queries) * (r.end - r.begin);
  const auto n_rows = static_cast<int32_t>(keys.source.size());
  std::vector<int32_t> bounds{0};
  double done = 0;
  for (const KeyReaders& r : readers) {
    const double n_queries = static_cast<double>(r.n_queries), area = n_queries * (r.end - r.begin);
    while (static_cast<int64_t>(bounds.size()) < n && done + area >= total * bounds.size() / n) {
      const int32_t key = r.begin + static_cast<int32_t>((total * bounds.size() / n - done) / n_queries);
      bounds.push_back(std::max(bounds.back(), (key + kCutKeys / 2) / kCutKeys * kCutKeys));
    }
    done += area;
  }
  bounds.resize(n + 1, n_rows);
  for (int32_t& bound : bounds) bound = std::min(bound, n_rows);
  bounds.back() = n_rows;
  return bounds;
}

std::vector<int32_t> packed_rows(const CompactedKeys& keys, int64_t n_tokens) {
  std::vector<int32_t> rows(n_tokens, -1);
  for (int32_t j = 0; j < keys.first_copy; ++j) {
    if (keys.source[j] >= 0) rows[keys.source[j]] = j;
  }
  return rows;
}

bool reads_any(const KeyRangeTableView& table, int32_t group, KeySlice keys) {
  for (int32_t r = table.k_offsets[group]; r < table.k_offsets[group + 1]; ++r) {
    if (table.k_ranges[2 * r] < keys.end && table.k_ranges[2 * r + 1] > keys.begin) return true;
  }
  return false;
}

std::vector<Piece> cut_into_pieces(const KeyRangeTableView& table, KeySlice slice, int32_t n_keys,
                                   const std::vector<Tile>& tiles, int64_t first_tile, int64_t last_tile) {
  std::vector<Piece> pieces;
  for (int64_t begin = slice.begin; begin < slice.end; begin += n_keys) {
    const int64_t end = std::min<int64_t>(begin + n_keys, slice.end);
    pieces.push_back({{static_cast<int32_t>(begin), static_cast<int32_t>(end)}, {}});
  }
  for (int64_t i = first_tile; i < last_tile; ++i) {
    for (int32_t r = table.k_offsets[tiles[i].group]; r < table.k_offsets[tiles[i].group + 1]; ++r) {
      const int32_t end = std::min(table.k_ranges[2 * r + 1], slice.end);
      for (int32_t begin = std::max(table.k_ranges[2 * r], slice.begin); begin < end;) {
        Piece& piece = pieces[(begin - slice.begin) / n_keys];
        if (piece.tiles.empty() || piece.tiles.back().tile != i) piece.tiles.push_back({i, {}});
        std::vector<int32_t>& ranges = piece.tiles.back().ranges;
        const int32_t stop = std::min(end, piece.keys.end);
        ranges.insert(ranges.end(), {begin - piece.keys.begin, stop - piece.keys.begin});
        begin = stop;
      }
    }
  }
  return pieces;
}

}  // namespace anchor_attention::cpu
