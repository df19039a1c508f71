"""The benchmark table: ``python -m benchmarks.gpu.table --out FOLDER --seconds SECONDS``.

Every finished case is on disk at once, the table with it; when the time is spent the rest is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anchor_attention.benchmark import NotSupportedError, Quartiles, ratios
from anchor_attention.benchmark.operation import FORWARD
from anchor_attention.benchmark.peers import OURS
from anchor_attention.benchmark.timing import quartiles

from ..cases import (
    DTYPES,
    EXACT_PEER,
    FLEX_ATTENTION,
    FLEX_WORKLOADS,
    MATMUL,
    MODULE,
    OPERATION,
    Case,
    Contest,
    make_contest,
    relative_errors,
)
from ..report import CASES
from ..workloads import GPU, shrink
from .apart import AGAIN, NEXT, RIGHT, WRONG, add_options
from .peers import BACKENDS, LIBRARIES, SM80, library_contestant, on_sm80_kernels, with_backend
from .small_shapes import is_poisoned
from .stages import write_json
from .timing import interleave_cold, peak_above_inputs

ROUNDS, INPUT_SETS = 30, 3
# Major compute capability of the architecture that has kernels of its own.
HOPPER = 9
QUICK_ROUNDS, QUICK_SHRINK = 3, 256
# Against float64 without a fused kernel, whose scores have to fit into memory.
ERROR_SHRINK = 16
MATMUL_SIZES = {"cuda": 8192, "cpu": 256}
STANDING_PEERS = ("eager", "sdpa_per_pattern")
MEMORY_PEERS = (OURS, *STANDING_PEERS)


def suite(quick: bool) -> list[tuple[Case, tuple[str, ...]]]:
    """Cases with their peers, the most telling ones first; what has to be compiled for each shape comes last."""
    workloads = [shrink(workload, QUICK_SHRINK) for workload in GPU] if quick else list(GPU)
    operation_peers = (*STANDING_PEERS, "dense_mask")
    cases = [
        (Case(level, workload, workload.typical, dtype, passes), operation_peers if level == OPERATION else ())
        for dtype, level in (
            ("bfloat16", OPERATION),
            ("bfloat16", MODULE),
            ("float32", OPERATION),
            ("float16", OPERATION),
            ("float32", MODULE),
        )
        for workload in workloads
        for passes in workload.passes
    ]
    if quick:
        return [next(entry for entry in cases if entry[0].level == level) for level in (OPERATION, MODULE)]
    bfloat16 = [case for case, _ in cases if case.dtype == "bfloat16" and case.level == OPERATION]
    others = [
        (replace(case, pattern=pattern), operation_peers)
        for case in bfloat16
        for pattern in case.workload.patterns
        if pattern != case.workload.typical
    ]
    compiled = [(case, (FLEX_ATTENTION,)) for case in bfloat16 if case.workload.name in FLEX_WORKLOADS]
    return [*cases, *compiled, *others]


def measure(case: Case, peers: tuple[str, ...], rounds: int, device: str) -> dict[str, Any]:
    """Times, peak memory and errors of a case; a peer that can't is recorded with its reason.

    Raises:
        RuntimeError: If ours can't.
    """
    contest = make_contest(case, peers, device)
    contestants, reasons = dict(contest.contestants), dict(contest.not_supported)
    if case.level == OPERATION and FLEX_ATTENTION not in peers:
        _add_gpu_peers(case, contest, contestants, reasons, device)
    inputs = [contest.make_inputs() for _ in range(INPUT_SETS)]
    ready = {}
    for name in list(contestants):
        begin = time.perf_counter()
        try:
            contestants[name](inputs[0])
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            # Every library refuses in its own way.
            if name == OURS:
                raise
            reasons[name] = str(error).partition("\n")[0]
            del contestants[name]
        else:
            ready[name] = contest.build_seconds.get(name, 0.0) + time.perf_counter() - begin
    record = case.describe()
    record["peak_bytes"] = {
        name: peak_above_inputs(contestants[name], inputs[0], device) for name in MEMORY_PEERS if name in contestants
    }
    timed: dict[str, Callable[[Any], object]] = dict(contestants)
    size = MATMUL_SIZES[device]
    factors = torch.randn(2, size, size, device=device).to(DTYPES[case.dtype])
    timed[MATMUL] = lambda _: factors[0] @ factors[1]
    timed[MATMUL](None)
    seconds = interleave_cold(timed, inputs, rounds, device)
    matmul, flops = seconds.pop(MATMUL), 2.0 * size**3
    shares = ratios(matmul, seconds[OURS])
    record["ceilings"] = {
        MATMUL: {
            "gflops": quartiles([flops / t / 1e9 for t in matmul]),
            "our_share": Quartiles(*(share * record["attention_flops"] / flops for share in shares)),
        }
    }
    return record | {
        "seconds": seconds,
        "time_relative_to_ours": {name: ratios(own, seconds[OURS]) for name, own in seconds.items()},
        "not_supported": reasons,
        "ready_seconds": ready,
    }


def _add_gpu_peers(
    case: Case, contest: Contest, contestants: dict[str, Any], reasons: dict[str, str], device: str
) -> None:
    if device != "cuda":
        reasons |= dict.fromkeys((SM80, *BACKENDS, *LIBRARIES), "needs a GPU")
        return
    if torch.cuda.get_device_capability()[0] == HOPPER:
        contestants[SM80] = on_sm80_kernels(contestants[OURS])
    else:
        reasons[SM80] = "are what ours runs on here"
    for name, backend in BACKENDS.items():
        contestants[name] = with_backend(backend, contest.contestants[EXACT_PEER])
    _, table = case.workload.key_axis(case.pattern)
    for name in LIBRARIES:
        try:
            contestants[name] = library_contestant(name, table, case.passes, case.workload.min_real is not None)
        except NotSupportedError as error:
            reasons[name] = str(error)


def errors_of(case: Case, quick: bool, device: str) -> dict[str, Any]:
    """Errors of ours and the standing peers against float64, on a part of the tokens."""
    smaller = case if quick else replace(case, workload=shrink(case.workload, ERROR_SHRINK))
    return relative_errors(smaller, STANDING_PEERS, device)


def run(arguments: argparse.Namespace) -> int:
    """Measures until all is measured or the time is spent; returns the status that :mod:`.apart` wants."""
    begin = time.monotonic()
    cases = suite(arguments.quick)
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    path = arguments.out / CASES
    # Of the processes before this one.
    records: list[dict[str, Any]] = json.loads(path.read_text()) if arguments.first and path.is_file() else []
    if arguments.lost:
        records.append(cases[arguments.first - 1][0].describe() | {"failed": arguments.lost})
        write_json(path, records)
    for i, (case, peers) in enumerate(cases[arguments.first :], start=arguments.first):
        if time.monotonic() - begin > arguments.seconds:
            print(f"the time is spent: {len(cases) - i} of {len(cases)} cases are not measured")
            break
        # Before it runs: a case that takes the GPU with it is the last one named.
        label = f"{case.level} {case.workload.name} {case.pattern} {case.dtype} {case.passes}"
        print(f"{NEXT}{label}", flush=True)
        try:
            record = measure(case, peers, rounds, arguments.device)
        except RuntimeError as error:
            print(f"{label}: FAILED: {error}", flush=True)
            records.append(case.describe() | {"failed": str(error)})
        else:
            try:
                record["relative_error"] = errors_of(case, arguments.quick, arguments.device)
            except RuntimeError as error:
                record["relative_error_not_measured"] = str(error).partition("\n")[0]
            records.append(record)
            print(f"{label}: {_line(record)}", flush=True)
        write_json(path, records)
        if is_poisoned(arguments.device):
            return AGAIN
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return WRONG if any("failed" in record for record in records) else RIGHT


def _line(record: dict[str, Any]) -> str:
    own = quartiles(record["seconds"][OURS]).median
    others = (f"{values[1]:.2f} × {name}" for name, values in record["time_relative_to_ours"].items() if name != OURS)
    rate = f"{record['attention_flops'] / own / 1e12:.2f} TFLOP/s, " if record["level"] == OPERATION else ""
    what = "" if record["pass"] == FORWARD else " with gradients"
    return f"{own * 1e3:.3f} ms{what}, {rate}{', '.join(others)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--quick", action="store_true", help="tiny sizes and few rounds")
    command.add_argument("--seconds", type=float, default=300.0, help="no case starts after them")
    command.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_options(command)
    return run(command.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
