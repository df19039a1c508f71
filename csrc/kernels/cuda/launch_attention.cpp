#include "kernels/cuda/launch_attention.h"

#include "kernels/cuda/launch.h"
#include "kernels/cuda/plan_attention.h"

namespace anchor_attention::cuda {
namespace {

PlanOptions plan_options(const Options& options, const Device& device) {
  Generation newest = generation_of(device.major(), options.pinned_kernels);
  if (!is_compiled(newest)) newest = Generation::sm80;
  return {.multiprocessors = device.multiprocessors(),
          .allow_tf32 = options.allow_tf32,
          .generation = newest,
          .avoid_tile_of_48 = avoids_tile_of_48(options.pinned_kernels)};
}

void run(Plan plan, const Target& target, const Allocate& allocate) {
  if (plan.workspace_bytes > 0) place_workspace(plan, allocate(plan.workspace_bytes));
  launch(plan, target.device, target.stream);
}

void run(Plan plan, const Target& target) { launch(plan, target.device, target.stream); }

}  // namespace

void attention_forward(const AttentionParams& params, const Options& options, const Target& target,
                       const Allocate& allocate) {
  run(plan_attention_forward(params, plan_options(options, target.device), kNoWorkspaceYet), target, allocate);
}

void attention_backward(const AttentionBackwardParams& params, const Options& options, const Target& target,
                        const Allocate& allocate) {
  run(plan_attention_backward(params, plan_options(options, target.device), kNoWorkspaceYet), target, allocate);
}

void attention_jvp(const AttentionJvpParams& params, const Options& options, const Target& target,
                   const Allocate& allocate) {
  run(plan_attention_jvp(params, plan_options(options, target.device), kNoWorkspaceYet), target, allocate);
}

void attention_double_backward(const AttentionDoubleBackwardParams& params, const Target& target,
                               const Allocate& allocate) {
  run(plan_attention_double_backward(params, kNoWorkspaceYet), target, allocate);
}

void rope(const RopeParams& params, const Target& target) { run(plan_rope(params), target); }

void rope_backward(const RopeBackwardParams& params, const Target& target) { run(plan_rope_backward(params), target); }

}  // namespace anchor_attention::cuda
