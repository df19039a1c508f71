#!/usr/bin/env bash
# Builds the CPU kernels with a sanitizer, torch-free, and drives them over random problems on real threads.
# Usage: scripts/test_sanitizers.sh   (CXX chooses the compiler)
set -euo pipefail
cd "$(dirname "$0")/.."
compiler="${CXX:-c++}"
common=(-Icsrc -std=c++20 -g -O1 -fno-omit-frame-pointer -Wno-psabi -fno-math-errno -fno-trapping-math)
generic=(csrc/key_ranges.cpp csrc/kernels/cpu/attention.cpp csrc/kernels/cpu/dispatch.cpp csrc/kernels/cpu/rope.cpp
         tests/native/drive_kernels.cpp)
steps=(attention_tile attention_backward_tile instruction_set pack rope_tokens)
flags_baseline=()
flags_avx2=(-mavx2 -mfma)
flags_avx512=(-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma)
flags_avx512_bf16=("${flags_avx512[@]}" -mavx512bf16)
sets=(baseline)
if [ "$(uname -m)" = x86_64 ]; then sets=(avx512_bf16 avx512 avx2 baseline); fi

for sanitizer in address,undefined thread; do
  out="build/sanitizers/${sanitizer/,/-}"
  mkdir -p "$out"
  objects=()
  apply=""
  for isa in "${sets[@]}"; do
    apply+=" apply($isa)"
    declare -n flags="flags_$isa"
    for step in "${steps[@]}"; do
      "$compiler" "${common[@]}" "${flags[@]}" "-fsanitize=$sanitizer" -DANCHOR_ATTENTION_ISA="$isa" \
        -c "csrc/kernels/cpu/$step.cpp" -o "$out/$isa-$step.o"
      objects+=("$out/$isa-$step.o")
    done
  done
  "$compiler" "${common[@]}" "-fsanitize=$sanitizer" "-DANCHOR_ATTENTION_ISAS(apply)=$apply" \
    "${generic[@]}" "${objects[@]}" -lpthread -o "$out/drive_kernels"
  for isa in "${sets[@]}"; do
    if [ "$isa" = baseline ] || grep -qw "$(if [ "$isa" = avx512 ]; then echo avx512dq; else echo "$isa"; fi)" /proc/cpuinfo; then
      echo "== $sanitizer, $isa"
      ANCHOR_ATTENTION_CPU_ISA="$isa" UBSAN_OPTIONS=halt_on_error=1 "$out/drive_kernels"
    fi
  done
done
