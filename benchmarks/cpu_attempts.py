"""Designs of the CPU kernels' register block against each other: ``python -m benchmarks.cpu_attempts``.

The steps of one instruction set are compiled once per design, from this tree or from an earlier revision, and their
tiles are called on one thread, without schedule: float32, one head. In every round each design has its turn, and before
it multiply-adds on registers; times are processor times of the thread. What is kept is the rate and the share of the
registers' rate in the same moment, as medians with quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from anchor_attention.benchmark.timing import quartiles

from .machine import ROOT, environment, register_library, results_folder

ISA = "avx2"
CALLERS = "benchmarks/tile_rates.cpp"
# As in cmake/sources.cmake.
FLAGS = "-mavx2 -mfma -std=gnu++20 -O3 -fPIC -fno-math-errno -fno-trapping-math -Wno-psabi".split()
OTHER_TYPES = re.compile(r"    case ScalarType::bfloat16:.*?(?=    default:\n      return function\(float)", re.DOTALL)
TOKENS, HEAD_DIM = 1024, 64
FLOPS = {"forward": 4.0, "backward": 10.0}
SECONDS_PER_TURN = 0.01
REGISTER_ITERATIONS = 1_000_000


class Design(NamedTuple):
    """What is compiled, and what share of the registers' rate was expected of the forward before it was measured."""

    name: str
    predicted: float | None
    defines: dict[str, int]
    revision: str | None = None
    callers: str | None = None  # revision of tile_rates.cpp, which calls the tiles by the interface of its time


# Expected: loops at 0.97 of the registers with turns of four steps, 0.09 of the time for what is around them.
DESIGNS = (
    Design("6 × 2, turn of 4 steps, chunks of 96 keys", None, {}),
    Design("6 × 2, turn of 1 step", 0.85, {"UNROLL": 1}),
    Design("4 × 3, turn of 4 steps, 48 queries", 0.88, {"BLOCK_VECTORS": 3, "TILE_VECTORS": 6}),
    Design("6 × 2, chunks of 64 keys", 0.88, {"CHUNK_KEYS": 64}),
    Design("6 × 2, chunks of 128 keys", 0.89, {"CHUNK_KEYS": 128}),
    Design("6 × 2, tiles of 128 queries", None, {"TILE_VECTORS": 16}),
    Design("6 × 1, turn of 4 steps", 0.66, {"BLOCK_VECTORS": 1}),
)


def _copy_source(path: str, revision: str | None, tree: Path) -> None:
    """A file or folder of this checkout, or of an earlier revision, at its place in ``tree``."""
    if revision is not None:
        archive = subprocess.run(["git", "archive", revision, path], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
        return
    (tree / path).parent.mkdir(exist_ok=True)
    (shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile)(ROOT / path, tree / path)


def compile_design(design: Design, folder: Path) -> ctypes.CDLL:
    """A library of the design's steps and what calls them."""
    tree = Path(tempfile.mkdtemp(dir=folder))
    for path, revision in (("csrc", design.revision), (CALLERS, design.callers)):
        _copy_source(path, revision, tree)
    # Float32 alone is called, and takes a quarter of the time to compile.
    vectors = tree / "csrc" / "kernels" / "cpu" / "vector" / "simd.h"
    vectors.write_text(OTHER_TYPES.sub("", vectors.read_text()))
    target = tree / "design.so"
    command = [os.environ.get("CXX", "c++"), *FLAGS, "-shared", f"-I{tree / 'csrc'}", f"-DANCHOR_ATTENTION_ISA={ISA}"]
    command += [f"-DANCHOR_ATTENTION_{name}={value}" for name, value in design.defines.items()]
    sources = [*sorted(vectors.parent.glob("*.cpp")), tree / CALLERS]
    subprocess.run([*command, *map(str, sources), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.make_problem.restype = ctypes.c_void_p
    return library


def rate_of(seconds: Callable[[int], float], flops: float) -> Callable[[], float]:
    """GFLOP/s of a turn that is about as long as every other one."""
    calls = max(1, round(SECONDS_PER_TURN / seconds(1)))
    return lambda: flops * calls / seconds(calls) / 1e9


def library_turns(library: ctypes.CDLL, head_dim: int) -> dict[str, Callable[[], float]]:
    problem = ctypes.c_void_p(library.make_problem(*map(ctypes.c_long, (TOKENS, TOKENS, head_dim))))
    scores = TOKENS * TOKENS * head_dim

    def turn(name: str) -> Callable[[], float]:
        function = library[f"{name}_seconds"]
        function.restype, function.argtypes = ctypes.c_double, (ctypes.c_void_p, ctypes.c_long)
        return rate_of(lambda calls: float(function(problem, calls)), FLOPS[name] * scores)

    return {name: turn(name) for name in FLOPS}


def sdpa_turns(head_dim: int) -> dict[str, Callable[[], float]]:
    """PyTorch's own, on one thread, by the same clock."""
    q, k, v = (torch.randn(1, 1, TOKENS, head_dim, requires_grad=True) for _ in range(3))

    def forward(calls: int) -> float:
        start = time.thread_time()
        with torch.no_grad():
            for _ in range(calls):
                F.scaled_dot_product_attention(q, k, v)
        return time.thread_time() - start

    # Autograd's machinery costs microseconds, but it may run on a thread of its own, whose time would be missing.
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with torch.no_grad():
        result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    grad_out = torch.randn_like(result)

    def backward(calls: int) -> float:
        start = time.thread_time()
        with torch.no_grad():
            for _ in range(calls):
                flash_backward(grad_out, q, k, v, result, lse, 0.0, False)
        return time.thread_time() - start

    scores = TOKENS * TOKENS * head_dim
    return {name: rate_of(f, FLOPS[name] * scores) for name, f in (("forward", forward), ("backward", backward))}


def matmul_turn() -> Callable[[], float]:
    """torch's matrix product of the same inner sizes: what a library of products reaches in the same moment."""
    a, b = torch.randn(TOKENS, TOKENS), torch.randn(TOKENS, TOKENS)

    def seconds(calls: int) -> float:
        start = time.thread_time()
        for _ in range(calls):
            torch.mm(a, b)
        return time.thread_time() - start

    return rate_of(seconds, 2.0 * TOKENS**3)


def register_turn() -> Callable[[], float]:
    chains = register_library()["fma_float32"]
    chains.restype, chains.argtypes = ctypes.c_double, (ctypes.c_long, ctypes.POINTER(ctypes.c_float))
    sink = (ctypes.c_float * 1)()

    def turn() -> float:
        start = time.thread_time()
        operations = float(chains(REGISTER_ITERATIONS, sink))
        return operations / (time.thread_time() - start) / 1e9

    return turn


def measure(designs: tuple[Design, ...], head_dim: int, rounds: int) -> dict[str, Any]:
    """Rates by design and pass, and their shares of the registers' rate."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    registers = register_turn()
    turns: dict[tuple[str, str], Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for design in designs:
            for name, turn in library_turns(compile_design(design, Path(folder)), head_dim).items():
                turns[design.name, name] = turn
        for name, turn in sdpa_turns(head_dim).items():
            turns["scaled_dot_product_attention", name] = turn
        turns["torch.mm", "product"] = matmul_turn()
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
        shares: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
        ceilings = []
        for _ in range(rounds):
            for key, turn in turns.items():
                before = registers()
                rate = turn()
                ceiling = (before + registers()) / 2
                ceilings.append(ceiling)
                rates[key].append(rate)
                shares[key].append(rate / ceiling)
    return {
        "registers_gflops": quartiles(ceilings)._asdict(),
        "designs": [
            {
                "name": design,
                "pass": name,
                "predicted_share_of_forward": next((d.predicted for d in designs if d.name == design), None),
                "defines": next((d.defines for d in designs if d.name == design), None),
                "revision": next((d.revision for d in designs if d.name == design), None),
                "gflops": quartiles(rates[design, name])._asdict(),
                "share_of_registers": quartiles(shares[design, name])._asdict(),
            }
            for design, name in turns
        ],
    }


def markdown(results: dict[str, Any]) -> str:
    """One line per design and pass."""
    lines = ["| design | pass | predicted | GFLOP/s | share of the registers' rate |", "|---|---|---|---|---|"]
    for row in results["designs"]:
        predicted = row["predicted_share_of_forward"] if row["pass"] == "forward" else None
        lines.append(
            f"| {row['name']} | {row['pass']} | {'–' if predicted is None else f'{predicted:.2f}'} | "
            f"{row['gflops']['median']:.1f} | {row['share_of_registers']['median']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--previous", metavar="REVISION", help="a revision of git to measure beside the designs")
    parser.add_argument(
        "--callers",
        metavar="REVISION",
        help=f"take {CALLERS} for --previous from this revision, if today's does not fit",
    )
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help=f"size of the head (default: {HEAD_DIM})")
    parser.add_argument("--rounds", type=int, default=41, help="turns of every design (default: 41)")
    parser.add_argument("--output", type=Path, default=results_folder().parent / ISA, help="folder of the results")
    arguments = parser.parse_args()
    designs = DESIGNS
    if arguments.previous:
        name = f"before ({arguments.previous})"
        designs += (Design(name, None, {}, arguments.previous, arguments.callers),)
    shape = (TOKENS, TOKENS, arguments.head_dim)
    results = {"environment": environment(1), "shape": shape, "rounds": arguments.rounds}
    results |= measure(designs, arguments.head_dim, arguments.rounds)
    stem = "attempts" if arguments.head_dim == HEAD_DIM else f"attempts_hd{arguments.head_dim}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / f"{stem}.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
