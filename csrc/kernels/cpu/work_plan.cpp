#include "kernels/cpu/work_plan.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <new>
#include <string>

#include "kernels/cpu/dispatch.h"

namespace anchor_attention::cpu {
namespace {

// Waking another thread takes a few microseconds: it must have enough operations to make up for that.
constexpr double kMinOperationsPerThread = 1e6;
constexpr int64_t kRowsPerFillTask = 4096;

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes) : text_("you tried to allocate " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

int64_t keys_of_group(const KeyRangeTableView& table, int32_t group) {
  int64_t n = 0;
  for (int32_t r = table.k_offsets[group]; r < table.k_offsets[group + 1]; ++r) {
    n += table.k_ranges[2 * r + 1] - table.k_ranges[2 * r];
  }
  return n;
}

}  // namespace

Buffer allocate(int64_t bytes) {
  constexpr int64_t kCacheLine = 64, kHugePage = int64_t{2} << 20;
  const int64_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  const int64_t size = (std::max<int64_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* pointer = std::aligned_alloc(alignment, size);
  if (pointer == nullptr) throw OutOfMemory(bytes);
#ifdef MADV_HUGEPAGE
  // Memory comes and goes with every call: page by page, its faults took as long as writing it. It may be refused, and
  // then costs what it did.
  if (alignment == kHugePage) madvise(pointer, size, MADV_HUGEPAGE);
#endif
  return Buffer(static_cast<char*>(pointer));
}

const ProductKernels& suitable_products(const AttentionParams& p, bool allow_split_float32) {
  const ProductKernels& products = selected_products(p.dtype, allow_split_float32);
  const ProductKernels& vectors = selected_kernels().products;
  const int64_t alignment = products.packing.key_alignment(p.dtype);
  if (alignment <= vectors.packing.key_alignment(p.dtype)) return products;
  int64_t n_keys = 0;
  for (const KeyReaders& readers : count_readers(p.table)) n_keys += readers.end - readers.begin;
  constexpr int64_t kMaxPadding = 4, kAnyPadding = 4096;
  return alignment * p.table.n_ranges > kMaxPadding * n_keys + kAnyPadding ? vectors : products;
}

WorkPlan::WorkPlan(const AttentionParams& p, const Packing& packing)
    : params_(p),
      alignment_(packing.key_alignment(p.dtype)),
      packed_row_bytes_{packing.packed_row_bytes(p.head_dim, p.dtype), packing.packed_row_bytes(p.value_dim, p.dtype)},
      sum_row_bytes_{packing.sum_row_bytes(p.head_dim, p.dtype), packing.sum_row_bytes(p.value_dim, p.dtype)} {
  const int64_t n_layouts = p.key_mask == nullptr ? std::min<int64_t>(p.batch, 1) : p.batch;
  for (int64_t b = 0; b < n_layouts; ++b) {
    const bool* mask = p.key_mask == nullptr ? nullptr : p.key_mask + b * p.key_mask_batch_stride;
    layouts_.push_back(compact_keys(p.table, mask, alignment_));
    areas_.push_back(static_cast<double>(layouts_.back().table.area()));
  }
  first_rows_.push_back(0);
  for (int64_t plane = 0; plane < p.batch * p.kv_heads; ++plane) {
    first_rows_.push_back(first_rows_.back() + static_cast<int64_t>(keys(plane / p.kv_heads).source.size()));
  }
}

double WorkPlan::operations(Planes planes, double operations_per_score) const {
  double area = 0;
  for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
    area += areas_[layout(plane / params_.kv_heads)] * static_cast<double>(params_.heads_per_kv_head());
  }
  return operations_per_score * area * static_cast<double>(params_.head_dim + params_.value_dim) / 2;
}

int64_t WorkPlan::threads(const Executor& executor, double operations_per_score) const {
  const double useful = operations(all_planes(), operations_per_score) / kMinOperationsPerThread;
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(useful, 1e9)), 1, std::max<int64_t>(executor.threads, 1));
}

std::vector<Tile> WorkPlan::tiles(Planes planes, int64_t tile_queries, bool with_gaps) const {
  std::vector<Tile> tiles;
  for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
    const int64_t batch = plane / params_.kv_heads, shared_by = params_.heads_per_kv_head();
    const int64_t first = plane % params_.kv_heads * shared_by;
    for (int64_t head = first; head < first + shared_by; ++head) {
      append_tiles(batch, head, tile_queries, with_gaps, tiles);
    }
  }
  return tiles;
}

void WorkPlan::append_tiles(int64_t batch, int64_t head, int64_t tile_queries, bool with_gaps,
                            std::vector<Tile>& tiles) const {
  const KeyRangeTableView table = keys(batch).table.view();
  const auto append = [&](int32_t group, int64_t begin, int64_t end, int64_t step, int64_t n_keys) {
    for (int64_t q = begin; q < end; q += step) {
      tiles.push_back({static_cast<int32_t>(batch), static_cast<int32_t>(head), group,
                       static_cast<int32_t>(std::min(step, end - q)), q, n_keys});
    }
  };
  int64_t covered = 0;
  for (int32_t g = 0; g < table.n_groups; ++g) {
    if (with_gaps) append(kNoGroup, covered, table.q_ranges[2 * g], kRowsPerFillTask, 0);
    append(g, table.q_ranges[2 * g], table.q_ranges[2 * g + 1], tile_queries, keys_of_group(table, g));
    covered = table.q_ranges[2 * g + 1];
  }
  if (with_gaps) append(kNoGroup, covered, params_.n_queries, kRowsPerFillTask, 0);
}

void pack(const AttentionParams& p, const WorkPlan& plan, Planes planes, const Packing& packing,
          const Executor& executor, int64_t threads, const std::vector<PackedTensor>& tensors) {
  const std::vector<RowTask> tasks = row_tasks(
      planes, p.kv_heads, [&](int64_t batch) { return static_cast<int64_t>(plan.keys(batch).source.size()); });
  for_each_task(executor, threads, static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const RowTask& task = tasks[i];
    for (const PackedTensor& tensor : tensors) {
      pack_tokens(p, packing, tensor, task.batch, task.kv_head, plan.keys(task.batch).source.data() + task.begin,
                  task.end - task.begin,
                  tensor.packed + (plan.first_row(planes, task.plane) + task.begin) * tensor.row_bytes);
    }
  });
}

}  // namespace anchor_attention::cpu
