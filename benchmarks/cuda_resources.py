"""What the CUDA kernels take and do, without a GPU: registers and spills from the compiler, counts from the emulator.

    python -m benchmarks.cuda_resources

writes `benchmarks/results/emulated/cuda_kernels.json` and the tables beside it. A test compares the emulator's counts
with the file, so that a bank conflict or an instruction that comes back is seen. Times are not estimated.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tests.cuda_plans import KernelRun, attention_backward, attention_forward, plans
from tests.cuda_plans.build import compile_command
from tests.cuda_plans.run import locate, to_storage

RESULTS = Path(__file__).parent / "results" / "emulated"
ARCHITECTURES = (80, 90)
PASSES = ("forward", "backward_query", "backward_key")
PRECISIONS = ("bfloat16", "float16", "tf32", "tf32x3")
HEAD_DIMS = (32, 48, 64, 96, 128, 256)
# Whole tiles of every shape, so that counts per score are those of long ranges apart from prologue and epilogue.
N_QUERIES, N_KEYS = 384, 768

Row = dict[str, Any]


def compiled(instantiation: str, architecture: int) -> dict[str, Row]:
    """Registers, spilled bytes and static shared memory of each kernel of a file, by mangled name."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "kernels.cubin"
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [*compile_command(instantiation), "-cubin", target, "-Xptxas=-v", "-o", output]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels: dict[str, Row] = {}
    current: Row = {}
    for line in result.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels[match[1]] = {"static_shared_bytes": 0}
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spill_bytes"] = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                current["static_shared_bytes"] = int(shared[1])
    return kernels


def kernel_names(precision: str, head_dim: int) -> list[tuple[str, str]]:
    """(pass, kernel name) of one precision and head size."""
    names = [
        ("forward", f"forward_{precision}_{head_dim}"),
        ("backward_query", f"backward_query_{precision}_{head_dim}"),
    ]
    suffixes = ("",) if head_dim <= 128 else ("_key", "_value")
    return names + [("backward_key", f"backward_key_{precision}_{head_dim}{suffix}") for suffix in suffixes]


def resources(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, Row]:
    """Per kernel: dynamic shared memory and, per architecture, what the compiler reports."""
    files = [f"attention_{precision}_{head_dim}" for precision in PRECISIONS for head_dim in HEAD_DIMS]
    jobs = [(file, architecture) for file in files for architecture in architectures]
    with ThreadPoolExecutor(max_workers=2) as pool:
        reports = dict(zip(jobs, pool.map(lambda job: compiled(*job), jobs), strict=True))
    rows: dict[str, Row] = {}
    for number, precision in enumerate(PRECISIONS):
        for head_dim in HEAD_DIMS:
            for kernel_pass, name in kernel_names(precision, head_dim):
                row: Row = {"shared_bytes": plans().shared_bytes(PASSES.index(kernel_pass), number, head_dim)}
                entry = locate(name)[1]
                for architecture in architectures:
                    report = reports[f"attention_{precision}_{head_dim}", architecture]
                    row[f"sm_{architecture}"] = report[entry]
                rows[name] = row
    return rows


def counted(precision: str, head_dim: int) -> dict[str, Row]:
    """Per kernel, of one head, batch element and range: what the emulator counts."""
    dtype = "float32" if precision.startswith("tf32") else precision
    rng = np.random.default_rng(0)
    q, grad_out = (to_storage(rng.normal(size=(1, N_QUERIES, 1, head_dim)), dtype) for _ in range(2))
    k, v = (to_storage(rng.normal(size=(1, N_KEYS, 1, head_dim)), dtype) for _ in range(2))
    run = KernelRun(multiprocessors=1)
    table = [((0, N_QUERIES), [(0, N_KEYS)])]
    allow_tf32 = precision == "tf32"
    out, lse = attention_forward(dtype, q, k, v, table, run=run, allow_tf32=allow_tf32)
    attention_backward(dtype, q, k, v, table, out, lse, grad_out, run=run, allow_tf32=allow_tf32)
    rows: dict[str, Row] = {}
    for name, _, counters in run.launches:
        if not name.startswith(PASSES):
            continue
        totals, shared, memory = counters.totals(), counters.shared_memory(), counters.global_memory()
        loads = {op: counts for op, counts in shared.items() if op.startswith(("ldmatrix", "ld.shared"))}
        stores = {op: counts for op, counts in shared.items() if op not in loads}
        rows[name] = {
            "warp_instructions": totals["warps"],
            "mma": sum(counters.tensor_core().values()),
            "exp2": totals["ex2"],
            "shared_load_wavefronts": sum(counts["wavefronts"] for counts in loads.values()),
            "shared_load_conflicts": sum(counts["conflicts"] for counts in loads.values()),
            "shared_store_wavefronts": sum(counts["wavefronts"] for counts in stores.values()),
            "shared_store_conflicts": sum(counts["conflicts"] for counts in stores.values()),
            "global_requests": sum(counts["requests"] for counts in memory.values()),
            "global_sectors": sum(counts["sectors"] for counts in memory.values()),
        }
    return rows


def table_text(rows: dict[str, Row]) -> str:
    """The markdown tables."""
    lines = [
        "# CUDA kernels: resources and counts",
        "",
        f"Emulated on {N_QUERIES} queries × {N_KEYS} keys, one head. Times: not measured.",
        "",
        "| kernel | shared KiB | registers sm_80 / sm_90 | spilled bytes | instructions/mma | exp2/score "
        "| load wavefronts/mma | load conflicts | sectors/request |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        counts = row["emulated"]
        reports = [row[f"sm_{architecture}"] for architecture in ARCHITECTURES]
        registers = " / ".join(str(report["registers"]) for report in reports)
        spilled = " / ".join(str(report["spill_bytes"]) for report in reports)
        lines.append(
            f"| {name} | {row['shared_bytes'] / 1024:.1f} | {registers} | {spilled} "
            f"| {counts['warp_instructions'] / counts['mma']:.2f} | {counts['exp2'] / (N_QUERIES * N_KEYS):.2f} "
            f"| {counts['shared_load_wavefronts'] / counts['mma']:.2f} | {counts['shared_load_conflicts']} "
            f"| {counts['global_sectors'] / counts['global_requests']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    rows = resources()
    for precision in PRECISIONS:
        for head_dim in HEAD_DIMS:
            for name, counts in counted(precision, head_dim).items():
                rows[name]["emulated"] = counts
    output.mkdir(parents=True, exist_ok=True)
    (output / "cuda_kernels.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    (output / "cuda_kernels.md").write_text(table_text(rows))


if __name__ == "__main__":
    main()
