# The lists of sources and of instruction sets, which every build takes from here: the library, the CPU kernels under
# sanitizers and for aarch64 (tests/native/CMakeLists.txt), the launch plans alone (tools/cuda_plans/build.py).

# Torch, through its stable ABI.
set(HOST_SOURCES
  csrc/registration.cpp
  csrc/host/attention_op.cpp
  csrc/host/canonical_key_ranges.cpp
  csrc/host/checks.cpp
  csrc/host/cpu.cpp
  csrc/host/derivatives.cpp
  csrc/host/interrupts.cpp
  csrc/host/rope_op.cpp)

# No torch, and compiled once.
set(CPU_SOURCES
  csrc/key_ranges.cpp
  csrc/kernels/cpu/attention.cpp
  csrc/kernels/cpu/attention_backward.cpp
  csrc/kernels/cpu/attention_jvp.cpp
  csrc/kernels/cpu/backward_division.cpp
  csrc/kernels/cpu/dispatch.cpp
  csrc/kernels/cpu/key_rows.cpp
  csrc/kernels/cpu/rope.cpp
  csrc/kernels/cpu/work_plan.cpp)

# The steps of the CPU kernels, compiled once per instruction set. They use no inline function of the standard library:
# the linker keeps one copy of such a function, and it might keep one that needs AVX-512.
set(VECTOR_STEPS
  csrc/kernels/cpu/vector/attention_backward_tile.cpp
  csrc/kernels/cpu/vector/attention_double_backward_tile.cpp
  csrc/kernels/cpu/vector/attention_jvp_tile.cpp
  csrc/kernels/cpu/vector/attention_tile.cpp
  csrc/kernels/cpu/vector/instruction_set.cpp
  csrc/kernels/cpu/vector/pack.cpp
  csrc/kernels/cpu/vector/rope_tokens.cpp)

# Instruction sets, best first. Those of a matrix unit have sources of their own; amx_model is AMX in software, for tests.
set(X86_SETS amx avx512_bf16 avx512 avx2 baseline)
set(SOURCES_amx csrc/kernels/cpu/amx/amx.cpp)
set(SOURCES_amx_model tests/native/amx_model.cpp)
set(AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512)
set(FLAGS_amx ${AVX512} -mavx512bf16 -mamx-tile -mamx-bf16)
set(FLAGS_avx512_bf16 ${AVX512} -mavx512bf16)
set(FLAGS_avx512 ${AVX512})
set(FLAGS_avx2 -mavx2 -mfma)

# Pure functions, no CUDA header: which launches a call becomes.
set(CUDA_PLAN_SOURCES
  csrc/key_ranges.cpp
  csrc/kernels/cuda/plan_attention.cpp
  csrc/kernels/cuda/common/plan_parts.cpp
  csrc/kernels/cuda/common/plan_rope.cpp
  csrc/kernels/cuda/common/schedule.cpp
  csrc/kernels/cuda/sm80/plan_derivatives.cpp
  csrc/kernels/cuda/sm80/plan_sm80.cpp
  csrc/kernels/cuda/sm90/backward_schedule.cpp
  csrc/kernels/cuda/sm90/plan_backward.cpp
  csrc/kernels/cuda/sm90/token_tensor_map.cpp
  csrc/kernels/cuda/sm90/plan_forward.cpp)

# What executes the plans through the driver, and torch's part of it.
set(CUDA_HOST_SOURCES
  csrc/host/cuda.cpp
  csrc/kernels/cuda/launch_attention.cpp
  csrc/kernels/cuda/device.cpp
  csrc/kernels/cuda/driver.cpp
  csrc/kernels/cuda/launch.cpp
  csrc/kernels/cuda/tensor_map_encoder.cpp)
