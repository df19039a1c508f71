"""Measures the libraries of `variants` and says which is best where: ``python -m benchmarks.gpu.sweep FOLDER``.

Usage: python -m benchmarks.gpu.sweep FOLDER --out FOLDER [--minutes 8]

Each library runs in processes of its own, in two rounds of opposite order, so that a drift of the clock does not pass
for a gain. Results are on disk after every process; what the time does not suffice for is left out. The table has
every variant, the losing ones too, as time relative to the shipped choice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .stages import ROOT, write_json
from .variants import BACKWARD, FORWARD, HEAD_DIMS, LIBRARIES, VARIANTS

SHIPPED = "shipped"
# Tokens of one group that attends to itself, by size class; and few queries of many keys.
SIZES = {"512": (512, 512), "2k": (2048, 2048), "4k": (4096, 4096), "16k": (16384, 16384), "256 of 64k": (256, 65536)}
QUICK_SIZES = {"512": (64, 64)}
HEADS, ROUNDS, QUICK_ROUNDS, PROCESS_SECONDS = 3, 20, 3, 60
# A smaller difference than this may be noise.
LEAST_GAIN = 0.02
Record = dict[str, Any]


def measure(device: str, quick: bool) -> list[Record]:
    """Seconds of both passes with the library of this process."""
    import torch

    from anchor_attention import KeyRangeTable, anchor_attention

    from .timing import interleave_cold

    records: list[Record] = []
    for head_dim in HEAD_DIMS[:1] if quick else HEAD_DIMS:
        for size, (n_queries, n_keys) in (QUICK_SIZES if quick else SIZES).items():
            table = KeyRangeTable.from_ranges([(0, n_queries)], [(0, n_keys)])
            q, k, v = (
                torch.randn(1, n, HEADS, head_dim, device=device).to(torch.bfloat16).requires_grad_()
                for n in (n_queries, n_keys, n_keys)
            )
            out = anchor_attention(q, k, v, table)
            grad_out = torch.randn_like(out)

            def forward(_: object, q: Any = q, k: Any = k, v: Any = v, table: Any = table) -> object:
                with torch.no_grad():
                    return anchor_attention(q, k, v, table)

            def backward(_: object, out: Any = out, grad: Any = grad_out, inputs: Any = (q, k, v)) -> object:
                return torch.autograd.grad(out, inputs, grad, retain_graph=True)

            contestants = {FORWARD: forward, BACKWARD: backward}
            for contestant in contestants.values():
                contestant(None)
            seconds = interleave_cold(contestants, [None], QUICK_ROUNDS if quick else ROUNDS, device)
            records += [{"pass": p, "head_dim": head_dim, "size": size, "seconds": own} for p, own in seconds.items()]
    return records


def relevant(name: str, record: Record) -> bool:
    """Whether the variant of this name can change what is measured."""
    variant = next((variant for variant in VARIANTS if variant.name == name), None)
    return variant is None or (record["pass"] == variant.passes and record["head_dim"] in variant.head_dims)


def relative(results: Iterable[tuple[str, Record]]) -> dict[tuple[str, int, str], dict[str, float]]:
    """Median time by pass, head size and size class, of each variant relative to the shipped choice's."""
    seconds: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for name, record in results:
        if relevant(name, record):
            case = (record["pass"], record["head_dim"], record["size"])
            seconds.setdefault(case, {}).setdefault(name, []).extend(record["seconds"])
    found = {}
    for case, own in seconds.items():
        if SHIPPED in own:
            base = statistics.median(own[SHIPPED])
            found[case] = {name: statistics.median(times) / base for name, times in own.items()}
    return found


def table(results: Iterable[tuple[str, Record]]) -> str:
    """The page: what wins, then all."""
    cases = relative(results)
    lines = ["# Variants of tiles and rules", "", "Time relative to the shipped choice; below one is faster.", ""]
    lines += ["| pass | head size | size | best | time |", "|---|---|---|---|---|"]
    for (kernel_pass, head_dim, size), times in cases.items():
        best = min(times, key=lambda name: times[name])
        best = best if times[best] <= 1 - LEAST_GAIN else SHIPPED
        lines.append(f"| {kernel_pass} | {head_dim} | {size} | {best} | {times[best]:.3f} |")
    lines += ["", "| variant | " + " | ".join(" ".join(map(str, case)) for case in cases) + " |"]
    lines.append("|---" * (len(cases) + 1) + "|")
    names = dict.fromkeys(name for times in cases.values() for name in times)
    for name in names:
        cells = (f"{times[name]:.3f}" if name in times else "" for times in cases.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sweep(libraries: Sequence[Path], out: Path, seconds: float, device: str, quick: bool) -> list[tuple[str, Record]]:
    """Measures each library twice while the time lasts."""
    end = time.monotonic() + seconds
    results: list[tuple[str, Record]] = []
    lost: list[str] = []
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.sweep", "--measure", "--device", device, *["--quick"] * quick]
    for library in (*libraries, *reversed(libraries)):
        left = end - time.monotonic()
        if left <= 0:
            lost.append(f"{library.stem}: no time left")
            continue
        print(f"next: {library.stem}", flush=True)
        variables = {"ANCHOR_ATTENTION_LIBRARY": str(library)}
        try:
            process = subprocess.run(
                command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
                timeout=min(PROCESS_SECONDS, left), check=True,
            )  # fmt: skip
            results += [(library.stem, record) for record in json.loads(process.stdout.splitlines()[-1])]
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            lost.append(f"{library.stem}: {error} {error.stderr or ''}")
            print(f"LOST: {lost[-1]}", flush=True)
        write_json(out / "sweep.json", {"results": results, "lost": lost})
        (out / "sweep.md").write_text(table(results))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sweep", description=__doc__.splitlines()[0])
    command.add_argument("folder", nargs="?", type=Path, default=LIBRARIES)
    command.add_argument("--out", type=Path, default=ROOT / "build" / "sweep")
    command.add_argument("--minutes", type=float, default=8.0)
    command.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    command.add_argument("--quick", action="store_true", help="tiny sizes, for a dry run")
    command.add_argument(
        "--measure", action="store_true", help="measure the library of this process; prints a line of JSON"
    )
    options = command.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.device, options.quick)))
        return
    libraries = sorted(options.folder.glob("*.so"), key=lambda path: (path.stem != SHIPPED, path.stem))
    if not libraries or libraries[0].stem != SHIPPED:
        raise SystemExit(
            f"{options.folder} has no {SHIPPED}.so: make the libraries with python -m benchmarks.gpu.variants"
        )
    sweep(libraries, options.out, 60 * options.minutes, options.device, options.quick)
    print((options.out / "sweep.md").read_text())


if __name__ == "__main__":
    main()
