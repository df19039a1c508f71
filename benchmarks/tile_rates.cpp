// The steps of one instruction set on tiles of one head, called without schedule and threads: compiled together with
// the steps of a design that is tried out.
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/cpu/kernel_table.h"

using namespace anchor_attention;
using namespace anchor_attention::cpu;

namespace anchor_attention::cpu::ANCHOR_ATTENTION_ISA {
extern const Kernels kKernels;
}

namespace {

// Of this thread: what others take of the core in the meantime does not count.
double processor_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

class Lines {
 public:
  explicit Lines(int64_t bytes) : start_(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)) {}
  ~Lines() { std::free(start_); }
  void* get() const { return start_; }

 private:
  void* start_;
};

class Problem {
 public:
  Problem(int64_t n_queries, int64_t n_keys, int64_t head_dim)
      : steps_(ANCHOR_ATTENTION_ISA::kKernels.products),
        ranges_{0, static_cast<int32_t>(n_keys)},
        q_(n_queries * head_dim),
        k_(n_keys * head_dim),
        v_(k_.size()),
        out_(q_.size()),
        grad_out_(q_.size()),
        grad_q_(q_.size()),
        lse_(n_queries),
        k_rows_(n_keys * steps_.packing.packed_row_bytes(head_dim, kType)),
        v_rows_(n_keys * steps_.packing.packed_row_bytes(head_dim, kType)),
        grad_k_rows_(n_keys * steps_.packing.sum_row_bytes(head_dim, kType)),
        grad_v_rows_(n_keys * steps_.packing.sum_row_bytes(head_dim, kType)),
        params_{.forward = {.head_dim = head_dim, .value_dim = head_dim, .dtype = kType}},
        scratch_(
            std::max(steps_.forward_scratch_bytes(params_.forward), steps_.backward_scratch_bytes(params_.forward))) {
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    for (auto* tensor : {&q_, &k_, &v_, &grad_out_}) {
      for (float& x : *tensor) x = normal(generator);
    }
    std::fill_n(static_cast<float*>(grad_k_rows_.get()), n_keys * steps_.packing.sum_row_bytes(head_dim, kType) / 4,
                0.0f);
    std::fill_n(static_cast<float*>(grad_v_rows_.get()), n_keys * steps_.packing.sum_row_bytes(head_dim, kType) / 4,
                0.0f);
    AttentionParams& f = params_.forward;
    f.q = q_.data();
    f.k = k_.data();
    f.v = v_.data();
    f.out = out_.data();
    f.lse = lse_.data();
    f.q_strides = f.k_strides = f.v_strides = params_.grad_out_strides = {0, head_dim, head_dim};
    f.batch = f.heads = f.kv_heads = 1;
    f.n_queries = n_queries;
    f.n_keys = n_keys;
    f.scale = 1 / std::sqrt(static_cast<double>(head_dim));
    params_.grad_out = grad_out_.data();
    params_.grad_q = grad_q_.data();
    std::vector<int32_t> indices(n_keys);
    for (int64_t i = 0; i < n_keys; ++i) indices[i] = static_cast<int32_t>(i);
    steps_.packing.pack_rows(
        {k_.data(), head_dim, indices.data(), n_keys, head_dim, kType, PackedLayout::rows, k_rows_.get()});
    steps_.packing.pack_rows(
        {v_.data(), head_dim, indices.data(), n_keys, head_dim, kType, PackedLayout::rows, v_rows_.get()});
  }

  void forward() {
    const AttentionParams& f = params_.forward;
    const int64_t step = steps_.forward_tile_queries(f);
    for (int64_t q = 0; q < f.n_queries; q += step) {
      ForwardTile tile{};
      tile.params = &f;
      tile.q_begin = q;
      tile.n_queries = std::min(step, f.n_queries - q);
      tile.k_rows = k_rows_.get();
      tile.v_stack = v_rows_.get();
      tile.key_ranges = ranges_;
      tile.n_key_ranges = 1;
      tile.scratch = scratch_.get();
      steps_.forward_tile(tile);
    }
  }

  void backward() {
    const AttentionParams& f = params_.forward;
    const int64_t step = steps_.backward_tile_queries(kType);
    for (int64_t q = 0; q < f.n_queries; q += step) {
      BackwardTile tile{};
      tile.params = &params_;
      tile.q_begin = q;
      tile.n_queries = std::min(step, f.n_queries - q);
      tile.k_rows = tile.k_stack = k_rows_.get();
      tile.v_rows = v_rows_.get();
      tile.key_ranges = ranges_;
      tile.n_key_ranges = 1;
      tile.key_end = static_cast<int32_t>(f.n_keys);
      tile.grad_q = grad_q_.data() + q * f.head_dim;
      tile.grad_q_stride = f.head_dim;
      tile.grad_k_rows = grad_k_rows_.get();
      tile.grad_v_rows = grad_v_rows_.get();
      tile.scratch = scratch_.get();
      steps_.backward_tile(tile);
    }
  }

 private:
  static constexpr ScalarType kType = ScalarType::float32;

  const ProductKernels& steps_;
  const int32_t ranges_[2];
  std::vector<float> q_, k_, v_, out_, grad_out_, grad_q_, lse_;
  Lines k_rows_, v_rows_, grad_k_rows_, grad_v_rows_;
  AttentionBackwardParams params_;
  Lines scratch_;
};

}  // namespace

// One head in float32, and the processor seconds of `calls` calls on it.
extern "C" void* make_problem(long n_queries, long n_keys, long head_dim) {
  return new Problem(n_queries, n_keys, head_dim);
}

extern "C" double forward_seconds(void* problem, long calls) {
  const double start = processor_seconds();
  for (long i = 0; i < calls; ++i) static_cast<Problem*>(problem)->forward();
  return processor_seconds() - start;
}

extern "C" double backward_seconds(void* problem, long calls) {
  const double start = processor_seconds();
  for (long i = 0; i < calls; ++i) static_cast<Problem*>(problem)->backward();
  return processor_seconds() - start;
}
