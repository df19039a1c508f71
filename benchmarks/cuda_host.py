"""What a call of the CUDA operations costs the host, without a GPU: ``python -m benchmarks.cuda_host``.

The driver is a stand-in that answers at once, so that what is timed is everything but the driver's own work: planning,
tensor maps, the allocation of the workspace by torch, the stream, the device guard. Short batches of calls are timed
many times; the least is what a batch takes that nothing interrupted. Writes one file, which ``--out`` names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tools.cuda_host import run

from .machine import environment

RESULT = Path(__file__).parent / "results" / "emulated" / "cuda_host.json"
# Groups, queries of each, keys, heads, head size.
CASES = {
    "one group": (1, 4096, 1024, 3, 64),
    "4 groups": (4, 4096, 1024, 3, 64),
    "64 groups": (64, 256, 1024, 3, 64),
}
BATCH, BATCHES = 20, 400


def measure() -> list[dict[str, object]]:
    """Microseconds of a call for each case, pass and generation of kernels."""
    rows: list[dict[str, object]] = []
    for generation, capability in (("sm90", (9, 0)), ("sm80", (8, 0))):
        for name, sizes in CASES.items():
            for kernel_pass, backward in (("forward", False), ("backward", True)):
                code = f"""
attention(*{sizes!r}, {backward}, 10)
answer = sorted(attention(*{sizes!r}, {backward}, {BATCH}) / 1e3 for _ in range({BATCHES}))
"""
                times = run(code, capability=capability, quiet=True)
                row = {"kernels": generation, "table": name, "pass": kernel_pass, "least_us": round(times[0], 2)}
                rows.append(row | {"median_us": round(times[len(times) // 2], 2)})
                print(*rows[-1].values(), flush=True)
    return rows


def main() -> None:
    """Runs the command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.cuda_host", description=__doc__)
    command.add_argument("--out", type=Path, default=RESULT)
    arguments = command.parse_args()
    result = {"environment": environment(torch.get_num_threads()), "calls_per_batch": BATCH, "batches": BATCHES}
    arguments.out.write_text(json.dumps(result | {"calls": measure()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
