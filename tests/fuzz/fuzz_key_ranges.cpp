// Fuzzing of the key-range table guided by coverage: inputs that reach new edges of csrc/key_ranges.cpp are kept and
// changed further. g++ -fsanitize-coverage=trace-pc calls back at every edge; no other tool is needed.
//   fuzz_key_ranges SEED SECONDS
// Prints the numbers of inputs, of edges and of tables that were taken; aborts where a property fails.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "key_ranges.h"

namespace {

std::unordered_set<uintptr_t> edges;
bool watching = false;
bool found_new = false;

}  // namespace

extern "C" __attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() {
  if (!watching) return;
  watching = false;  // the set itself is compiled without callbacks, but what it calls need not be
  found_new |= edges.insert(reinterpret_cast<uintptr_t>(__builtin_return_address(0))).second;
  watching = true;
}

namespace {

using namespace anchor_attention;

struct Input {
  std::vector<int64_t> q_ranges, k_offsets, k_ranges;
  int64_t n_queries, n_keys;
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "property failed: %s\n", what);
  std::abort();
}

using Counts = std::map<std::pair<int32_t, int32_t>, int>;

// How often every query reads every key.
Counts reads(const KeyRangeTableView& table) {
  Counts counts;
  for (int32_t g = 0; g < table.n_groups; ++g) {
    for (int32_t r = table.k_offsets[g]; r < table.k_offsets[g + 1]; ++r) {
      for (int32_t q = table.q_ranges[2 * g]; q < table.q_ranges[2 * g + 1]; ++q) {
        for (int32_t k = table.k_ranges[2 * r]; k < table.k_ranges[2 * r + 1]; ++k) ++counts[{q, k}];
      }
    }
  }
  return counts;
}

Counts reads(const Input& input) {
  Counts counts;
  for (size_t g = 0; g + 1 < input.k_offsets.size(); ++g) {
    for (int64_t r = input.k_offsets[g]; r < input.k_offsets[g + 1]; ++r) {
      for (int64_t q = input.q_ranges[2 * g]; q < input.q_ranges[2 * g + 1]; ++q) {
        for (int64_t k = input.k_ranges[2 * r]; k < input.k_ranges[2 * r + 1]; ++k) {
          ++counts[{static_cast<int32_t>(q), static_cast<int32_t>(k)}];
        }
      }
    }
  }
  return counts;
}

std::vector<int64_t> widened(const std::vector<int32_t>& numbers) { return {numbers.begin(), numbers.end()}; }

void check_table(const Input& input, const KeyRangeTable& table) {
  const KeyRangeTable again = make_key_range_table(widened(table.q_ranges), widened(table.k_offsets),
                                                   widened(table.k_ranges), input.n_queries, input.n_keys);
  require(again.q_ranges == table.q_ranges && again.k_offsets == table.k_offsets && again.k_ranges == table.k_ranges,
          "the canonical form is its own canonical form");
  if (table.area() > 4096) return;
  const Counts counts = reads(table.view());
  require(counts == reads(input), "the canonical form reads what the input reads");

  const TransposedKeyRangeTable transposed = transpose(table.view());
  Counts seen;
  for (size_t s = 0; s + 1 < transposed.q_offsets.size(); ++s) {
    for (int32_t r = transposed.q_offsets[s]; r < transposed.q_offsets[s + 1]; ++r) {
      for (int32_t q = transposed.q_ranges[2 * r]; q < transposed.q_ranges[2 * r + 1]; ++q) {
        for (int32_t k = transposed.k_ranges[2 * s]; k < transposed.k_ranges[2 * s + 1]; ++k) ++seen[{q, k}];
      }
    }
  }
  require(counts == seen, "the transposed table reads what the table reads");

  for (const int64_t alignment : {1, 2, 32}) {
    const CompactedKeys compacted = compact_keys(table.view(), nullptr, alignment);
    Counts through;
    for (const auto& [read, n] : reads(compacted.table.view())) {
      const int32_t source = compacted.source.at(read.second);
      if (source >= 0) through[{read.first, source}] += n;
    }
    require(through == counts, "compacted keys are those that are read");
  }
}

// One byte for a number, most of them small, some at the limits of their types.
int64_t number(uint8_t byte) {
  constexpr int64_t kLimits[] = {-1, INT32_MAX, INT64_C(1) << 31, INT64_MAX, INT64_MIN, INT64_C(1) << 32};
  return byte < 250 ? byte % 32 : kLimits[byte - 250];
}

Input decoded(const std::vector<uint8_t>& bytes) {
  size_t at = 0;
  const auto next = [&] { return at < bytes.size() ? bytes[at++] : uint8_t{0}; };
  const auto list = [&](size_t most) {
    std::vector<int64_t> numbers(next() % (most + 1));
    for (int64_t& n : numbers) n = number(next());
    return numbers;
  };
  Input input{};
  input.n_queries = number(next());
  input.n_keys = number(next());
  input.q_ranges = list(8);
  input.k_offsets = list(5);
  input.k_ranges = list(12);
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937_64 random(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0);
  const double seconds = argc > 2 ? std::strtod(argv[2], nullptr) : 10;
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  // A table of two groups to begin with.
  std::vector<std::vector<uint8_t>> corpus{{9, 7, 4, 0, 4, 5, 9, 3, 0, 1, 3, 6, 0, 3, 0, 2, 4, 7}};
  int64_t runs = 0, taken = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds) {
    std::vector<uint8_t> bytes = corpus[below(corpus.size())];
    for (size_t changes = 1 + below(6); changes > 0; --changes) {
      const size_t at = below(bytes.size());
      switch (below(4)) {
        case 0:
          bytes[at] = static_cast<uint8_t>(below(256));
          break;
        case 1:
          bytes[at] = static_cast<uint8_t>(bytes[at] + below(3) - 1);
          break;
        case 2:
          bytes.insert(bytes.begin() + static_cast<int64_t>(at), static_cast<uint8_t>(below(32)));
          break;
        default:
          if (bytes.size() > 1) bytes.erase(bytes.begin() + static_cast<int64_t>(at));
      }
    }
    const Input input = decoded(bytes);
    found_new = false;
    ++runs;
    try {
      watching = true;
      const KeyRangeTable table =
          make_key_range_table(input.q_ranges, input.k_offsets, input.k_ranges, input.n_queries, input.n_keys);
      check_table(input, table);
      watching = false;
      ++taken;
    } catch (const std::invalid_argument& error) {
      watching = false;
      require(std::string(error.what()).find("got") != std::string::npos ||
                  std::string(error.what()).find(" = ") != std::string::npos,
              "a refusal says the value");
    }
    if (found_new && bytes.size() < 64) corpus.push_back(bytes);
  }
  std::printf("%lld inputs, %lld taken, %zu edges, %zu kept\n", static_cast<long long>(runs),
              static_cast<long long>(taken), edges.size(), corpus.size());
  return 0;
}
