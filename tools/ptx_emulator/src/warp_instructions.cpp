// Instructions through which the lanes of a warp exchange values.
#include <algorithm>
#include <bit>

#include "lanewise.h"

namespace emulator {
namespace {

// The member mask, the same for all executing lanes; false while lanes that it names are still on their way.
bool gather(Warp& warp, int32_t mask_row, Mask& members) {
  const uint32_t* masks = warp.row32(mask_row);
  members = masks[std::countr_zero(warp.exec)];
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((warp.exec >> lane & 1) && masks[lane] != members) {
      warp.lane = lane;
      raise(FaultKind::divergence,
            "member mask " + hex(masks[lane]) + " differs from another thread's " + hex(members));
    }
  }
  return warp.converge(members);
}

enum class Shuffle { up, down, butterfly, index };

// Operands: result, predicate or none, value, source lane, clamp and segment, member mask.
template <Shuffle Mode>
void shuffle(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[5], members)) return;
  const uint32_t* value = warp.row32(in.operand[2]);
  const uint32_t* by = warp.row32(in.operand[3]);
  const uint32_t* clamp = warp.row32(in.operand[4]);
  alignas(64) uint32_t result[kLanes] = {};
  Mask in_range = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(members >> lane & 1)) continue;
    const int b = static_cast<int>(by[lane] & 31);
    const int segment = static_cast<int>(clamp[lane] >> 8 & 31);
    const int last = (lane & segment) | (static_cast<int>(clamp[lane] & 31) & ~segment);
    int from = lane;
    bool valid = false;
    switch (Mode) {
      case Shuffle::up:
        from = lane - b;
        valid = from >= last;
        break;
      case Shuffle::down:
        from = lane + b;
        valid = from <= last;
        break;
      case Shuffle::butterfly:
        from = lane ^ b;
        valid = from <= last;
        break;
      case Shuffle::index:
        from = (lane & segment) | (b & ~segment);
        valid = from <= last;
        break;
    }
    if (!valid) from = lane;
    if (!(members >> from & 1)) {
      warp.lane = lane;
      raise(FaultKind::divergence, "shfl.sync reads lane " + std::to_string(from) + ", which the member mask " +
                                       hex(members) + " does not name");
    }
    result[lane] = value[from];
    in_range |= static_cast<Mask>(valid) << lane;
  }
  if (in.operand[0] != kNoRow) commit(warp.row32(in.operand[0]), result, warp.exec);
  if (in.operand[1] != kNoRow) warp.set_predicate(in.operand[1], in_range);
}

enum class Vote { all, any, uniform };

template <Vote Mode>
void vote(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[2], members)) return;
  const Mask value = warp.predicate(in.operand[1]) & members;
  const bool result = Mode == Vote::all   ? value == members
                      : Mode == Vote::any ? value != 0
                                          : value == 0 || value == members;
  warp.set_predicate(in.operand[0], result ? kFullMask : 0);
}

void fill(Warp& warp, int32_t row, uint32_t value) {
  alignas(64) uint32_t result[kLanes];
  std::fill_n(result, kLanes, value);
  commit(warp.row32(row), result, warp.exec);
}

void ballot(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[2], members)) return;
  fill(warp, in.operand[0], warp.predicate(in.operand[1]) & members);
}

template <class F, class T>
void reduce(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[2], members)) return;
  const uint32_t* value = warp.row32(in.operand[1]);
  T result = std::bit_cast<T>(value[std::countr_zero(members)]);
  for (Mask rest = members & (members - 1); rest; rest &= rest - 1) {
    result = F{}(result, std::bit_cast<T>(value[std::countr_zero(rest)]));
  }
  fill(warp, in.operand[0], std::bit_cast<uint32_t>(result));
}

template <class T, class F>
void register_reduction(Registry& r, const std::string& name, F) {
  r["redux.sync." + name] = {&reduce<F, T>, 0};
}

template <class T>
Mask equal_lanes(Warp& warp, int32_t source, Mask members, int lane) {
  const auto* value = row<T>(warp, source);
  Mask result = 0;
  for (int other = 0; other < kLanes; ++other) {
    if ((members >> other & 1) && value[other] == value[lane]) result |= 1u << other;
  }
  return result;
}

template <class T>
void match_any(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[2], members)) return;
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = equal_lanes<T>(warp, in.operand[1], members, lane);
  commit(warp.row32(in.operand[0]), result, warp.exec);
}

template <class T>
void match_all(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[3], members)) return;
  const bool all = equal_lanes<T>(warp, in.operand[2], members, std::countr_zero(members)) == members;
  fill(warp, in.operand[0], all ? members : 0);
  if (in.operand[1] != kNoRow) warp.set_predicate(in.operand[1], all ? kFullMask : 0);
}

void elect(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[2], members)) return;
  const int leader = std::countr_zero(members);
  if (in.operand[0] != kNoRow) fill(warp, in.operand[0], leader);
  if (in.operand[1] != kNoRow) warp.set_predicate(in.operand[1], 1u << leader);
}

void active_mask(Warp& warp, const Instruction& in) { fill(warp, in.operand[0], warp.exec); }

void warp_barrier(Warp& warp, const Instruction& in) {
  Mask members;
  if (!gather(warp, in.operand[0], members)) return;
  if (members == warp.alive()) {
    warp.block->ordering.synchronise(warp.index);
  } else {
    warp.block->ordering.advance(warp.index);
  }
}

}  // namespace

void register_warp(Registry& r) {
  r["shfl.sync.up.b32"] = {&shuffle<Shuffle::up>, 0};
  r["shfl.sync.down.b32"] = {&shuffle<Shuffle::down>, 0};
  r["shfl.sync.bfly.b32"] = {&shuffle<Shuffle::butterfly>, 0};
  r["shfl.sync.idx.b32"] = {&shuffle<Shuffle::index>, 0};
  r["vote.sync.all.pred"] = {&vote<Vote::all>, 0};
  r["vote.sync.any.pred"] = {&vote<Vote::any>, 0};
  r["vote.sync.uni.pred"] = {&vote<Vote::uniform>, 0};
  r["vote.sync.ballot.b32"] = {&ballot, 0};
  register_reduction<uint32_t>(r, "add.u32", [](uint32_t a, uint32_t b) { return a + b; });
  register_reduction<int32_t>(r, "add.s32", [](int32_t a, int32_t b) { return a + b; });
  register_reduction<uint32_t>(r, "min.u32", [](uint32_t a, uint32_t b) { return std::min(a, b); });
  register_reduction<int32_t>(r, "min.s32", [](int32_t a, int32_t b) { return std::min(a, b); });
  register_reduction<uint32_t>(r, "max.u32", [](uint32_t a, uint32_t b) { return std::max(a, b); });
  register_reduction<int32_t>(r, "max.s32", [](int32_t a, int32_t b) { return std::max(a, b); });
  register_reduction<uint32_t>(r, "and.b32", [](uint32_t a, uint32_t b) { return a & b; });
  register_reduction<uint32_t>(r, "or.b32", [](uint32_t a, uint32_t b) { return a | b; });
  register_reduction<uint32_t>(r, "xor.b32", [](uint32_t a, uint32_t b) { return a ^ b; });
  r["match.any.sync.b32"] = {&match_any<uint32_t>, 0};
  r["match.any.sync.b64"] = {&match_any<uint64_t>, 0};
  r["match.all.sync.b32"] = {&match_all<uint32_t>, 0};
  r["match.all.sync.b64"] = {&match_all<uint64_t>, 0};
  r["elect.sync"] = {&elect, 0};
  r["activemask.b32"] = {&active_mask, 0};
  r["bar.warp.sync"] = {&warp_barrier, 0};
}

}  // namespace emulator
