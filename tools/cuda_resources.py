"""What the CUDA kernels take and do, without a GPU: registers and spills of the built library, counts of the emulator.

    python -m tools.cuda_resources

writes `benchmarks/results/emulated/cuda_kernels.json`, and `cuda_hopper.json` for the kernels of sm_90a, and the tables
beside them. Tests compare the emulator's counts with the files, so that a bank conflict or an instruction that comes
back is seen. Times are not estimated. Machine code is counted by nvdisasm.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from anchor_attention._library import library_path
from tools.cuda_plans import (
    KernelRun,
    attention_backward,
    attention_double_backward,
    attention_forward,
    attention_jvp,
)
from tools.cuda_plans.run import instantiation_of, to_storage
from tools.device_code import Image, images, resource_usage
from tools.ptx_emulator.launch import cuda_tool

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "emulated"
TARGETS = ("sm_80", "sm_90")
PASSES = ("forward", "backward_query", "backward_key", "jvp", "double_backward_query", "double_backward_key")
PRECISIONS = ("bfloat16", "float16", "tf32", "tf32x3")
HEAD_DIMS = (32, 48, 64, 96, 128, 256)
HOPPER_PRECISIONS = ("bfloat16", "float16")
HOPPER_HEAD_DIMS = (32, 48, 64, 96, 128)
# Whole tiles of every shape, so that counts per score are those of long ranges apart from prologue and epilogue.
N_QUERIES, N_KEYS = 384, 768

Row = dict[str, Any]


@cache
def built(target: str) -> dict[str, Row]:
    """Registers and spilled bytes of each kernel in the library that is loaded, by mangled name.

    For sm_90a also what :func:`machine_code` counts.

    Raises:
        FileNotFoundError: If the library has no code for the target, having been built without nvcc.
    """
    found = [image for image in images(library_path()) if image.target == target]
    if not found:
        raise FileNotFoundError(f"{library_path()} has no code for {target}: build it with ANCHOR_ATTENTION_CUDA=ON")
    kernels: dict[str, Row] = {}
    for image in found:
        counts = machine_code(image) if target == "sm_90a" else {}
        for name, usage in resource_usage(image).items():
            kernels[name] = usage | counts.get(name, {})
    return kernels


def machine_code(image: Image) -> dict[str, Row]:
    """Static instructions of each kernel of an image.

    `mufu_under_products` are the exponentials between the wait for the scores of a tile and the wait for the output of
    the tile before: they run while the tensor cores work.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / image.name
        cubin.write_bytes(image.data)
        text = subprocess.run([cuda_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Row] = {}
    for section in re.split(r"\n//-+ \.text\.", text)[1:]:
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][^;]*?) ;", section)
        operations = Counter(instruction.split()[0].split(".")[0] for instruction in instructions)
        row: Row = {
            "hgmma": operations["HGMMA"],
            "mufu": operations["MUFU"],
            "local_memory": operations["LDL"] + operations["STL"],
        }
        if marks := [i for i, text in enumerate(instructions) if text.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x1")]:
            rest = instructions[marks[0] + 1 :]
            end = next(i for i, text in enumerate(rest) if text.startswith("WARPGROUP.DEPBAR"))
            row["mufu_under_products"] = sum(text.startswith("MUFU.EX2") for text in rest[:end])
        kernels[section.split()[0]] = row
    return kernels


def counted(precision: str, head_dim: int, generation: str = "sm80") -> dict[str, Row]:
    """Per kernel, of one head, batch element and range: its dynamic shared memory, and what the emulator counts.

    Derivatives are those along one direction in which q, k and v all move.
    """
    dtype = "float32" if precision.startswith("tf32") else precision
    rng = np.random.default_rng(0)
    q, grad_out = (to_storage(rng.normal(size=(1, N_QUERIES, 1, head_dim)), dtype) for _ in range(2))
    k, v = (to_storage(rng.normal(size=(1, N_KEYS, 1, head_dim)), dtype) for _ in range(2))
    run = KernelRun(multiprocessors=1, generation=generation)
    table = [((0, N_QUERIES), [(0, N_KEYS)])]
    allow_tf32 = precision == "tf32"
    out, lse = attention_forward(dtype, q, k, v, table, run=run, allow_tf32=allow_tf32)
    attention_backward(dtype, q, k, v, table, out, lse, grad_out, run=run, allow_tf32=allow_tf32)
    # Hopper runs the same kernels of these, and none of them computes in a single TF32 product.
    if generation == "sm80" and precision != "tf32":
        along = {
            f"{name}_tangent": to_storage(rng.normal(size=x.shape), dtype)
            for name, x in {"q": q, "k": k, "v": v}.items()
        }
        _, _, out_tangents, lse_tangents = attention_jvp(
            dtype, q, k, v, table, **{f"{name}s": tangent[None] for name, tangent in along.items()}, run=run
        )
        attention_double_backward(
            dtype, q, k, v, table, out, lse, grad_out, out_tangents[0], lse_tangents[0], **along, run=run
        )
    rows: dict[str, Row] = {}
    for name, _, counters in run.launches:
        if not name.startswith(PASSES if generation == "sm80" else generation):
            continue
        totals, shared, memory = counters.totals(), counters.shared_memory(), counters.global_memory()
        loads = {op: counts for op, counts in shared.items() if op.startswith(("ldmatrix", "ld.shared"))}
        stores = {op: counts for op, counts in shared.items() if op not in loads}
        rows[name] = {
            "shared_bytes": run.shared_bytes[name],
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
        if generation != "sm80":
            rows[name]["products"] = counters.tensor_core()
            rows[name]["bulk_bytes"] = totals["bulk_bytes"]
    return rows


def hopper_rows() -> dict[str, Row]:
    """Per kernel of sm_90a: shared memory, what the compiler reports, machine code, and what the emulator counts."""
    rows: dict[str, Row] = {}
    for precision in HOPPER_PRECISIONS:
        for head_dim in HOPPER_HEAD_DIMS:
            for name, counts in counted(precision, head_dim, "sm90").items():
                rows[name] = {"sm_90a": built("sm_90a")[instantiation_of(name)[1]], "emulated": counts}
    return rows


# Per cycle and multiprocessor of compute capability 9.0: floating-point operations of dense 16-bit products,
# exponentials, warp instructions issued.
_PRODUCT_RATE, _EXP2_RATE, _ISSUE_RATE = 4096, 16, 4
_PRODUCTS_PER_SCORE = {"forward": 2, "backward": 5, "backward_key": 4}


def hopper_table_text(rows: dict[str, Row]) -> str:
    """The markdown table of sm_90a."""
    lines = [
        "# sm_90a kernels: resources and counts",
        "",
        f"Emulated on {N_QUERIES} queries × {N_KEYS} keys, one head. Times: not measured.",
        "",
        "The columns of cycles are what the units of a multiprocessor need per 1000 scores at their full rates: "
        f"{_PRODUCT_RATE} operations of products and {_EXP2_RATE} exponentials a cycle. The larger bounds the kernel "
        f"from below. Instructions are those of PTX, per warp and {_ISSUE_RATE} a cycle; machine code has fewer.",
        "",
        "| kernel | shared KiB | registers at launch | spilled bytes | HGMMA | exponentials under products "
        "| products: cycles | exponentials: cycles | instructions: cycles | exp2/score | bank conflicts "
        "| bulk bytes/score |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        counts, report = row["emulated"], row["sm_90a"]
        kernel_pass, head_dim = name.removeprefix("sm90_").rsplit("_", 2)[::2]
        scores = N_QUERIES * N_KEYS / 1000
        products = 1000 * 2 * int(head_dim) * _PRODUCTS_PER_SCORE.get(kernel_pass, 0) / _PRODUCT_RATE
        conflicts = counts["shared_load_conflicts"] + counts["shared_store_conflicts"]
        lines.append(
            f"| {name} | {counts['shared_bytes'] / 1024:.1f} | {report['registers']} | {report['spilled_bytes']} "
            f"| {report['hgmma']} "
            f"| {report.get('mufu_under_products', '–')} of {report['mufu']} | {products:.0f} "
            f"| {counts['exp2'] / _EXP2_RATE / scores:.0f} | {counts['warp_instructions'] / _ISSUE_RATE / scores:.0f} "
            f"| {counts['exp2'] / scores / 1000:.2f} | {conflicts} | {counts['bulk_bytes'] / scores / 1000:.2f} |"
        )
    return "\n".join(lines) + "\n"


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
        reports = [row[target] for target in TARGETS]
        registers = " / ".join(str(report["registers"]) for report in reports)
        spilled = " / ".join(str(report["spilled_bytes"]) for report in reports)
        lines.append(
            f"| {name} | {counts['shared_bytes'] / 1024:.1f} | {registers} | {spilled} "
            f"| {counts['warp_instructions'] / counts['mma']:.2f} | {counts['exp2'] / (N_QUERIES * N_KEYS):.2f} "
            f"| {counts['shared_load_wavefronts'] / counts['mma']:.2f} | {counts['shared_load_conflicts']} "
            f"| {counts['global_sectors'] / counts['global_requests']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def kernel_rows() -> dict[str, Row]:
    """Per sm_80 kernel: what the library's code for every architecture takes, and what the emulator counts."""
    rows: dict[str, Row] = {}
    for precision in PRECISIONS:
        for head_dim in HEAD_DIMS:
            for name, counts in counted(precision, head_dim).items():
                entry = instantiation_of(name)[1]
                rows[name] = {target: built(target)[entry] for target in TARGETS} | {"emulated": counts}
    return rows


TABLES = {"cuda_kernels": (kernel_rows, table_text), "cuda_hopper": (hopper_rows, hopper_table_text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for table in arguments.tables:
        make_rows, text = TABLES[table]
        rows = make_rows()
        (arguments.output / f"{table}.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        (arguments.output / f"{table}.md").write_text(text(rows))


if __name__ == "__main__":
    main()
