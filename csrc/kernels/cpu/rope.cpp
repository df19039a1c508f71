#include <algorithm>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/kernel_table.h"

namespace anchor_attention::cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

int64_t tokens_per_task(const RopeParams& p) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, p.heads * p.head_dim));
}

}  // namespace

void rope(const RopeParams& p, const Executor& executor) {
  const Kernels& kernels = selected_kernels();
  const int64_t step = tokens_per_task(p);
  const int64_t tasks_per_batch = (p.tokens + step - 1) / step;
  executor.run(p.batch * tasks_per_batch, [&](int64_t task) {
    if (executor.stops()) return;
    const int64_t begin = task % tasks_per_batch * step;
    kernels.rope({&p, task / tasks_per_batch, begin, std::min(begin + step, p.tokens)});
  });
}

void rope_backward(const RopeBackwardParams& p, const Executor& executor) {
  const Kernels& kernels = selected_kernels();
  const int64_t tokens = p.forward.tokens;
  const int64_t step = tokens_per_task(p.forward);
  executor.run((tokens + step - 1) / step, [&](int64_t task) {
    if (executor.stops()) return;
    kernels.rope_backward({&p, task * step, std::min((task + 1) * step, tokens)});
  });
}

}  // namespace anchor_attention::cpu
