// Drives the CPU kernels over random problems on std::thread, for sanitizer builds: every byte that they touch lies in
// a buffer of just the right size. Also checks that rows with keys come out finite and gradients repeat bit for bit.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu/attention.h"
#include "key_ranges.h"

using namespace anchor_attention;

namespace {

cpu::Executor thread_executor(int64_t threads) {
  return {threads, [threads](int64_t n, const std::function<void(int64_t)>& task) {
            std::vector<std::thread> pool;
            for (int64_t t = 0; t < std::min(threads, n); ++t) {
              pool.emplace_back([&, t] {
                for (int64_t i = t; i < n; i += threads) task(i);
              });
            }
            for (std::thread& thread : pool) thread.join();
          }};
}

std::mt19937 generator(0);

int64_t random_between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// n values of the storage type: 16-bit ones get bits of moderate magnitude.
std::vector<char> random_values(int64_t n, ScalarType dtype) {
  std::normal_distribution<double> normal;
  const int64_t size = dtype == ScalarType::float64 ? 8 : dtype == ScalarType::float32 ? 4 : 2;
  std::vector<char> bytes(n * size);
  for (int64_t i = 0; i < n; ++i) {
    const double value = normal(generator);
    if (size == 8) reinterpret_cast<double*>(bytes.data())[i] = value;
    if (size == 4) reinterpret_cast<float*>(bytes.data())[i] = static_cast<float>(value);
    if (size == 2) {
      const uint16_t one = dtype == ScalarType::bfloat16 ? 0x3f80 : 0x3c00;
      reinterpret_cast<uint16_t*>(bytes.data())[i] =
          static_cast<uint16_t>((one - random_between(0, 600)) | (value < 0 ? 0x8000 : 0));
    }
  }
  return bytes;
}

KeyRangeTable random_table(int64_t n_queries, int64_t n_keys) {
  std::vector<int64_t> q_ranges, k_offsets{0}, k_ranges;
  for (int64_t begin = random_between(0, 3); begin < n_queries;) {
    const int64_t end = std::min(n_queries, begin + random_between(1, 100));
    q_ranges.insert(q_ranges.end(), {begin, end});
    for (int64_t r = random_between(0, 3); r > 0; --r) {
      const int64_t first = random_between(0, n_keys);
      k_ranges.insert(k_ranges.end(), {first, random_between(first, n_keys)});
    }
    k_offsets.push_back(static_cast<int64_t>(k_ranges.size() / 2));
    begin = end + random_between(0, 5);
  }
  return make_key_range_table(q_ranges, k_offsets, k_ranges, n_queries, n_keys);
}

void fail(const char* text) {
  std::fprintf(stderr, "drive_kernels: %s\n", text);
  std::exit(1);
}

// Tangents and second derivatives, along directions some of which are zero, with the value known and not.
template <typename Values, typename MakeStrides>
void drive_derivatives(AttentionParams p, const Values& values, const std::vector<char>& grad_out,
                       const MakeStrides& strides, const cpu::Executor& executor) {
  p.q_freqs = nullptr;
  cpu::attention(p, executor, false);
  const int64_t n = random_between(1, 10), working = p.dtype == ScalarType::float64 ? 8 : 4;
  const auto of_q = values(n * p.n_queries, p.heads * p.head_dim);
  const auto of_k = values(n * p.n_keys, p.kv_heads * p.head_dim);
  const auto of_v = values(n * p.n_keys, p.kv_heads * p.value_dim);
  const auto tangents = [&](const std::vector<char>& data, int64_t tokens, int64_t heads, int64_t dim) {
    const bool moves = random_between(0, 2) > 0;
    return Tangents{moves ? data.data() : nullptr, p.batch * tokens * heads * dim, strides(tokens, heads, dim)};
  };
  std::vector<char> out_tangents(n * grad_out.size()), lse_tangents(n * p.batch * p.heads * p.n_queries * working);
  AttentionJvpParams j{};
  j.forward = p;
  j.knows_value = random_between(0, 1);
  j.n_tangents = n;
  j.q_tangents = tangents(of_q, p.n_queries, p.heads, p.head_dim);
  j.k_tangents = tangents(of_k, p.n_keys, p.kv_heads, p.head_dim);
  j.v_tangents = tangents(of_v, p.n_keys, p.kv_heads, p.value_dim);
  j.out_tangents = out_tangents.data();
  j.lse_tangents = lse_tangents.data();
  cpu::attention_jvp(j, executor);

  std::vector<char> first[3];
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::vector<char> grads[3] = {std::vector<char>(of_q.size() / n), std::vector<char>(of_k.size() / n),
                                  std::vector<char>(of_v.size() / n)};
    AttentionDoubleBackwardParams d{};
    d.backward.forward = p;
    d.backward.grad_out = grad_out.data();
    d.backward.grad_out_strides = strides(p.n_queries, p.heads, p.value_dim);
    d.backward.grad_q = grads[0].data();
    d.backward.grad_k = grads[1].data();
    d.backward.grad_v = grads[2].data();
    d.q_tangent = j.q_tangents;
    d.k_tangent = j.k_tangents;
    d.v_tangent = j.v_tangents;
    d.out_tangent = out_tangents.data();
    d.lse_tangent = lse_tangents.data();
    cpu::attention_double_backward(d, executor);
    for (int i = 0; i < 3; ++i) {
      if (repeat == 1 && grads[i] != first[i]) fail("second derivatives differ between two runs");
      first[i] = grads[i];
    }
  }
}

void drive(ScalarType dtype) {
  const int64_t batch = random_between(1, 2), heads = random_between(1, 3), head_dim = 8 * random_between(1, 10);
  // Few queries with many keys are split over the keys.
  const bool few_queries = random_between(0, 3) == 0;
  const int64_t n_queries = random_between(1, few_queries ? 40 : 180);
  const int64_t n_keys = random_between(1, few_queries ? 4000 : 180);
  const bool wide = dtype == ScalarType::float64;
  const int64_t size = wide ? 8 : dtype == ScalarType::float32 ? 4 : 2;
  const int64_t working = wide ? 8 : 4;
  const KeyRangeTable table = random_table(n_queries, n_keys);
  const int64_t kv_heads = random_between(0, 1) ? heads : 1, value_dim = random_between(0, 1) ? head_dim : 24;
  const auto values = [&](int64_t tokens, int64_t width) { return random_values(batch * tokens * width, dtype); };
  const auto q = values(n_queries, heads * head_dim), k = values(n_keys, kv_heads * head_dim);
  const auto v = values(n_keys, kv_heads * value_dim), grad_out = values(n_queries, heads * value_dim);
  const auto freqs = random_values(n_queries * head_dim, wide ? ScalarType::float64 : ScalarType::float32);
  const auto mask_bits = std::make_unique<bool[]>(batch * n_keys);
  for (int64_t i = 0; i < batch * n_keys; ++i) mask_bits[i] = random_between(0, 3) > 0;
  std::vector<char> out(grad_out.size()), lse(batch * heads * n_queries * working);

  const auto strides = [](int64_t tokens, int64_t n_heads, int64_t dim) {
    return Strides{tokens * n_heads * dim, n_heads * dim, dim};
  };
  AttentionParams p{};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.q_freqs = random_between(0, 1) ? freqs.data() : nullptr;
  p.key_mask = random_between(0, 1) ? mask_bits.get() : nullptr;
  p.out = out.data();
  p.lse = lse.data();
  p.q_strides = strides(n_queries, heads, head_dim);
  p.k_strides = strides(n_keys, kv_heads, head_dim);
  p.v_strides = strides(n_keys, kv_heads, value_dim);
  p.q_freqs_strides = {0, head_dim / 2};
  p.key_mask_batch_stride = n_keys;
  p.batch = batch;
  p.n_queries = n_queries;
  p.n_keys = n_keys;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.scale = 0.2;
  p.dtype = dtype;
  p.table = table.view();
  const cpu::Executor executor = thread_executor(random_between(1, 4));
  const bool split = random_between(0, 1);
  cpu::attention(p, executor, split);
  for (int64_t i = 0; i < batch * heads * n_queries; ++i) {
    const double value = wide ? reinterpret_cast<double*>(lse.data())[i] : reinterpret_cast<float*>(lse.data())[i];
    if (std::isnan(value) || value == INFINITY) fail("lse is no number");
  }

  std::vector<char> first[4];
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::vector<char> grads[4] = {std::vector<char>(q.size()), std::vector<char>(k.size()), std::vector<char>(v.size()),
                                  std::vector<char>(n_queries * head_dim * working)};
    AttentionBackwardParams b{};
    b.forward = p;
    b.grad_out = grad_out.data();
    b.grad_out_strides = strides(n_queries, heads, value_dim);
    b.grad_q = grads[0].data();
    b.grad_k = grads[1].data();
    b.grad_v = grads[2].data();
    b.grad_q_freqs = p.q_freqs ? grads[3].data() : nullptr;
    cpu::attention_backward(b, executor, split);
    for (int i = 0; i < 4; ++i) {
      if (repeat == 1 && grads[i] != first[i]) fail("gradients differ between two runs");
      first[i] = grads[i];
    }
  }

  drive_derivatives(p, values, grad_out, strides, executor);

  // A call that is cancelled before its first piece of work writes nothing; one that is cancelled on the way returns.
  std::atomic<int64_t> polls{0};
  cpu::Executor impatient = executor;
  impatient.cancelled = [&] { return ++polls > 0; };
  const std::vector<char> finished = out;
  std::fill(out.begin(), out.end(), char(0x55));
  cpu::attention(p, impatient, split);
  if (out != std::vector<char>(out.size(), char(0x55)) || polls == 0) fail("a cancelled call went on");
  const int64_t patience = random_between(0, 3);
  impatient.cancelled = [&] { return ++polls > patience; };
  polls = 0;
  cpu::attention(p, impatient, split);
  out = finished;

  std::vector<char> rotated(q.size()), grad_x(q.size()), grad_freqs(freqs.size());
  RopeParams r{q.data(), freqs.data(), rotated.data(), p.q_strides, {0, head_dim / 2},
               batch,    n_queries,    heads,          head_dim,    dtype};
  cpu::rope(r, executor);
  cpu::rope_backward({r, q.data(), p.q_strides, grad_x.data(), grad_freqs.data()}, executor);
  if (size == 2 && rotated.empty()) fail("nothing was rotated");
}

}  // namespace

// Usage: drive_kernels PROBLEMS_PER_TYPE
int main(int n_arguments, char** arguments) {
  const int problems_per_type = n_arguments > 1 ? std::atoi(arguments[1]) : 0;
  if (problems_per_type < 1) fail("the number of problems per type must be 1 or more");
  int problems = 0;
  for (ScalarType dtype : {ScalarType::float32, ScalarType::bfloat16, ScalarType::float16, ScalarType::float64}) {
    for (int i = 0; i < problems_per_type; ++i, ++problems) drive(dtype);
  }
  std::printf("%d problems passed\n", problems);
}
