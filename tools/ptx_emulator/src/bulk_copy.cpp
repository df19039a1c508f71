// The TMA unit: bulk copies of bytes and of boxes of tensors.
#include "bulk_copy.h"

#include <algorithm>
#include <cstring>

#include "access.h"
#include "floating.h"
#include "lanewise.h"
#include "tensor_map.h"

namespace emulator {
namespace {

constexpr uint32_t kBulkGranule = 16;
constexpr uint32_t kTensorAlignment = 128;

// Where a 16-byte piece of a box lies: bits 7 to 9 of the address are added, without carry, to the bits 4 to 6.
uint32_t swizzled(uint32_t address, uint32_t mask) { return address ^ ((address >> 7 & mask) << 4); }

TensorMap read_map(Warp& warp, uint64_t address) {
  if (address % kTensorMapAlignment != 0) raise(FaultKind::misaligned, "tensor map at address " + hex(address));
  const uint8_t* bytes = nullptr;
  const std::vector<uint8_t>* bank = nullptr;
  switch (resolve(Space::generic, address)) {
    case Space::parameter:
      bank = &warp.launch->parameters;
      break;
    case Space::constant:
      bank = &warp.launch->constants;
      break;
    case Space::global:
      bytes = warp.launch->global->span(address, kTensorMapBytes, false);
      break;
    default:
      raise(FaultKind::out_of_bounds, "a tensor map must be in parameter, constant or global memory");
  }
  if (bank != nullptr) {
    if (address + kTensorMapBytes > bank->size()) {
      raise(FaultKind::out_of_bounds,
            "tensor map at " + hex(address) + " of a bank of " + std::to_string(bank->size()) + " bytes");
    }
    bytes = bank->data() + address;
  }
  TensorMap map;
  std::memcpy(&map, bytes, sizeof map);
  if (map.magic != kTensorMapMagic) raise(FaultKind::out_of_bounds, "there is no tensor map at " + hex(address));
  return map;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int axis = 0; axis < map.rank; ++axis) bytes *= map.box[axis];
  return bytes;
}

// The rows of the box at `at` that lie within the tensor.
std::vector<BulkRow> rows_of(const TensorMap& map, const std::array<int64_t, kMaxRank>& at) {
  const auto inside = [&](int axis, int64_t i) { return i >= 0 && i <= int64_t{map.dims[axis]}; };
  const int64_t first = std::max<int64_t>(0, -at[0]);
  const int64_t last = std::min<int64_t>(map.box[0], int64_t{map.dims[0]} + 1 - at[0]);
  std::vector<BulkRow> rows;
  std::array<uint32_t, kMaxRank> in_box{};
  uint32_t n_rows = 1;
  for (int axis = 1; axis < map.rank; ++axis) n_rows *= map.box[axis];
  for (uint32_t row = 0; row < n_rows && first < last; ++row) {
    uint64_t address = map.address + (at[0] + first) * map.element_bytes;
    bool exists = true;
    for (int axis = 1; axis < map.rank; ++axis) {
      const int64_t i = at[axis] + in_box[axis];
      exists &= inside(axis, i);
      address += static_cast<uint64_t>(i) * map.strides[axis - 1];
    }
    const auto size = static_cast<uint32_t>(last - first) * map.element_bytes;
    const auto offset = static_cast<uint32_t>(row * map.box[0] + first) * map.element_bytes;
    if (exists) rows.push_back({address, size, offset});
    for (int axis = 1; axis < map.rank && ++in_box[axis] == map.box[axis]; ++axis) in_box[axis] = 0;
  }
  return rows;
}

uint32_t shared_operand(Warp& warp, const Instruction& in, int first, int lane, uint32_t alignment) {
  const uint64_t address = address_of(warp, &in.operand[first], lane);
  if (address >> 32) raise(FaultKind::out_of_bounds, "shared address " + hex(address) + " is out of range");
  if (address % alignment != 0) {
    raise(FaultKind::misaligned, "bulk copy at shared address " + std::to_string(address) +
                                     " that is not a multiple of " + std::to_string(alignment));
  }
  return static_cast<uint32_t>(address);
}

void check_plain(uint64_t global_address, uint32_t size) {
  if (global_address % kBulkGranule != 0) {
    raise(FaultKind::misaligned, "bulk copy at global address " + hex(global_address));
  }
  if (size % kBulkGranule != 0 || size == 0) {
    raise(FaultKind::misaligned, "bulk copy of " + std::to_string(size) + " bytes, not a multiple of 16");
  }
}

std::array<int64_t, kMaxRank> coordinates(Warp& warp, const Instruction& in, int first, int rank, int lane) {
  std::array<int64_t, kMaxRank> at{};
  for (int axis = 0; axis < rank; ++axis) at[axis] = static_cast<int32_t>(warp.row32(in.operand[first + axis])[lane]);
  return at;
}

TensorMap map_of_rank(Warp& warp, const Instruction& in, int first, int rank, int lane) {
  const TensorMap map = read_map(warp, address_of(warp, &in.operand[first], lane));
  if (map.rank != rank) {
    raise(FaultKind::out_of_bounds,
          "tensor map of rank " + std::to_string(map.rank) + " in a copy of rank " + std::to_string(rank));
  }
  return map;
}

void start_load(Warp& warp, BulkLoad load, uint32_t size, int lane) {
  Block& block = *warp.block;
  const auto found = block.mbarriers.find(load.mbarrier);
  if (found == block.mbarriers.end()) {
    raise(FaultKind::mbarrier, "a bulk copy completes at shared offset " +
                                   std::to_string(int64_t{load.mbarrier} - kSharedBase) + ", where no mbarrier is");
  }
  const Mbarrier& barrier = found->second;
  const auto fenced = [&](ProxyFence kind) {
    return block.ordering.reaches_async_proxy(warp.index, barrier.creator_warp, barrier.creator_lane,
                                              barrier.creation_epoch, kind);
  };
  if (!warp.launch->options.lax && !fenced(ProxyFence::async) && !fenced(ProxyFence::mbarrier_init)) {
    raise(FaultKind::race, barrier.describe() +
                               " is used by a bulk copy without fence.mbarrier_init or fence.proxy.async after its "
                               "initialisation and a barrier");
  }
  load.bytes.assign(size, 0);
  for (const BulkRow& row : load.rows) {
    std::memcpy(&load.bytes[row.offset], warp.launch->global->span(row.address, row.size, false), row.size);
    if (warp.launch->global->is_writable(row.address)) {
      warp.launch->races->read({warp.index, lane, false}, block.ordering.async_clock(warp.index),
                               block.ordering.epoch(warp.index), row.address, row.size);
    }
  }
  block.shared.begin_bulk_copy({warp.index, lane, false}, load.destination, size);
  load.warp = warp.index;
  load.lane = lane;
  load.pc = warp.pc;
  warp.counts().bulk_bytes += size;
  block.bulk_loads.push_back(std::move(load));
}

// Operands: destination, tensor map, coordinates, mbarrier.
template <int Rank>
void load_tensor(Warp& warp, const Instruction& in) {
  for_each_lane(warp, warp.exec, [&](int lane) {
    const TensorMap map = map_of_rank(warp, in, kAddressOperands, Rank, lane);
    BulkLoad load{};
    load.destination = shared_operand(warp, in, 0, lane, kTensorAlignment);
    load.rows = rows_of(map, coordinates(warp, in, 2 * kAddressOperands, Rank, lane));
    load.mbarrier = shared_operand(warp, in, 2 * kAddressOperands + Rank, lane, 8);
    load.swizzle_mask = map.swizzle_mask;
    start_load(warp, std::move(load), box_bytes(map), lane);
  });
  warp.launch->progress();
}

// Operands: destination, source, size, mbarrier.
void load_plain(Warp& warp, const Instruction& in) {
  for_each_lane(warp, warp.exec, [&](int lane) {
    const uint64_t source = address_of(warp, &in.operand[kAddressOperands], lane);
    const uint32_t size = warp.row32(in.operand[2 * kAddressOperands])[lane];
    check_plain(source, size);
    BulkLoad load{};
    load.destination = shared_operand(warp, in, 0, lane, kBulkGranule);
    load.rows = {{source, size, 0}};
    load.mbarrier = shared_operand(warp, in, 2 * kAddressOperands + 1, lane, 8);
    start_load(warp, std::move(load), size, lane);
  });
  warp.launch->progress();
}

void start_store(Warp& warp, BulkStore store, uint32_t swizzle_mask, int lane) {
  const uint8_t* source = warp.block->shared.begin_async_read({warp.index, lane, false}, store.source, store.size);
  store.bytes.resize(store.size);
  for (uint32_t at = 0; at < store.size; at += kBulkGranule) {
    const uint32_t from = swizzled(store.source + at, swizzle_mask) - store.source;
    std::memcpy(&store.bytes[at], source + from, kBulkGranule);
  }
  store.lane = lane;
  store.group = warp.committed_bulk_groups[lane];
  warp.counts().bulk_bytes += store.size;
  warp.bulk_stores.push_back(std::move(store));
}

bool is_same(const BulkStore& left, const BulkStore& right) {
  const auto same_row = [](const BulkRow& a, const BulkRow& b) { return a.address == b.address && a.size == b.size; };
  return left.source == right.source && std::ranges::equal(left.rows, right.rows, same_row);
}

// Operands: tensor map, coordinates, source. Variant 1 adds.
template <int Rank>
void store_tensor(Warp& warp, const Instruction& in) {
  const size_t n_before = warp.bulk_stores.size();
  for_each_lane(warp, warp.exec, [&](int lane) {
    const TensorMap map = map_of_rank(warp, in, 0, Rank, lane);
    BulkStore store{};
    store.rows = rows_of(map, coordinates(warp, in, kAddressOperands, Rank, lane));
    store.source = shared_operand(warp, in, kAddressOperands + Rank, lane, kTensorAlignment);
    store.size = box_bytes(map);
    store.adds_floats = in.variant == 1;
    if (store.adds_floats && !map.is_float32) {
      raise(FaultKind::unsupported, "cp.reduce.async.bulk.tensor of a type other than float32");
    }
    const bool repeats = warp.bulk_stores.size() > n_before && is_same(store, warp.bulk_stores.back());
    if (warp.launch->options.lax && repeats && !store.adds_floats) return;
    start_store(warp, std::move(store), map.swizzle_mask, lane);
  });
  warp.launch->progress();
}

// Operands: destination, source, size. Variant 1 adds.
void store_plain(Warp& warp, const Instruction& in) {
  for_each_lane(warp, warp.exec, [&](int lane) {
    const uint64_t destination = address_of(warp, in.operand.data(), lane);
    BulkStore store{};
    store.size = warp.row32(in.operand[2 * kAddressOperands])[lane];
    check_plain(destination, store.size);
    store.source = shared_operand(warp, in, kAddressOperands, lane, kBulkGranule);
    store.rows = {{destination, store.size, 0}};
    store.adds_floats = in.variant == 1;
    start_store(warp, std::move(store), 0, lane);
  });
  warp.launch->progress();
}

void write_result(Warp& warp, const BulkStore& store) {
  GlobalMemory& global = *warp.launch->global;
  const Ordering& ordering = warp.block->ordering;
  const Clock& clock = ordering.async_clock(warp.index);
  const uint32_t epoch = ordering.epoch(warp.index);
  const Accessor who{warp.index, store.lane, store.adds_floats};
  for (const BulkRow& row : store.rows) {
    if (!store.adds_floats) {
      uint8_t* destination = global.span(row.address, row.size, true);
      warp.launch->races->write(who, clock, epoch, row.address, row.size, false);
      std::memcpy(destination, &store.bytes[row.offset], row.size);
      continue;
    }
    global.span(row.address, row.size, false);
    uint8_t* destination = global.span(row.address, row.size, true);
    warp.launch->races->write(who, clock, epoch, row.address, row.size, false);
    for (uint32_t i = 0; i < row.size; i += sizeof(float)) {
      float old;
      float addend;
      std::memcpy(&old, destination + i, sizeof old);
      std::memcpy(&addend, &store.bytes[row.offset + i], sizeof addend);
      const float sum = canonical(flush<true>(flush<true>(old) + flush<true>(addend)));
      std::memcpy(destination + i, &sum, sizeof sum);
    }
  }
}

void end_read(Warp& warp, BulkStore& store) {
  if (!store.has_read) warp.block->shared.end_async_read({warp.index, store.lane, false}, store.source, store.size);
  store.has_read = true;
}

void commit_bulk_group(Warp& warp, const Instruction&) {
  for_each_lane(warp, warp.exec, [&](int lane) { ++warp.committed_bulk_groups[lane]; });
}

// Variant 1: only the sources need to have been read.
void wait_bulk_group(Warp& warp, const Instruction& in) {
  const uint32_t pending = warp.row32(in.operand[0])[__builtin_ctz(warp.exec)];
  for (BulkStore& store : warp.bulk_stores) {
    if (!(warp.exec >> store.lane & 1)) continue;
    if (store.group + uint64_t{pending} >= warp.committed_bulk_groups[store.lane]) continue;
    end_read(warp, store);
    if (in.variant == 1) continue;
    warp.lane = store.lane;
    write_result(warp, store);
    store.lane = -1;
  }
  std::erase_if(warp.bulk_stores, [](const BulkStore& store) { return store.lane < 0; });
  warp.launch->progress();
}

}  // namespace

void finish_bulk_stores(Warp& warp, Mask lanes) {
  for (BulkStore& store : warp.bulk_stores) {
    if (!(lanes >> store.lane & 1)) continue;
    warp.lane = store.lane;
    if (!store.has_read) {
      raise(FaultKind::race, "thread ends while the bulk copy of " + std::to_string(store.size) +
                                 " bytes that it started may still read shared memory");
    }
    write_result(warp, store);
    store.lane = -1;
  }
  std::erase_if(warp.bulk_stores, [](const BulkStore& store) { return store.lane < 0; });
}

void Block::land(size_t load) {
  const BulkLoad copy = std::move(bulk_loads[load]);
  bulk_loads.erase(bulk_loads.begin() + static_cast<std::ptrdiff_t>(load));
  try {
    const auto found = mbarriers.find(copy.mbarrier);
    if (found == mbarriers.end()) raise(FaultKind::mbarrier, "the mbarrier of a bulk copy is gone");
    Mbarrier& barrier = found->second;
    const auto size = static_cast<uint32_t>(copy.bytes.size());
    for (const BulkRow& row : copy.rows) {
      if (std::memcmp(launch->global->span(row.address, row.size, false), &copy.bytes[row.offset], row.size) != 0) {
        raise(FaultKind::race, "the source of a bulk copy, " + launch->global->describe(row.address) +
                                   ", was written before the copy had completed");
      }
    }
    std::vector<uint8_t> placed(size);
    for (uint32_t at = 0; at < size; at += kBulkGranule) {
      const uint32_t to = swizzled(copy.destination + at, copy.swizzle_mask) - copy.destination;
      std::memcpy(&placed[to], &copy.bytes[at], kBulkGranule);
    }
    shared.finish_bulk_copy(barrier.agent, barrier.phase + 1, copy.destination, size, placed.data());
    barrier.pending_bytes -= size;
    if (barrier.pending_bytes < -kMaxPendingBytes) {
      raise(FaultKind::mbarrier, "the byte count of " + barrier.describe() + " leaves its range");
    }
    complete_phase_if_done(barrier);
    launch->progress();
  } catch (Fault& fault) {
    fault.warp = copy.warp;
    fault.lane = copy.lane;
    fault.pc = copy.pc;
    fault.block = index;
    throw;
  }
}

template <int Rank>
void register_rank(Registry& r) {
  const std::string rank = std::to_string(Rank) + "d";
  r["cp.async.bulk.tensor." + rank + ".load"] = {&load_tensor<Rank>, 0};
  r["cp.async.bulk.tensor." + rank + ".store"] = {&store_tensor<Rank>, 0};
  r["cp.reduce.async.bulk.tensor." + rank + ".add"] = {&store_tensor<Rank>, 1};
}

void register_bulk_copy(Registry& r) {
  register_rank<1>(r);
  register_rank<2>(r);
  register_rank<3>(r);
  register_rank<4>(r);
  register_rank<5>(r);
  r["cp.async.bulk.load"] = {&load_plain, 0};
  r["cp.async.bulk.store"] = {&store_plain, 0};
  r["cp.reduce.async.bulk.add.f32"] = {&store_plain, 1};
  r["cp.async.bulk.commit_group"] = {&commit_bulk_group, 0};
  r["cp.async.bulk.wait_group"] = {&wait_bulk_group, 0};
  r["cp.async.bulk.wait_group.read"] = {&wait_bulk_group, 1};
}

}  // namespace emulator
