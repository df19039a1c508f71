// What CuTe takes for the matrix descriptors of our tiles: one line per operand of a product, with its name, the head
// size and the descriptors of all its steps of 16, for a tile at shared address 1024. Runs on the host.
#include <cstddef>
#include <cstdint>
#include <cstdio>

// Where CuTe asks for the shared address of a pointer.
namespace {
constexpr std::size_t kTileAddress = 1024;
alignas(1024) char tile_memory[192 * 1024];
std::size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const char*>(pointer) - tile_memory + kTileAddress;
}
}  // namespace
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "kernels/cuda/sm90/backward_config.h"
#include "kernels/cuda/sm90/config.h"

namespace {

using namespace cute;
namespace ours = anchor_attention::sm90;
using Element = half_t;
using Depth = Int<16>;  // of a product

template <GMMA::Major kMajor, int kSpan>
auto atom() {
  if constexpr (kMajor == GMMA::Major::K) {
    if constexpr (kSpan == 128) return GMMA::Layout_K_SW128_Atom<Element>{};
    if constexpr (kSpan == 64) return GMMA::Layout_K_SW64_Atom<Element>{};
    if constexpr (kSpan == 32) return GMMA::Layout_K_SW32_Atom<Element>{};
  } else {
    if constexpr (kSpan == 128) return GMMA::Layout_MN_SW128_Atom<Element>{};
    if constexpr (kSpan == 64) return GMMA::Layout_MN_SW64_Atom<Element>{};
    if constexpr (kSpan == 32) return GMMA::Layout_MN_SW32_Atom<Element>{};
  }
}

// Rows `block` · kRows … of a tile of kTileRows rows, whose first kDepth elements are contracted. A tile lies in slabs
// of kSpan bytes, one after the other along the axis that is contiguous.
template <GMMA::Major kMajor, int kSpan, int kTileRows, int kTileDepth, int kRows, int kDepth>
void print(const char* name, int head_dim, int block = 0) {
  using Slabs = conditional_t<kMajor == GMMA::Major::K, Step<_1, _2>, Step<_2, _1>>;
  const auto layout = tile_to_shape(atom<kMajor, kSpan>(), Shape<Int<kTileRows>, Int<kTileDepth>>{}, Slabs{});
  const auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(tile_memory)), layout);
  const auto steps = local_tile(tile, Shape<Int<kRows>, Depth>{}, make_coord(block, _));
  std::printf("%s %d", name, head_dim);
  for_each(make_int_sequence<kDepth / 16>{}, [&](auto step) {
    std::printf(" %llx", static_cast<unsigned long long>(GMMA::make_gmma_desc<kMajor>(steps(_, _, step)).desc_));
  });
  std::printf("\n");
}

template <int kHeadDim>
void forward() {
  constexpr ours::ForwardTile kTile = ours::forward_tile(kHeadDim);
  constexpr int kSpan = 2 * kTile.slab_channels;
  constexpr int kChannels = kTile.slabs() * kTile.slab_channels;
  // CuTe has no product of 48 columns on lines of 64: what begins at the same place is the one of 64.
  constexpr int kColumns = kHeadDim == 48 ? kChannels : kHeadDim;
  print<GMMA::Major::K, kSpan, ours::kWarpgroupRows, kChannels, ours::kWarpgroupRows, kHeadDim>("q", kHeadDim);
  print<GMMA::Major::K, kSpan, kTile.keys, kChannels, kTile.keys, kHeadDim>("k", kHeadDim);
  print<GMMA::Major::MN, kSpan, kChannels, kTile.keys, kColumns, kTile.keys>("v", kHeadDim);
}

template <int kHeadDim>
void backward() {
  constexpr ours::BackwardTile kTile = ours::backward_tile(kHeadDim);
  constexpr int kSpan = kTile.swizzle_bytes();
  constexpr int kKeys = ours::kBackwardKeys;
  constexpr int kColumns = kTile.channels_of_query_gradient();
  constexpr auto K = GMMA::Major::K;
  constexpr auto MN = GMMA::Major::MN;
  for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
    const bool by_queries = kTile.queries == 128;
    print<K, kSpan, kKeys, kHeadDim, 64, kHeadDim>("keys", kHeadDim, warpgroup);
    print<MN, 128, kTile.queries, kKeys, 64, kKeys>("score_gradients", kHeadDim, by_queries ? warpgroup : 0);
    print<MN, kSpan, kHeadDim, kKeys, kColumns, kKeys>("keys_by_key", kHeadDim, by_queries ? 0 : warpgroup);
  }
  print<K, kSpan, kTile.queries, kHeadDim, kTile.queries, kHeadDim>("queries", kHeadDim);
  print<MN, kSpan, kHeadDim, kTile.queries, kHeadDim, kTile.queries>("queries_by_query", kHeadDim);
}

template <int... kHeadDims>
void all() {
  (forward<kHeadDims>(), ...);
  (backward<kHeadDims>(), ...);
}

}  // namespace

int main() { all<32, 48, 64, 96, 128>(); }
