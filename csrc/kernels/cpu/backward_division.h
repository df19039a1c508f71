// How the backward divides its work: tiles into runs, keys into slices, and slices into pieces.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/work_plan.h"

namespace anchor_attention::cpu {

// Packed keys of a batch element.
struct KeySlice {
  int32_t begin;
  int32_t end;
};

// What a tile reads of a piece: ranges that count from its first key.
struct TileRanges {
  int64_t tile;
  std::vector<int32_t> ranges;
};

struct Piece {
  KeySlice keys;
  std::vector<TileRanges> tiles;
};

// Tiles of the same queries one after the other, whose heads lie side by side in memory; for keys that all fit into the
// cache.
void order_by_queries(std::vector<Tile>& tiles);

// Splits the tiles into `n` runs of about equal work: n + 1 bounds.
std::vector<int64_t> split_tiles(const std::vector<Tile>& tiles, int64_t n);

// Splits the packed keys of one batch element into `n` slices that about equally many queries read: n + 1 bounds.
std::vector<int32_t> split_keys(const CompactedKeys& keys, int64_t n);

// The packed row of every token, below 0 where it has none.
std::vector<int32_t> packed_rows(const CompactedKeys& keys, int64_t n_tokens);

bool reads_any(const KeyRangeTableView& table, int32_t group, KeySlice keys);

// Cuts a slice into pieces of `n_keys`, and what the tiles from `first_tile` to `last_tile` read of it, in time linear
// in their ranges and in what these read.
std::vector<Piece> cut_into_pieces(const KeyRangeTableView& table, KeySlice slice, int32_t n_keys,
                                   const std::vector<Tile>& tiles, int64_t first_tile, int64_t last_tile);

}  // namespace anchor_attention::cpu
