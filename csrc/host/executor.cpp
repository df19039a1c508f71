#include "executor.h"

#include <torch/csrc/stable/ops.h>

namespace anchor_attention {

cpu::Executor torch_executor() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

}  // namespace anchor_attention
