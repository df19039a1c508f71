// All gradients of the attention in one pass over the keys: a block owns 128 keys and streams the queries that read
// them. dV = Pᵀ dO and dK = scale · dSᵀ Q stay in registers, dQ = dS K is added to a float32 sum in global memory, with
// dS = P ∘ (dO Vᵀ − delta). docs/hopper_backward.md explains how it works.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/primitives/async_proxy.cuh"
#include "kernels/cuda/primitives/cp_async.cuh"
#include "kernels/cuda/primitives/mbarrier.cuh"
#include "kernels/cuda/primitives/shared_memory.cuh"
#include "kernels/cuda/primitives/tma.cuh"
#include "kernels/cuda/primitives/warpgroup.cuh"
#include "kernels/cuda/sm90/backward_items.cuh"
#include "kernels/cuda/sm90/backward_products.cuh"

namespace anchor_attention::sm90 {

// Barrier 0 is that of __syncthreads.
enum BackwardNamedBarrier : uint32_t { kConsumersBarrier = 1 };

struct BackwardBarriers {
  uint64_t keys;
  uint64_t full[kBackwardStages];   // queries, dO and statistics of a stage have arrived
  uint64_t empty[kBackwardStages];  // and have been used
  uint64_t gradient_full;           // dQ of a tile is in shared memory
  uint64_t gradient_empty;
};

// What a block keeps in shared memory besides its tiles.
struct BackwardBlock {
  BackwardBarriers barriers;
  KeyItem item;
  int32_t counts[kBackwardStages];  // queries of a stage's tile
};
static_assert(sizeof(BackwardBlock) <= kBackwardStaticSharedBytes);

constexpr int kConsumerWarps = kBackwardConsumers / 32;

// Index into [batch, heads] of the queries.
__device__ inline int64_t batch_head(const BackwardKernelParams& p, const KeyItem& item, const QueryTile& tile) {
  return static_cast<int64_t>(item.batch) * p.kv_heads * p.heads_per_kv_head + tile.head;
}

__device__ inline bool is_first_lane() { return threadIdx.x % 32 == 0; }
__device__ inline int consumer_thread() { return static_cast<int>(threadIdx.x) - kWarpgroupThreads; }
__device__ inline void sync_consumers() { ptx::named_barrier_sync(kConsumersBarrier, kBackwardConsumers); }

__device__ inline void wait_phase(uint64_t& barrier, uint32_t phase) {
  ptx::mbarrier_wait(ptx::shared_address(&barrier), phase & 1);
}

// One arrival per warp, after what its lanes have done.
__device__ inline void arrive_as_warp(uint64_t& barrier) {
  __syncwarp();
  if (is_first_lane()) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
}

__device__ inline void initialise(BackwardBarriers& barriers) {
  ptx::mbarrier_init(ptx::shared_address(&barriers.keys), 1);
#pragma unroll
  for (int stage = 0; stage < kBackwardStages; ++stage) {
    ptx::mbarrier_init(ptx::shared_address(&barriers.full[stage]), 32);
    ptx::mbarrier_init(ptx::shared_address(&barriers.empty[stage]), kConsumerWarps);
  }
  ptx::mbarrier_init(ptx::shared_address(&barriers.gradient_full), kConsumerWarps);
  ptx::mbarrier_init(ptx::shared_address(&barriers.gradient_empty), 1);
  ptx::fence_mbarrier_init();
}

// Loads a tile of kRows tokens, one copy per block of channels.
template <class Traits, int kRows>
__device__ inline void load_tile(uint32_t shared, const TensorMap& map, const AxisSteps& steps, int32_t token,
                                 int32_t batch, int32_t head, uint32_t barrier) {
#pragma unroll
  for (int channel = 0; channel < Traits::kTile.head_dim; channel += Traits::kTile.channels) {
    ptx::tma_load(shared + channel * 2 * kRows, map, {channel, token, head * steps.head, batch * steps.batch}, barrier);
  }
}

// The loading warp.
template <class Traits>
__device__ inline void load_tiles(const BackwardKernelParams& p, BackwardBlock& block, uint32_t shared,
                                  float* statistics) {
  const KeyItem& item = block.item;
  if (item.n_tiles == 0) return;  // nobody would wait for the keys
  if (is_first_lane()) {
    const uint32_t barrier = ptx::shared_address(&block.barriers.keys);
    ptx::mbarrier_arrive_expect(barrier, 2 * Traits::kKeyTileBytes);
    load_tile<Traits, kBackwardKeys>(shared + Traits::kAt.k, p.k, p.k_steps, item.begin, item.batch, item.kv_head,
                                     barrier);
    load_tile<Traits, kBackwardKeys>(shared + Traits::kAt.v, p.v, p.v_steps, item.begin, item.batch, item.kv_head,
                                     barrier);
  }
  QueryWalk<Traits::kQueries> walk(p, item);
  QueryTile tile;
  for (uint32_t n = 0; walk.next(tile); ++n) {
    const int stage = n % kBackwardStages;
    wait_phase(block.barriers.empty[stage], n / kBackwardStages + 1);
    const uint32_t barrier = ptx::shared_address(&block.barriers.full[stage]);
    const uint32_t offset = stage * Traits::kQueryTileBytes;
    const auto* head_statistics =
        reinterpret_cast<const float2*>(p.row_statistics) + batch_head(p, item, tile) * p.n_queries;
    // Statistics of a query that is not in the range are zero, as its row will be: see clear_rows.
#pragma unroll
    for (int i = 0; i < Traits::kQueries; i += 32) {
      const int32_t query = i + static_cast<int32_t>(threadIdx.x % 32);
      const float2 lse_delta = query < tile.count ? head_statistics[tile.begin + query] : make_float2(0.0f, 0.0f);
      statistics[2 * stage * Traits::kQueries + query] = lse_delta.x;
      statistics[(2 * stage + 1) * Traits::kQueries + query] = lse_delta.y;
    }
    if (is_first_lane()) {
      block.counts[stage] = tile.count;
      ptx::mbarrier_arrive_expect(barrier, 2 * Traits::kQueryTileBytes);
      load_tile<Traits, Traits::kQueries>(shared + Traits::kAt.q + offset, p.q, p.q_steps, tile.begin, item.batch,
                                          tile.head, barrier);
      load_tile<Traits, Traits::kQueries>(shared + Traits::kAt.grad_out + offset, p.grad_out, p.grad_out_steps,
                                          tile.begin, item.batch, tile.head, barrier);
    } else {
      ptx::mbarrier_arrive(barrier);
    }
  }
}

// The adding warp: adds dQ of each tile from shared memory to its sum when it is the block's turn. The first block of a
// sum stores instead, so that nothing has to clear it, and waits for no other; the last one has no successor to tell.
template <class Traits>
__device__ inline void add_query_gradients(const BackwardKernelParams& p, BackwardBlock& block, uint32_t shared) {
  if (!is_first_lane()) return;
  constexpr int kBytes = Traits::kQueryGradientBytes;
  QueryWalk<Traits::kQueries> walk(p, block.item);
  QueryTile tile;
  for (uint32_t n = 0; walk.next(tile); ++n) {
    const int64_t index = batch_head(p, block.item, tile) * p.n_sums + tile.sum;
    int32_t* turn = p.query_turns + index;
    float* sums = p.query_gradients + index * (kBytes / 4);
    wait_phase(block.barriers.gradient_full, n);
    if (tile.turn == 0) {
      ptx::bulk_store(sums, shared + Traits::kAt.query_gradients, kBytes);
    } else {
      await_turn(turn, tile.turn);
      ptx::fence_async_proxy_global();
      ptx::bulk_add(sums, shared + Traits::kAt.query_gradients, kBytes);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::mbarrier_arrive(ptx::shared_address(&block.barriers.gradient_empty));
    if (tile.turn + 1 == p.turns_per_sum) continue;
    ptx::bulk_wait<0>();
    ptx::fence_async_proxy_global();
    ptx::store_release(turn, tile.turn + 1);
  }
}

// Replaces all roles where every key of the block is masked: other blocks still wait for its turns.
template <class Traits>
__device__ inline void pass_turns(const BackwardKernelParams& p, const KeyItem& item) {
  constexpr int kFloats = Traits::kQueryGradientBytes / 4;
  QueryWalk<Traits::kQueries> walk(p, item);
  QueryTile tile;
  while (walk.next(tile)) {
    const int64_t index = batch_head(p, item, tile) * p.n_sums + tile.sum;
    int32_t* turn = p.query_turns + index;
    if (tile.turn == 0) {
      auto* sums = reinterpret_cast<float4*>(p.query_gradients + index * kFloats);
      for (int i = threadIdx.x % 32; i < kFloats / 4; i += 32) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      __syncwarp();
    }
    if (is_first_lane() && tile.turn + 1 < p.turns_per_sum) {
      await_turn(turn, tile.turn);
      ptx::store_release(turn, tile.turn + 1);
    }
    __syncwarp();
  }
}

// All consumers zero the rows of a tile that must not take part: their contents, possibly NaN, would reach the sums
// over rows. The caller synchronises before wgmma reads the tile.
template <class Traits, int kRows>
__device__ inline void clear_rows(uint32_t tile, const auto& keeps) {
  constexpr uint32_t kZeros[4] = {};
  constexpr int kChunks = Traits::kRowBytes / 16;
  for (int i = consumer_thread(); i < kRows * kChunks; i += kBackwardConsumers) {
    if (keeps(i / kChunks)) continue;
#pragma unroll
    for (int block = 0; block < Traits::kTile.head_dim; block += Traits::kTile.channels) {
      ptx::store_shared(tile + block * 2 * kRows + i * 16, kZeros);
    }
  }
}

// Waits for a tile of queries. Rows beyond the range are made zero, as their statistics are: their probability is 1,
// but dO, Q and dS are 0, and so is their contribution.
template <class Traits>
__device__ inline void await_queries(BackwardBlock& block, uint32_t q, uint32_t grad_out, uint32_t n) {
  wait_phase(block.barriers.full[n % kBackwardStages], n / kBackwardStages);
  const int32_t count = block.counts[n % kBackwardStages];
  if (count == Traits::kQueries) return;
  const auto keeps = [count](int row) { return row < count; };
  clear_rows<Traits, Traits::kQueries>(q, keeps);
  clear_rows<Traits, Traits::kQueries>(grad_out, keeps);
  ptx::fence_async_proxy();
  sync_consumers();
}

// Splits of a tile are added in order, so the sum is the same in every run. Returns false where later splits follow.
template <class Traits>
__device__ inline bool add_splits(const BackwardKernelParams& p, const KeyItem& item,
                                  float (&grad_k)[Traits::kKeyGradient], float (&grad_v)[Traits::kKeyGradient]) {
  const int64_t index = static_cast<int64_t>(item.batch_kv_head) * p.schedule.n_accumulators + item.accumulator;
  float* sums = p.key_gradients + index * 2 * (Traits::kKeyTileBytes / 2);
  const bool last = item.split + 1 == item.n_splits;
  if (consumer_thread() == 0) await_turn(p.key_turns + index, item.split);
  sync_consumers();
#pragma unroll
  for (int i = 0; i < Traits::kKeyGradient / 2; ++i) {
    float4* at = reinterpret_cast<float4*>(sums) + i * kBackwardConsumers + consumer_thread();
    float* mine = i < Traits::kKeyGradient / 4 ? grad_k + 4 * i : grad_v + 4 * i - Traits::kKeyGradient;
    if (item.split > 0) {
      const float4 earlier = *at;
      mine[0] += earlier.x;
      mine[1] += earlier.y;
      mine[2] += earlier.z;
      mine[3] += earlier.w;
    }
    if (!last) *at = make_float4(mine[0], mine[1], mine[2], mine[3]);
  }
  if (last) return true;
  sync_consumers();
  if (consumer_thread() == 0) ptx::store_release(p.key_turns + index, item.split + 1);
  return false;
}

template <class P, int kCount>
__device__ inline void store_gradient(void* gradient, const BackwardKernelParams& p, const KeyItem& item,
                                      const float (&values)[kCount], int32_t head_dim, float factor) {
  if (gradient == nullptr) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int key = consumer_thread() / 32 * 16 + lane / 4 + 8 * row;
    const int32_t token = item.begin + key;
    if (token >= item.end) continue;
    const bool keep = item.keeps(key);
    auto* out = static_cast<typename P::Storage*>(gradient) +
                ((static_cast<int64_t>(item.batch) * p.n_keys + token) * p.kv_heads + item.kv_head) * head_dim;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
      if (8 * n >= head_dim) break;
      store_pair<P>(out + 8 * n + lane % 4 * 2, keep ? factor * values[4 * n + 2 * row] : 0.0f,
                    keep ? factor * values[4 * n + 2 * row + 1] : 0.0f);
    }
  }
}

// The two consumer warpgroups, which multiply.
template <class P, int kHeadDim, QueryGradient kQueryGradient, class Traits = BackwardTraits<P, kHeadDim>>
__device__ inline void multiply_tiles(const BackwardKernelParams& p, BackwardBlock& block, uint32_t shared,
                                      const float* statistics, float4* query_gradients) {
  constexpr bool kAddsQueryGradients = kQueryGradient == QueryGradient::accumulated;
  // Broadcast from one lane, so that the compiler knows descriptors to be uniform across the warp.
  const uint32_t warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads - 1, 0);
  const uint32_t keys_k = shared + Traits::kAt.k + warpgroup * kWarpgroupRows * Traits::kRowBytes;
  const uint32_t keys_v = shared + Traits::kAt.v + warpgroup * kWarpgroupRows * Traits::kRowBytes;
  const auto q_of = [shared](uint32_t n) {
    return shared + Traits::kAt.q + n % kBackwardStages * Traits::kQueryTileBytes;
  };
  const auto grad_out_of = [shared](uint32_t n) {
    return shared + Traits::kAt.grad_out + n % kBackwardStages * Traits::kQueryTileBytes;
  };

  float r_grad_k[Traits::kKeyGradient] = {};
  float r_grad_v[Traits::kKeyGradient] = {};
  float r_scores[Traits::kScores];
  ScoreOperand<Traits::kScores> r_p;
  ScoreOperand<Traits::kScores> r_ds;

  const uint32_t n_tiles = block.item.keeps_any() ? block.item.n_tiles : 0;
  const bool keeps_all = block.item.keeps_all();
  if (n_tiles > 0) {
    wait_phase(block.barriers.keys, 0);
    if (!keeps_all) {
      // Keys that do not take part get P = 0, but 0 · NaN would be in dS and in dQ.
      const auto keeps = [&](int key) { return block.item.keeps(key); };
      clear_rows<Traits, kBackwardKeys>(shared + Traits::kAt.k, keeps);
      clear_rows<Traits, kBackwardKeys>(shared + Traits::kAt.v, keeps);
      ptx::fence_async_proxy();
      sync_consumers();
    }
    await_queries<Traits>(block, q_of(0), grad_out_of(0), 0);
    ptx::wgmma_fence();
    qk_gemm<P, kHeadDim>(r_scores, keys_k, q_of(0));
    ptx::wgmma_commit();
  }
  for (uint32_t n = 0; n_tiles > 0; ++n) {
    const float* s_lse = statistics + n % kBackwardStages * 2 * Traits::kQueries;
    float r_gradients[Traits::kScores];
    ptx::wgmma_fence();
    qk_gemm<P, kHeadDim>(r_gradients, keys_v, grad_out_of(n));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::keep_order(r_scores);
    probabilities(r_scores, s_lse, p.scale_log2);
    ptx::keep_order(r_scores);
    if (!keeps_all) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (block.item.keeps(consumer_thread() / 32 * 16 + threadIdx.x % 32 / 4 + 8 * row)) continue;
#pragma unroll
        for (int i = 2 * row; i < Traits::kScores; i += 4) r_scores[i] = r_scores[i + 1] = 0.0f;
      }
    }
    // dV needs only P: it starts before dS is ready.
    to_operand<P>(r_p, r_scores);
    ptx::wgmma_fence();
    pv_gemm<P, kHeadDim>(r_grad_v, r_p, grad_out_of(n));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::keep_order(r_gradients);
    score_gradients(r_gradients, r_scores, s_lse + Traits::kQueries);
    to_operand<P>(r_ds, r_gradients);
    float r_grad_q[Traits::kQueryGradient];
    const uint32_t tile = shared + Traits::kAt.score_gradients + n % 2 * Traits::kScoreTileBytes;
    if constexpr (kAddsQueryGradients) {
      store_score_gradients(r_ds, tile);
      ptx::fence_async_proxy();
      // dS of both warpgroups is ready, and both have finished dQ of the previous tile, so that the next round may
      // overwrite the other tile of dS.
      sync_consumers();
    }
    ptx::wgmma_fence();
    if constexpr (kAddsQueryGradients) {
      dsk_gemm<P, kHeadDim>(r_grad_q, tile, shared + Traits::kAt.k, warpgroup);
      ptx::wgmma_commit();
    }
    pv_gemm<P, kHeadDim>(r_grad_k, r_ds, q_of(n));
    ptx::wgmma_commit();

    // dK still runs while dQ is handed over and the next scores are queued: the tensor cores stay busy.
    ptx::wgmma_wait<1>();
    ptx::keep_order(r_grad_v);
    keep_order(r_p);
    if constexpr (kAddsQueryGradients) {
      ptx::keep_order(r_grad_q);
      wait_phase(block.barriers.gradient_empty, n + 1);
#pragma unroll
      for (int i = 0; i < Traits::kQueryGradient / 4; ++i) {
        query_gradients[i * kBackwardConsumers + consumer_thread()] =
            make_float4(r_grad_q[4 * i], r_grad_q[4 * i + 1], r_grad_q[4 * i + 2], r_grad_q[4 * i + 3]);
      }
      ptx::fence_async_proxy();
      arrive_as_warp(block.barriers.gradient_full);
    }
    if (n + 1 == n_tiles) break;
    await_queries<Traits>(block, q_of(n + 1), grad_out_of(n + 1), n + 1);
    ptx::wgmma_fence();
    qk_gemm<P, kHeadDim>(r_scores, keys_k, q_of(n + 1));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::keep_order(r_grad_k);
    keep_order(r_ds);
    arrive_as_warp(block.barriers.empty[n % kBackwardStages]);
  }
  ptx::wgmma_wait<0>();
  ptx::keep_order(r_grad_k);
  keep_order(r_ds);

  if (block.item.n_splits > 1 && !add_splits<Traits>(p, block.item, r_grad_k, r_grad_v)) return;
  store_gradient<P>(p.grad_k, p, block.item, r_grad_k, p.head_dim, p.scale);
  store_gradient<P>(p.grad_v, p, block.item, r_grad_v, p.value_dim, 1.0f);
}

template <class P, int kHeadDim, QueryGradient kQueryGradient, class Traits = BackwardTraits<P, kHeadDim>>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attention_backward(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ Chunk dynamic_shared[];
  __shared__ BackwardBlock block;
  const uint32_t unaligned = ptx::shared_address(dynamic_shared);
  const uint32_t padding = (kSharedAlignment - unaligned % kSharedAlignment) % kSharedAlignment;
  std::byte* tiles = reinterpret_cast<std::byte*>(dynamic_shared) + padding;
  const uint32_t shared = unaligned + padding;
  auto* statistics = reinterpret_cast<float*>(tiles + Traits::kAt.statistics);

  if (threadIdx.x < 32) {
    const KeyItem item = take_item<Traits::kQueries>(p);
    if (threadIdx.x == 0) {
      block.item = item;
      initialise(block.barriers);
    }
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroupThreads) {
    ptx::release_registers<kBackwardProducerRegisters>();
    const bool works = block.item.keeps_any();
    if (threadIdx.x < 32) {
      if (works) load_tiles<Traits>(p, block, shared, statistics);
    } else if (threadIdx.x < 64 && kQueryGradient == QueryGradient::accumulated) {
      if (works) {
        add_query_gradients<Traits>(p, block, shared);
      } else {
        pass_turns<Traits>(p, block.item);
      }
    }
  } else {
    ptx::acquire_registers<kBackwardConsumerRegisters>();
    multiply_tiles<P, kHeadDim, kQueryGradient>(p, block, shared, statistics,
                                                reinterpret_cast<float4*>(tiles + Traits::kAt.query_gradients));
  }
}

template <class P, int kHeadDim, QueryGradient kQueryGradient>
const void* backward_kernel() {
  return reinterpret_cast<const void*>(&attention_backward<P, kHeadDim, kQueryGradient>);
}

}  // namespace anchor_attention::sm90
