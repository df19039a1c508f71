"""The CPU suite: ``python -m benchmarks.run_cpu``.

Runs once for every instruction set of the machine, ours and torch's held to it, and writes raw times, the environment,
the table and the plots to benchmarks/results/<processor>/<instruction set>/. Every finished case is on disk at once, so
that an interrupted run leaves what it measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from anchor_attention.benchmark import NotSupportedError
from anchor_attention.benchmark.peers import OURS

from .cases import DTYPES, LEVELS, Case, relative_errors, time_case
from .instruction_sets import PINS, is_pinned, measured_sets, run_pinned
from .machine import ROOT, ceilings, environment, results_folder
from .memory import peak_above_inputs
from .report import CASES, CEILINGS, ENVIRONMENT, SCALING, load, write_report
from .scaling import QUERY_COUNTS, time_against_queries, time_against_threads
from .workloads import CPU, PATTERNS, by_name, shrink

ROUNDS = 11
# What makes two records of a folder the same case.
IDENTITY = ("level", "workload", "pattern", "dtype", "pass")
QUICK_ROUNDS, QUICK_SHRINK = 3, 16
FAST_PEERS = ("eager", "sdpa_per_pattern")
MEMORY_PEERS = (OURS, *FAST_PEERS)


def suite(arguments: argparse.Namespace) -> list[Case]:
    """The cases of a command line, in the order in which they run: those that ``--full`` adds at the end."""
    workloads = by_name(CPU, arguments.workloads)
    cases = [
        Case(level, shrink(workload, QUICK_SHRINK) if arguments.quick else workload, pattern, dtype, passes)
        for workload in workloads
        for level in arguments.levels
        for pattern in workload.patterns
        for dtype in arguments.dtypes
        for passes in workload.passes
    ]
    if arguments.patterns:
        return [case for case in cases if case.pattern in arguments.patterns]
    if arguments.full:
        return sorted(cases, key=lambda case: case.pattern != case.workload.typical)
    return [case for case in cases if case.pattern == case.workload.typical]


def run_case(case: Case, rounds: int, threads: int, in_depth: bool = True) -> dict[str, Any]:
    """Everything about one case.

    Args:
        case: Which.
        rounds: Rounds of the timing.
        threads: Threads of the process that memory is measured in.
        in_depth: Whether the peers that need a compiler take part, and whether memory is measured for the typical
            pattern.
    """
    peers = () if in_depth else FAST_PEERS
    record = time_case(case, rounds, peers=peers)
    record["relative_error"] = relative_errors(case, peers)
    if in_depth and case.pattern == case.workload.typical and case.passes == case.workload.passes[-1]:
        record["peak_bytes"] = {}
        for peer in MEMORY_PEERS:
            try:
                record["peak_bytes"][peer] = peak_above_inputs(case, peer, threads)
            except NotSupportedError as error:
                record["peak_bytes"][peer] = str(error)
    return record


def run(arguments: argparse.Namespace) -> Path:
    """Runs the suite and returns the folder of its results."""
    torch.set_num_threads(arguments.threads)
    folder = arguments.out or (ROOT / "build" / "bench-quick" if arguments.quick else results_folder())
    folder.mkdir(parents=True, exist_ok=True)
    rounds = QUICK_ROUNDS if arguments.quick else arguments.rounds
    cases = suite(arguments)
    surroundings = environment(arguments.threads) | {"planned_cases": len(cases)}
    records = _kept(folder, surroundings) if arguments.resume else []
    done = [tuple(record[key] for key in IDENTITY) for record in records]
    cases = [case for case in cases if tuple(case.describe()[key] for key in IDENTITY) not in done]
    _write(folder / ENVIRONMENT, surroundings)
    _write(folder / CEILINGS, ceilings(arguments.threads, rounds))
    if not arguments.workloads and not (arguments.resume and (folder / SCALING).is_file()):
        counts = QUERY_COUNTS[:2] if arguments.quick else QUERY_COUNTS
        small = shrink(by_name(CPU, ["drivaer_train"])[0], QUICK_SHRINK) if arguments.quick else None
        scaling = {
            "queries": time_against_queries(rounds, counts=counts),
            "threads": time_against_threads(rounds, arguments.threads, small),
        }
        _write(folder / SCALING, scaling)
    progress = tqdm(cases, unit="case")
    try:
        for case in progress:
            progress.set_description(f"{case.level} {case.workload.name} {case.pattern} {case.dtype} {case.passes}")
            in_depth = not arguments.quick or case.workload.name == cases[0].workload.name
            record = run_case(case, rounds, arguments.threads, in_depth)
            records.append(record | {"commit": surroundings["commit"]})
            _write(folder / CASES, records)
    finally:
        if records:
            write_report(folder)
    return folder


def _kept(folder: Path, surroundings: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of an earlier run on the same machine with the same torch; each says its commit.

    Raises:
        ValueError: If the earlier run had other surroundings.
    """
    earlier = load(folder, ENVIRONMENT)
    if earlier is None:
        return []
    for name in ("device", "threads", "torch", "instruction_sets"):
        # Tuples come back from a file as lists.
        if json.dumps(earlier[name]) != json.dumps(surroundings[name]):
            raise ValueError(f"{folder} was measured with {name} {earlier[name]!r}, not {surroundings[name]!r}")
    return load(folder, CASES) or []


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.run_cpu", description="Runs the CPU benchmark suite.")
    result.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: shows that everything runs")
    result.add_argument("--resume", action="store_true", help="keeps the cases that the folder has")
    result.add_argument("--full", action="store_true", help="every pattern, the typical ones first")
    result.add_argument(
        "--workloads", nargs="+", default=[], choices=[workload.name for workload in CPU], metavar="NAME"
    )
    result.add_argument("--levels", nargs="+", default=LEVELS, choices=LEVELS)
    result.add_argument("--patterns", nargs="+", default=[], choices=PATTERNS)
    result.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    result.add_argument("--rounds", type=int, default=ROUNDS)
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--out", type=Path, default=None, help="folder of the results")
    result.add_argument(
        "--sets", nargs="+", default=[], choices=PINS, metavar="SET", help="instruction sets; all but baseline"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; see ``--help``."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    if arguments.quick and not arguments.sets:
        sets: tuple[str, ...] = measured_sets()[:1]
    else:
        sets = tuple(arguments.sets) or measured_sets()
    if len(sets) > 1 and arguments.out is not None:
        raise SystemExit(f"--out is one folder, but {', '.join(sets)} are to be measured: name one with --sets")
    if not (len(sets) == 1 and is_pinned(sets[0])):
        for name in sets:
            print(f"{name}:", flush=True)
            run_pinned(name, ["-m", "benchmarks.run_cpu", *argv, "--sets", name])
        return
    folder = run(arguments)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
