#!/usr/bin/env bash
# Builds the CPU kernels with sanitizers, torch-free, and drives them over random problems on real threads. Each
# sanitizer takes the sets in which it can find something new: bytes out of bounds depend on the width of the vectors,
# undefined arithmetic and races don't. What takes the time is compiling, so it is done on every core.
# Usage: scripts/test_sanitizers.sh   (CXX chooses the compiler)
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cmake >/dev/null || { echo "cmake is missing: pip install cmake" >&2; exit 1; }
best=baseline
for needed in avx2:avx2 avx512:avx512dq avx512_bf16:avx512_bf16; do
  if grep -qsw "${needed#*:}" /proc/cpuinfo; then best="${needed%:*}"; fi
done

# check SANITIZER PROBLEMS_PER_TYPE SETS
check() {
  local out="build/sanitizers/$1" isa
  cmake -S tests/native -B "$out" "-DSANITIZER=$1" "-DSETS=${3// /;}" >/dev/null
  cmake --build "$out" --parallel "$(nproc)" >/dev/null
  for isa in $3; do
    echo "== $1, $isa"
    ANCHOR_ATTENTION_CPU_ISA="$isa" "$out/drive_kernels" "$2"
  done
}

vector_sets="$best"
if [ "$best" != baseline ]; then vector_sets+=" baseline"; fi
check address 12 "amx_model $vector_sets"
check undefined 12 "amx_model baseline"
check thread 3 "$best"
