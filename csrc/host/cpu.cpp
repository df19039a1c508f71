#include <torch/csrc/stable/ops.h>

#include <new>
#include <stdexcept>

#include "host/backends.h"
#include "host/interrupts.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/dispatch.h"

namespace anchor_attention {
namespace {

// Runs kernels on torch's thread pool.
template <typename Kernels>
void run(const Kernels& kernels) {
  Interrupts interrupts;
  const cpu::Executor executor{static_cast<int64_t>(torch::stable::get_num_threads()),
                               [](int64_t n, const std::function<void(int64_t)>& task) {
                                 torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
                                   for (int64_t i = begin; i < end; ++i) task(i);
                                 });
                               },
                               [&] { return interrupts.stops(); }};
  try {
    kernels(executor);
  } catch (const std::bad_alloc& error) {
    throw std::runtime_error(std::string("anchor_attention: out of memory: can't allocate memory: ") + error.what());
  }
  interrupts.throw_if_stopped();
}

}  // namespace

std::tuple<std::string, std::string, std::string> cpu_instruction_sets() {
  const auto join = [](const std::vector<std::string>& names) {
    std::string joined;
    for (const std::string& name : names) joined += (joined.empty() ? "" : ",") + name;
    return joined;
  };
  return {cpu::selected_instruction_set(), join(cpu::runnable_instruction_sets()),
          join(cpu::compiled_instruction_sets())};
}

// The setting that allows TF32 on a GPU allows products of bfloat16 parts here, which are more exact.
void Cpu::attention(const AttentionParams& params, const Tensor&, bool allow_tf32) {
  run([&](const cpu::Executor& executor) { cpu::attention(params, executor, allow_tf32); });
}

void Cpu::attention_backward(const AttentionBackwardParams& params, const Tensor&, bool allow_tf32) {
  run([&](const cpu::Executor& executor) { cpu::attention_backward(params, executor, allow_tf32); });
}

void Cpu::attention_jvp(const AttentionJvpParams& params, const Tensor&) {
  run([&](const cpu::Executor& executor) { cpu::attention_jvp(params, executor); });
}

void Cpu::attention_double_backward(const AttentionDoubleBackwardParams& params, const Tensor&) {
  run([&](const cpu::Executor& executor) { cpu::attention_double_backward(params, executor); });
}

void Cpu::rope(const RopeParams& params, const Tensor&) {
  run([&](const cpu::Executor& executor) { cpu::rope(params, executor); });
}

void Cpu::rope_backward(const RopeBackwardParams& params, const Tensor&) {
  run([&](const cpu::Executor& executor) { cpu::rope_backward(params, executor); });
}

}  // namespace anchor_attention
