// cp.async, ldmatrix, stmatrix, movmatrix.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "lanewise.h"

namespace emulator {
namespace {

// The hardware reads the source at some time between the copy's issue and its wait, and only a copy that is waited for
// has an effect. So the source is read at both ends, and counts as an access of the thread at the second.
template <class F>
std::array<uint8_t, 16> read_source(const PendingCopy& copy, int lane, F read) {
  std::array<uint8_t, 16> bytes{};
  const uint32_t size = copy.source_size[lane];
  const uint32_t piece = size == copy.size ? size : 1;
  for (uint32_t i = 0; i < size; i += piece) std::memcpy(&bytes[i], read(copy.source[lane] + i, piece), piece);
  return bytes;
}

// Operands: destination, source, copy size, source size or none. What the source does not fill becomes zero.
void copy_async(Warp& warp, const Instruction& in) {
  const int32_t* destination = in.operand.data();
  const int32_t* source = destination + kAddressOperands;
  const int32_t size_row = in.operand[2 * kAddressOperands];
  const int32_t source_size_row = in.operand[2 * kAddressOperands + 1];
  PendingCopy copy{};
  copy.lanes = warp.exec;
  Request request;
  for_each_lane(warp, warp.exec, [&](int lane) {
    copy.size = warp.row32(size_row)[lane];
    const uint32_t source_size = source_size_row == kNoRow ? copy.size : warp.row32(source_size_row)[lane];
    if (source_size > copy.size) {
      raise(FaultKind::out_of_bounds,
            "cp.async of " + std::to_string(copy.size) + " bytes with a source size of " + std::to_string(source_size));
    }
    const uint64_t from = address_of(warp, source, lane);
    if (from % copy.size != 0) {
      raise(FaultKind::misaligned,
            "cp.async of " + std::to_string(copy.size) + " bytes from global address " + hex(from));
    }
    copy.source[lane] = from;
    copy.source_size[lane] = source_size;
    copy.bytes[lane] = read_source(
        copy, lane, [&](uint64_t address, uint32_t size) { return warp.launch->global->access(address, size, false); });
    if (source_size > 0) request.global(from, source_size);
    uint64_t to = address_of(warp, destination, lane);
    resolve(Space::shared, to);
    copy.destination[lane] = static_cast<uint32_t>(to);
    copy.group[lane] = warp.committed_groups[lane];
    warp.block->shared.begin_copy({warp.index, lane, false}, copy.destination[lane], copy.size);
    request.shared(copy.destination[lane], copy.size, lane);
  });
  warp.copies.push_back(copy);
  request.count_into(warp.counts());
}

void commit_group(Warp& warp, const Instruction&) {
  for_each_lane(warp, warp.exec, [&](int lane) { ++warp.committed_groups[lane]; });
}

// Lands the copies of all but the newest `pending` groups.
void wait_for_groups(Warp& warp, uint32_t pending) {
  for (PendingCopy& copy : warp.copies) {
    for_each_lane(warp, copy.lanes & warp.exec, [&](int lane) {
      if (copy.group[lane] + uint64_t{pending} >= warp.committed_groups[lane]) return;
      const auto bytes = read_source(
          copy, lane, [&](uint64_t address, uint32_t size) { return read_global(warp, address, size, false); });
      if (bytes != copy.bytes[lane]) {
        raise(FaultKind::race, "the source of a cp.async, " + warp.launch->global->describe(copy.source[lane]) +
                                   ", was written before the copy was waited for");
      }
      warp.block->shared.finish_copy({warp.index, lane, false}, copy.destination[lane], copy.size,
                                     copy.bytes[lane].data());
      copy.lanes &= ~(1u << lane);
    });
  }
  std::erase_if(warp.copies, [](const PendingCopy& copy) { return copy.lanes == 0; });
  warp.launch->progress();
}

void wait_group(Warp& warp, const Instruction& in) {
  wait_for_groups(warp, warp.row32(in.operand[0])[__builtin_ctz(warp.exec)]);
}

void wait_all(Warp& warp, const Instruction& in) {
  commit_group(warp, in);
  wait_for_groups(warp, 0);
}

constexpr int kMatrixRows = 8;
using Matrix = std::array<std::array<uint16_t, 8>, kMatrixRows>;

// Lane l holds elements 2·(l mod 4) and the next of row l / 4; transposed, of column l / 4.
uint32_t fragment(const Matrix& matrix, int lane, bool transposed) {
  const int outer = lane / 4;
  const int inner = lane % 4 * 2;
  const uint32_t low = transposed ? matrix[inner][outer] : matrix[outer][inner];
  const uint32_t high = transposed ? matrix[inner + 1][outer] : matrix[outer][inner + 1];
  return high << 16 | low;
}

void set_fragment(Matrix& matrix, int lane, bool transposed, uint32_t value) {
  const int outer = lane / 4;
  const int inner = lane % 4 * 2;
  (transposed ? matrix[inner][outer] : matrix[outer][inner]) = static_cast<uint16_t>(value);
  (transposed ? matrix[inner + 1][outer] : matrix[outer][inner + 1]) = static_cast<uint16_t>(value >> 16);
}

template <int N, bool Transposed>
void load_matrix(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  std::array<Matrix, N> matrices;
  Request request;
  for (int lane = 0; lane < N * kMatrixRows; ++lane) {
    warp.lane = lane;
    uint64_t address = address_of(warp, &in.operand[N], lane);
    resolve(Space::shared, address);
    const auto at = static_cast<uint32_t>(address);
    request.shared(at, 16, lane);
    std::memcpy(matrices[lane / kMatrixRows][lane % kMatrixRows].data(),
                warp.block->shared.read({warp.index, kWholeWarp, false}, at, 16), 16);
  }
  for (int i = 0; i < N; ++i) {
    uint32_t* destination = warp.row32(in.operand[i]);
    for (int lane = 0; lane < kLanes; ++lane) destination[lane] = fragment(matrices[i], lane, Transposed);
  }
  request.count_into(warp.counts());
}

template <int N, bool Transposed>
void store_matrix(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  std::array<Matrix, N> matrices;
  for (int i = 0; i < N; ++i) {
    const uint32_t* source = warp.row32(in.operand[kAddressOperands + i]);
    for (int lane = 0; lane < kLanes; ++lane) set_fragment(matrices[i], lane, Transposed, source[lane]);
  }
  Request request;
  for (int lane = 0; lane < N * kMatrixRows; ++lane) {
    warp.lane = lane;
    uint64_t address = address_of(warp, in.operand.data(), lane);
    resolve(Space::shared, address);
    const auto at = static_cast<uint32_t>(address);
    request.shared(at, 16, lane);
    const auto& row = matrices[lane / kMatrixRows][lane % kMatrixRows];
    warp.block->shared.write({warp.index, kWholeWarp, false}, at, 16, reinterpret_cast<const uint8_t*>(row.data()));
  }
  warp.launch->progress();
  request.count_into(warp.counts());
}

void move_matrix(Warp& warp, const Instruction& in) {
  if (!warp.converge(kFullMask)) return;
  Matrix matrix;
  const uint32_t* source = warp.row32(in.operand[1]);
  for (int lane = 0; lane < kLanes; ++lane) set_fragment(matrix, lane, false, source[lane]);
  uint32_t* destination = warp.row32(in.operand[0]);
  for (int lane = 0; lane < kLanes; ++lane) destination[lane] = fragment(matrix, lane, true);
}

template <int N>
void register_matrix(Registry& r) {
  const std::string shape = ".sync.aligned.m8n8.x" + std::to_string(N);
  r["ldmatrix" + shape + ".shared.b16"] = {&load_matrix<N, false>, 0};
  r["ldmatrix" + shape + ".trans.shared.b16"] = {&load_matrix<N, true>, 0};
  r["stmatrix" + shape + ".shared.b16"] = {&store_matrix<N, false>, 0};
  r["stmatrix" + shape + ".trans.shared.b16"] = {&store_matrix<N, true>, 0};
}

}  // namespace

void register_copy(Registry& r) {
  r["cp.async.ca.shared.global"] = {&copy_async, 0};
  r["cp.async.cg.shared.global"] = {&copy_async, 0};
  r["cp.async.commit_group"] = {&commit_group, 0};
  r["cp.async.wait_group"] = {&wait_group, 0};
  r["cp.async.wait_all"] = {&wait_all, 0};
  register_matrix<1>(r);
  register_matrix<2>(r);
  register_matrix<4>(r);
  r["movmatrix.sync.aligned.m8n8.trans.b16"] = {&move_matrix, 0};
}

}  // namespace emulator
