"""Random calls against float64 on every instruction set of this processor: ``make fuzz``.

Case number n of an instruction set is the same everywhere and always. A run goes on where the last one with the same
file ended, so that hours can be spent in pieces. To see one case again: ``python -m tests.fuzz --only n --isa NAME``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from anchor_attention import cpu_instruction_sets

from .cases import run_case

VARIABLE = "ANCHOR_ATTENTION_CPU_ISA"


def work(first: int, seconds: float, cases: int) -> dict[str, Any]:
    """Runs cases from ``first`` on, on the instruction set of this process, until their number or the time is up."""
    end = time.monotonic() + seconds
    kinds: Counter[str] = Counter()
    failures: dict[str, str] = {}
    seed = first
    while seed < first + cases and time.monotonic() < end:
        # Threads of other programs' processors cost a case many times its work: a thousand in turn with one and two.
        torch.set_num_threads(1 + seed // 1000 % 2)
        try:
            kinds[run_case(seed)] += 1
        except Exception as error:
            failures[str(seed)] = f"{type(error).__name__}: {error}"[:300]
        seed += 1
    return {"next": seed, "kinds": dict(kinds), "failures": failures}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Adds the counts of a piece to those before it."""
    kinds = Counter(old.get("kinds", {})) + Counter(new["kinds"])
    return {
        "next": new["next"],
        "kinds": dict(sorted(kinds.items())),
        "failures": {**old.get("failures", {}), **new["failures"]},
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs a piece of each instruction set's cases; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=50, help="time for all instruction sets together")
    parser.add_argument("--cases", type=int, default=10**9, help="cases for each instruction set at most")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz.json"), help="counts, gone on from if it exists")
    parser.add_argument("--isa", action="append", help="instruction set; every one that runs here when left out")
    parser.add_argument("--only", type=int, help="one case, with its traceback")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        print(json.dumps(work(options.worker, options.seconds, options.cases)))
        return 0
    sets = options.isa or list(cpu_instruction_sets().runnable)
    if options.only is not None:
        code = f"from tests.fuzz.cases import run_case; print(run_case({options.only}))"
        return max(
            subprocess.run([sys.executable, "-c", code], env={**os.environ, VARIABLE: s}).returncode for s in sets
        )
    counts = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in sets:
        before = counts.get(name, {})
        command = [sys.executable, "-m", "tests.fuzz", "--worker", str(before.get("next", 0))]
        command += ["--seconds", str(options.seconds / len(sets)), "--cases", str(options.cases)]
        result = subprocess.run(command, env={**os.environ, VARIABLE: name}, capture_output=True, text=True)
        if result.returncode != 0:
            print(result.stderr)
            return 1
        counts[name] = merged(before, json.loads(result.stdout))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(counts, indent=1) + "\n")
        failures = counts[name]["failures"]
        print(f"{name}: {counts[name]['next']} cases, {len(failures)} failed", *failures.items(), sep="\n  ")
    return int(any(counts[name]["failures"] for name in sets))


if __name__ == "__main__":
    sys.exit(main())
