#!/usr/bin/env bash
# Cross-compiles the portable CPU kernels for aarch64 and drives them over random problems on an emulator.
# Usage: scripts/test_aarch64.sh   (CXX_AARCH64 chooses the compiler)
set -euo pipefail
cd "$(dirname "$0")/.."
compiler="${CXX_AARCH64:-aarch64-linux-gnu-g++}"
if ! { command -v "$compiler" && command -v qemu-aarch64; } >/dev/null; then
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] ||
    { echo "$compiler or qemu-aarch64 is missing: install g++-aarch64-linux-gnu and qemu-user" >&2; exit 1; }
  apt-get update -qq
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user >/dev/null
fi
out=build/aarch64
mkdir -p "$out"
"$compiler" -static -Icsrc -std=c++20 -O1 -Wall -Wextra -Wno-psabi -fno-math-errno -fno-trapping-math \
  -DANCHOR_ATTENTION_ISA=baseline "-DANCHOR_ATTENTION_ISAS(apply)=apply(baseline)" \
  "-DANCHOR_ATTENTION_TILE_ISAS(apply)=" \
  csrc/key_ranges.cpp csrc/kernels/cpu/{attention,attention_backward,dispatch,rope,schedule}.cpp \
  csrc/kernels/cpu/vector/{attention_backward_tile,attention_tile,instruction_set,pack,rope_tokens}.cpp \
  tests/native/drive_kernels.cpp -lpthread -o "$out/drive_kernels"
echo "== aarch64, baseline"
qemu-aarch64 "$out/drive_kernels" 2
