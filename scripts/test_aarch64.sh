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
command -v cmake >/dev/null || { echo "cmake is missing: pip install cmake" >&2; exit 1; }
out=build/aarch64
cmake -S tests/native -B "$out" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  "-DCMAKE_CXX_COMPILER=$compiler" -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null
cmake --build "$out" --parallel "$(nproc)" >/dev/null
echo "== aarch64, baseline"
qemu-aarch64 "$out/drive_kernels" 2
