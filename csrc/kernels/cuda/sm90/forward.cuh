// The forward pass of sm_90a: one warpgroup loads, the others own 64 queries each, walk the tiles of keys together and
// keep a running softmax. Blocks are persistent and take one item after another; queries of the next are loaded under
// the last product of the one before. Names: s shared, r registers.
#pragma once

#include <cstdint>

#include "kernels/cuda/common/rows.cuh"
#include "kernels/cuda/primitives/stmatrix.cuh"
#include "kernels/cuda/primitives/wgmma.cuh"
#include "kernels/cuda/sm90/forward_stream.cuh"
#include "kernels/cuda/sm90/kernels_sm90.h"
#include "kernels/cuda/sm90/softmax.cuh"
#include "kernels/cuda/sm90/swizzle.cuh"

namespace anchor_attention::sm90 {

// Named barriers; 0 is that of __syncthreads.
enum NamedBarrier : uint32_t { kWarpgroupBarrier = 1, kTurnBarrier = 4 };

template <class P, int kHeadDim>
struct ForwardTraits : ForwardLayout<kHeadDim> {
  using Layout = ForwardLayout<kHeadDim>;
  static constexpr int kThreads = Layout::kTile.threads();
  static constexpr int kPolynomialEvery = Layout::kTile.polynomial_every;
  static constexpr bool kPingPong = Layout::kTile.ping_pong;
  static constexpr ptx::MatrixType kType =
      P::kPrecision == Precision::bfloat16 ? ptx::MatrixType::bf16 : ptx::MatrixType::f16;
  static constexpr int kScores = Layout::kKeys / 2;  // registers of a thread
  static constexpr int kOutputs = kHeadDim / 2;
  static constexpr int kProbabilities = Layout::kKeys / 16;  // operands of 16 keys
};

template <class P, int kHeadDim>
class ForwardConsumer {
  using Traits = ForwardTraits<P, kHeadDim>;
  static constexpr int kSpan = Traits::kSpan;
  static constexpr int kStages = Traits::kStages;
  // Whole slabs, though products read no more than the head size: neighbouring threads then write to different banks.
  static constexpr int kRowChunks = Traits::kSlabs * Traits::kSlabChannels / 8;
  static constexpr int kQueryChunks = kWarpgroupRows * kRowChunks / kWarpgroupThreads;  // of a thread
  static_assert(kWarpgroupRows * kRowChunks % kWarpgroupThreads == 0, "threads copy equal shares");

 public:
  __device__ ForwardConsumer(const ForwardKernelParams& p, const ForwardShared<kHeadDim>& shared)
      : p_(p),
        shared_(shared),
        warpgroup_(__shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads - 1, 0)),
        thread_(threadIdx.x % kWarpgroupThreads),
        s_q_(shared.q + warpgroup_ * Traits::kQueryBytes),
        s_out_(shared.out + warpgroup_ * Traits::kQueryBytes) {}

  __device__ void run() {
    if (warpgroup_ == Traits::kConsumers - 1) pass_turn();
    QueryRegisters r_q{};
    bool loaded = false;  // queries of the item that comes next
    for (uint32_t index = blockIdx.x; index < p_.n_work; index += gridDim.x) {
      if (!loaded) loaded = load_q(index, r_q);
      if (loaded) {
        write_rotated_q(r_q);
        loaded = attend(index, r_q);
      } else {
        pass_over();
      }
    }
    // The last turn that was passed on has to be taken as well.
    if (Traits::kPingPong && warpgroup_ == 0) take_turn();
    if (thread_ == 0) ptx::bulk_wait_read<0>();
  }

 private:
  // A thread's share of a warpgroup's queries on their way to shared memory, and the factors that rotate them.
  struct QueryRegisters {
    Chunk chunks[kQueryChunks];
    float2 factors[kQueryChunks][4];
  };

  // This warpgroup's part of an item.
  __device__ cuda::WorkItem find_work(uint32_t index) const {
    cuda::WorkItem work = find_work_item(p_.schedule, index, p_.heads, Traits::kQueries);
    work.begin += warpgroup_ * kWarpgroupRows;
    return work;
  }

  // Returns whether `r_q` then holds this warpgroup's queries of the block's next item.
  __device__ bool attend(uint32_t index, QueryRegisters& r_q) {
    float r_scores[Traits::kScores];
    float r_out[Traits::kOutputs];
    uint32_t r_probabilities[Traits::kProbabilities][4];
    SoftmaxState state;
    cuda::WorkItem work;
    float inverse_sums[2];
    bool next_loaded = false;
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) r_out[i] = 0.0f;

    wait_for(control().k_full);
    if ((control().notes[ring_.stage].flags & kNoKeys) != 0) {
      pass_over();
      work = find_work(index);
      store_statistics(work, state, inverse_sums);
    } else {
      take_turn();
      ptx::keep_order(r_scores);
      ptx::wgmma_fence();
      qk_gemm(r_scores);
      ptx::wgmma_commit();
      pass_turn();
      ptx::wgmma_wait<0>();
      ptx::keep_order(r_scores);
      TileNote note = read_note();
      if ((note.flags & kPartial) != 0) mask_scores(r_scores, note.valid);
      const Rescaling rescaling = move_maximum(r_scores, state, p_.scale_log2);
      exponentiate<Traits::kPolynomialEvery>(r_scores, state, rescaling, p_.scale_log2);
      pack_probabilities(r_probabilities, r_scores);
      wait_for_more_keys(note);
      // Each round has two products in flight: the scores of this tile, and the previous tile's probabilities times its
      // values.
      while ((note.flags & kLastOfItem) == 0) {
        const RingPosition<kStages> previous = ring_;
        ring_.advance();
        // Waits here, before any product is in flight: after a loop among them, the compiler would fence again.
        ptx::mbarrier_wait(ptx::shared_address(&control().v_full[previous.stage]), previous.parity);
        take_turn();
        ptx::keep_order(r_scores);
        ptx::keep_order(r_out);
        ptx::keep_order(r_probabilities);
        ptx::wgmma_fence();
        qk_gemm(r_scores);
        ptx::wgmma_commit();
        pv_gemm(r_out, r_probabilities, previous.stage);
        ptx::wgmma_commit();
        pass_turn();
        ptx::wgmma_wait<1>();
        ptx::keep_order(r_scores);
        note = read_note();
        if ((note.flags & kPartial) != 0) mask_scores(r_scores, note.valid);
        const Rescaling next_rescaling = move_maximum(r_scores, state, p_.scale_log2);
        exponentiate<Traits::kPolynomialEvery>(r_scores, state, next_rescaling, p_.scale_log2);
        // Before the next wgmma_wait, not at the head of the loop: the compiler hoists that wait, but not across a
        // branch; without one here, the wait would come before the exponentials.
        wait_for_more_keys(note);
        ptx::wgmma_wait<0>();
        ptx::keep_order(r_out);
        release(control().v_empty, previous.stage);
        rescale(r_out, next_rescaling);
        pack_probabilities(r_probabilities, r_scores);
      }
      wait_for(control().v_full);
      ptx::keep_order(r_out);
      ptx::keep_order(r_probabilities);
      ptx::wgmma_fence();
      pv_gemm(r_out, r_probabilities, ring_.stage);
      ptx::wgmma_commit();
      // All that does not need the product, and now has the registers of the scores: above all the way from memory of
      // the next queries. The item is searched again, because the loop leaves no registers to keep it in.
      next_loaded = load_q(index + gridDim.x, r_q);
      work = find_work(index);
      store_statistics(work, state, inverse_sums);
      ptx::wgmma_wait<0>();
      ptx::keep_order(r_out);
      release(control().v_empty, ring_.stage);
      ring_.advance();
    }
    if (work.n_splits > 1) {
      store_partial(work, r_out);
    } else {
      store_out(work, r_out, inverse_sums);
    }
    return next_loaded;
  }

  // Keeps pace with the other warpgroups without computing, where this one has no rows or the item has no keys.
  __device__ void pass_over() {
    uint32_t flags;
    do {
      wait_for(control().k_full);
      take_turn();
      pass_turn();
      flags = read_note().flags;
      // Nothing else slows this warpgroup down: without a wait it would release a buffer before its values have arrived
      // and, two rounds of the ring later, the loading warp would take an old phase for the one that it waits for.
      wait_for(control().v_full);
      release(control().v_empty, ring_.stage);
      ring_.advance();
    } while ((flags & kLastOfItem) == 0);
  }

  __device__ auto& control() const { return *shared_.control; }

  __device__ void wait_for(uint64_t (&barriers)[kStages]) const {
    ptx::mbarrier_wait(ptx::shared_address(&barriers[ring_.stage]), ring_.parity);
  }

  // Waits for the keys of the tile that follows the one of `note`.
  __device__ void wait_for_more_keys(const TileNote& note) const {
    if ((note.flags & kLastOfItem) != 0) return;
    RingPosition<kStages> next = ring_;
    next.advance();
    ptx::mbarrier_wait(ptx::shared_address(&control().k_full[next.stage]), next.parity);
  }

  __device__ void release(uint64_t (&barriers)[kStages], uint32_t stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::shared_address(&barriers[stage]));
  }

  // Reads the note of the keys that have just been multiplied, and releases their buffer.
  __device__ TileNote read_note() const {
    const TileNote& source = control().notes[ring_.stage];
    TileNote note{};
    note.flags = source.flags;
    if ((note.flags & kPartial) != 0) {
#pragma unroll
      for (int word = 0; word < 4; ++word) note.valid[word] = source.valid[word];
    }
    release(control().k_empty, ring_.stage);
    return note;
  }

  __device__ void synchronise_warpgroup() const {
    ptx::named_barrier_sync(kWarpgroupBarrier + warpgroup_, kWarpgroupThreads);
  }

  __device__ void take_turn() const {
    if constexpr (Traits::kPingPong) ptx::named_barrier_sync(kTurnBarrier + warpgroup_, 2 * kWarpgroupThreads);
  }

  __device__ void pass_turn() const {
    if constexpr (Traits::kPingPong) {
      const uint32_t next = warpgroup_ + 1 == Traits::kConsumers ? 0 : warpgroup_ + 1;
      ptx::named_barrier_arrive(kTurnBarrier + next, 2 * kWarpgroupThreads);
    }
  }

  __device__ int32_t query_row(int i) const {
    return static_cast<int32_t>((thread_ + i * kWarpgroupThreads) / kRowChunks);
  }

  __device__ int32_t query_channel(int i) const {
    return static_cast<int32_t>((thread_ + i * kWarpgroupThreads) % kRowChunks * 8);
  }

  // Issues the loads of this warpgroup's queries of an item; false if there are none. What is missing becomes zero.
  __device__ bool load_q(uint32_t index, QueryRegisters& r_q) const {
    // Before any return: what the registers held would have to outlast the products.
    r_q = {};
    if (index >= p_.n_work) return false;
    const cuda::WorkItem work = find_work(index);
    if (work.begin >= work.end) return false;
    const auto* q = head_pointer<P>(p_.q, work.batch, work.head) + work.begin * p_.q.strides.token;
    const int64_t first_factor =
        work.batch * p_.q_freqs_strides.batch + static_cast<int64_t>(work.begin) * p_.q_freqs_strides.token;
#pragma unroll
    for (int i = 0; i < kQueryChunks; ++i) {
      const int32_t row = query_row(i);
      const int32_t channel = query_channel(i);
      if (work.begin + row >= work.end || channel >= p_.head_dim) continue;
      r_q.chunks[i] = load_chunk<P>(q + row * p_.q.strides.token + channel, p_.q.vectorised);
      if (p_.q_freqs == nullptr) continue;
      const float* factors = p_.q_freqs + 2 * (first_factor + row * p_.q_freqs_strides.token) + channel;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) r_q.factors[i][pair] = reinterpret_cast<const float2*>(factors)[pair];
    }
    return true;
  }

  __device__ void write_rotated_q(QueryRegisters& r_q) const {
#pragma unroll
    for (int i = 0; i < kQueryChunks; ++i) {
      float values[8];
      unpack<P>(r_q.chunks[i], values);
      if (p_.q_freqs != nullptr) rotate<P>(values, reinterpret_cast<const float*>(r_q.factors[i]), 0, 1.0f);
#pragma unroll
      for (int n = 0; n < 8; ++n) values[n] *= p_.q_sign;
      r_q.chunks[i] = pack<P>(values);
    }
    // The previous item's output may still be on its way out of these rows.
    if (!Traits::kOutputBuffer && thread_ == 0) ptx::bulk_wait_read<0>();
    synchronise_warpgroup();
#pragma unroll
    for (int i = 0; i < kQueryChunks; ++i) {
      const uint32_t offset = chunk_offset<kSpan, kWarpgroupRows>(query_row(i), query_channel(i) / 8);
      ptx::store_shared(s_q_ + offset, r_q.chunks[i].words);
    }
    ptx::fence_async_proxy();
    synchronise_warpgroup();
  }

  // r_scores = Q Kᵀ.
  __device__ void qk_gemm(float (&r_scores)[Traits::kScores]) const {
    const uint64_t q = ptx::matrix_descriptor<kSpan>(s_q_, 8 * kSpan, 0);
    const uint64_t k = ptx::matrix_descriptor<kSpan>(shared_.k_tile(ring_.stage), 8 * kSpan, 0);
#pragma unroll
    for (int channel = 0; channel < kHeadDim; channel += 16) {
      const int slab = channel / Traits::kSlabChannels;
      const int offset = channel % Traits::kSlabChannels * 2;
      ptx::Wgmma<Traits::kKeys>::template multiply<Traits::kType, ptx::Major::contracted, ptx::Major::contracted>(
          r_scores, ptx::advanced(q, slab * kWarpgroupRows * kSpan + offset),
          ptx::advanced(k, slab * Traits::kKeys * kSpan + offset), channel != 0);
    }
  }

  // r_out += P V.
  __device__ void pv_gemm(float (&r_out)[Traits::kOutputs],
                          const uint32_t (&r_probabilities)[Traits::kProbabilities][4], uint32_t stage) const {
    constexpr uint32_t kSlabStride = Traits::kSlabs > 1 ? Traits::kKeys * kSpan : 0;
    const uint64_t v = ptx::matrix_descriptor<kSpan>(shared_.v_tile(stage), 8 * kSpan, kSlabStride);
#pragma unroll
    for (int k = 0; k < Traits::kProbabilities; ++k) {
      ptx::Wgmma<kHeadDim>::template multiply<Traits::kType, ptx::Major::outer>(r_out, r_probabilities[k],
                                                                                ptx::advanced(v, k * 16 * kSpan), true);
    }
  }

  // The accumulators of 16 columns are the operand of 16 contracted rows.
  __device__ static void pack_probabilities(uint32_t (&packed)[Traits::kProbabilities][4],
                                            const float (&r_scores)[Traits::kScores]) {
#pragma unroll
    for (int k = 0; k < Traits::kProbabilities; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[k][i] = P::pack(r_scores[8 * k + 2 * i], r_scores[8 * k + 2 * i + 1]);
    }
  }

  // The first of this thread's two rows, which are eight apart.
  __device__ int32_t first_row() const { return static_cast<int32_t>(thread_ / 32 * 16 + thread_ % 32 / 4); }

  // Where this thread's first row is among the partial results.
  __device__ int64_t first_partial_row(const cuda::WorkItem& work) const {
    return partial_row(p_.schedule, work, p_.heads, Traits::kQueries, work.split) + warpgroup_ * kWarpgroupRows +
           first_row();
  }

  // Stores lse, or of a split the maximum and sum, which are known before the output is.
  __device__ void store_statistics(const cuda::WorkItem& work, const SoftmaxState& state,
                                   float (&inverse_sums)[2]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = sum_over_quad(state.sum[row]);
      inverse_sums[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int32_t token = work.begin + first_row() + 8 * row;
      if (thread_ % 4 != 0 || token >= work.end) continue;
      const float shift = softmax_shift(state.maximum[row], p_.scale_log2);
      if (work.n_splits > 1) {
        reinterpret_cast<float2*>(p_.partial.statistics)[first_partial_row(work) + 8 * row] =
            make_float2(sum == 0.0f ? -INFINITY : shift, sum);
      } else {
        const int64_t head = static_cast<int64_t>(work.batch) * p_.heads + work.head;
        p_.lse[head * p_.n_queries + token] = sum == 0.0f ? -INFINITY : (shift + ptx::log2_approx(sum)) * kLn2;
      }
    }
  }

  __device__ void store_out(const cuda::WorkItem& work, float (&r_out)[Traits::kOutputs],
                            const float (&inverse_sums)[2]) const {
#pragma unroll
    for (int i = 0; i < Traits::kOutputs; ++i) r_out[i] *= inverse_sums[i / 2 % 2];
    if (work.begin + kWarpgroupRows <= work.end) {
      store_whole_rows(work, r_out);
    } else {
      store_some_rows(work, r_out);
    }
  }

  // Stores the output of a split of the tile's keys, not yet divided, for attention_merge.
  __device__ void store_partial(const cuda::WorkItem& work, const float (&r_out)[Traits::kOutputs]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (work.begin + first_row() + 8 * row >= work.end) continue;
      float* out = p_.partial.out + (first_partial_row(work) + 8 * row) * p_.value_dim + thread_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        if (8 * n >= p_.value_dim) break;
        *reinterpret_cast<float2*>(out + 8 * n) = make_float2(r_out[4 * n + 2 * row], r_out[4 * n + 2 * row + 1]);
      }
    }
  }

  // Stores through shared memory: its own, or that of the queries, which are no longer needed.
  __device__ void store_whole_rows(const cuda::WorkItem& work, const float (&r_out)[Traits::kOutputs]) const {
    // An earlier item's output may still be on its way out of these rows.
    if (Traits::kOutputBuffer && thread_ == 0) ptx::bulk_wait_read<0>();
    synchronise_warpgroup();
    const uint32_t lane = thread_ % 32;
    const uint32_t row = thread_ / 32 * 16 + lane % 16;
    // Whole slabs, because that is what the copy reads.
#pragma unroll
    for (int n = 0; n < kRowChunks; n += 2) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && 8 * n < kHeadDim; ++i) {
        words[i] = P::pack(r_out[4 * n + 2 * i], r_out[4 * n + 2 * i + 1]);
      }
      ptx::stmatrix_x4(s_out_ + chunk_offset<kSpan, kWarpgroupRows>(row, n + lane / 16), words);
    }
    ptx::fence_async_proxy();
    synchronise_warpgroup();
    if (thread_ == 0) {
#pragma unroll
      for (int slab = 0; slab < Traits::kSlabs; ++slab) {
        ptx::tma_store(p_.out, {slab * Traits::kSlabChannels, work.begin, work.head, work.batch},
                       s_out_ + slab * kWarpgroupRows * kSpan);
      }
      ptx::bulk_commit();
    }
  }

  __device__ void store_some_rows(const cuda::WorkItem& work, const float (&r_out)[Traits::kOutputs]) const {
    auto* out = static_cast<typename P::Storage*>(p_.out_data);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int32_t token = work.begin + first_row() + 8 * row;
      if (token >= work.end) continue;
      const int64_t first =
          ((static_cast<int64_t>(work.batch) * p_.n_queries + token) * p_.heads + work.head) * p_.value_dim;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        if (8 * n >= p_.value_dim) break;
        store_pair<P>(out + first + 8 * n + thread_ % 4 * 2, r_out[4 * n + 2 * row], r_out[4 * n + 2 * row + 1]);
      }
    }
  }

  const ForwardKernelParams& p_;
  const ForwardShared<kHeadDim>& shared_;
  const uint32_t warpgroup_;  // among the consumers
  const uint32_t thread_;     // of the warpgroup
  const uint32_t s_q_;
  const uint32_t s_out_;
  RingPosition<kStages> ring_;
};

template <class P, int kHeadDim, class Traits = ForwardTraits<P, kHeadDim>>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_forward(const __grid_constant__ ForwardKernelParams p) {
  extern __shared__ uint8_t shared_memory[];
  const ForwardShared<kHeadDim> shared(shared_memory);
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&p.k, &p.v, &p.out}) ptx::prefetch_tensor_map(*map);
    init_barriers(*shared.control, Traits::kConsumers * kWarpgroupThreads / 32);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::release_registers<Traits::kTile.producer_registers>();
    switch (threadIdx.x / 32) {
      case 0:
        load_keys(p, shared);
        break;
      case 1:
        load_values(p, shared);
        break;
      case 2:
        zero_values(p, shared);
        break;
    }
  } else {
    ptx::acquire_registers<Traits::kTile.consumer_registers>();
    ForwardConsumer<P, kHeadDim>(p, shared).run();
  }
}

template <class P, int kHeadDim>
const void* forward_kernel() {
  return reinterpret_cast<const void*>(&attention_forward<P, kHeadDim>);
}

}  // namespace anchor_attention::sm90
