#!/usr/bin/env bash
# Builds the CPU kernels with sanitizers, torch-free, and drives them over random problems on real threads. Each
# sanitizer takes the sets in which it can find something new: bytes out of bounds depend on the width of the vectors,
# undefined arithmetic and races don't. What takes the time is compiling, so it is done on every core.
# Usage: scripts/test_sanitizers.sh   (CXX chooses the compiler)
set -euo pipefail
cd "$(dirname "$0")/.."
export compiler="${CXX:-c++}"
common=(-Icsrc -Itests/native -std=c++20 -g0 -O1 -fno-omit-frame-pointer -Wno-psabi -fno-math-errno -fno-trapping-math)
generic=(csrc/key_ranges.cpp csrc/kernels/cpu/{attention,attention_backward,dispatch,rope,schedule}.cpp
         tests/native/drive_kernels.cpp)
steps=(attention_backward_tile attention_tile instruction_set pack rope_tokens)
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
declare -A flags=([baseline]="" [avx2]="-mavx2 -mfma" [avx512]="$avx512" [avx512_bf16]="$avx512 -mavx512bf16"
                  [amx_model]="")
best=baseline
for needed in avx2:avx2 avx512:avx512dq avx512_bf16:avx512_bf16; do
  if grep -qsw "${needed#*:}" /proc/cpuinfo; then best="${needed%:*}"; fi
done

# Checking memory by calls instead of in line halves the time that GCC takes.
by_calls=""
if "$compiler" --version | grep -q "Free Software Foundation"; then
  by_calls="--param asan-instrumentation-with-call-threshold=0"
fi

# check SANITIZER PROBLEMS_PER_TYPE SETS FLAGS...
check() {
  local sanitizer="$1" problems="$2" sets="$3" out="build/sanitizers/$1"
  local apply="" apply_tiles="" objects=() jobs=() isa object
  shift 3
  local options=("${common[@]}" "-fsanitize=$sanitizer" -fno-sanitize-recover=all "$@")
  mkdir -p "$out"
  for isa in $sets; do
    if [ "$isa" = amx_model ]; then
      apply_tiles+=" apply($isa)"
      jobs+=("${options[*]} ${flags[$isa]} -DANCHOR_ATTENTION_ISA=$isa -c tests/native/amx_model.cpp -o $out/$isa.o")
      objects+=("$out/$isa.o")
      continue
    fi
    apply+=" apply($isa)"
    for step in "${steps[@]}"; do
      object="$out/$isa-$step.o"
      jobs+=("${options[*]} ${flags[$isa]} -DANCHOR_ATTENTION_ISA=$isa -c csrc/kernels/cpu/vector/$step.cpp -o $object")
      objects+=("$object")
    done
  done
  printf '%s\n' "${jobs[@]}" | xargs -P "$(nproc)" -I{} sh -c '$compiler {}'
  "$compiler" "${options[@]}" "-DANCHOR_ATTENTION_ISAS(apply)=$apply" \
    "-DANCHOR_ATTENTION_TILE_ISAS(apply)=$apply_tiles" \
    "${generic[@]}" "${objects[@]}" -lpthread -o "$out/drive_kernels"
  for isa in $sets; do
    echo "== $sanitizer, $isa"
    ANCHOR_ATTENTION_CPU_ISA="$isa" "$out/drive_kernels" "$problems"
  done
}

vector_sets="$best"
if [ "$best" != baseline ]; then vector_sets+=" baseline"; fi
# shellcheck disable=SC2086
check address 12 "amx_model $vector_sets" $by_calls
check undefined 12 "amx_model baseline"
check thread 3 "$best"
