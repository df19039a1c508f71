"""How the time of a step falls with the number of processes on one machine, whose cores they share.

    python -m benchmarks.distributed.scaling --out DIR

One attention module, forward and backward, the same tokens cut into more parts; one thread a process. Beside the time
that passes stands the time that one process computes for, gloo's threads included: it does not depend on the cores that
other programs and processes leave.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from anchor_attention import SelfAnchorAttention, TokenSpec
from anchor_attention.distributed import SequenceParallelAttention

DIM, HEADS = 192, 3
CASES = ("gathered", "ring")


def share(n: int, rank: int, processes: int) -> int:
    """How many of n tokens a process has."""
    return n * (rank + 1) // processes - n * rank // processes


def work(rank: int, most: int, counts: list[int], tokens: tuple[int, int], rounds: int, folder: str) -> None:
    """What each process does: all counts in turn in every round, in the processes that take part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=most)
    steps: dict[str, Any] = {}
    for count in counts:
        group = dist.new_group(list(range(count)))
        if rank >= count:
            continue
        mesh = DeviceMesh.from_group(group, "cpu")
        sizes = [share(n, rank, count) for n in tokens]
        x = torch.randn(1, sum(sizes), DIM)
        specs = [TokenSpec(name, n) for name, n in zip(("volume_anchors", "volume_queries"), sizes, strict=True)]
        for case in CASES:
            module = SelfAnchorAttention(dim=DIM, num_heads=HEADS, branches=("volume",))
            parallelize_module(module, mesh, SequenceParallelAttention(case=case, agree="once"))
            steps[f"{case} {count}"] = (module, x, specs)
    seconds: dict[str, dict[str, list[float]]] = {"passed": {}, "computed": {}}
    for i in range(rounds + 1):
        for count in counts:
            for case in CASES:
                dist.barrier()
                if rank >= count:
                    continue
                module, x, specs = steps[f"{case} {count}"]
                begin, begin_computed = time.perf_counter(), time.process_time()
                module(x, specs).sum().backward()
                if i:
                    found = {"passed": time.perf_counter() - begin, "computed": time.process_time() - begin_computed}
                    for kind, value in found.items():
                        seconds[kind].setdefault(f"{case} {count}", []).append(value)
    dist.barrier()
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))


def run(counts: list[int], tokens: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Times every number of processes, and returns the seconds of every round by case and number."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (max(counts), counts, tokens, rounds, folder), nprocs=max(counts))
        seconds = json.loads((Path(folder) / "seconds.json").read_text())
    cores = len(os.sched_getaffinity(0))
    return {"anchors": tokens[0], "queries": tokens[1], "cores": cores, "counts": counts, "seconds": seconds}


def speedups(result: dict[str, Any], case: str, kind: str) -> list[float]:
    """By number of processes: the median over the rounds of the ratio to one process within the round.

    ``kind``: of the time that ``"passed"``, or that one process ``"computed"`` for.
    """
    seconds = result["seconds"][kind]
    return [
        statistics.median(a / b for a, b in zip(seconds[f"{case} 1"], seconds[f"{case} {count}"], strict=True))
        for count in result["counts"]
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes the speed by number of processes as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5))
    counts = result["counts"]
    axes.plot(counts, counts, ":", color="gray", label="as many times")
    for case, color in zip(CASES, ("#d1495b", "#30638e"), strict=True):
        axes.plot(counts, speedups(result, case, "passed"), "o-", color=color, label=f"{case}, time that passed")
        axes.plot(counts, speedups(result, case, "computed"), "x--", color=color, label=f"{case}, time of one process")
    axes.set_xticks(counts)
    axes.set_xlabel(f"processes, on {result['cores']} cores")
    axes.set_ylabel("one process to several")
    axes.set_title(f"{result['anchors']:,} anchors, {result['queries']:,} queries, forward and backward", fontsize=9)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of processes, 1 first")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", type=Path, help="folder for scaling.json and scaling.png")
    arguments = parser.parse_args()
    result = run(arguments.counts, (64, 256) if arguments.quick else (2048, 16384), arguments.rounds)
    for case in CASES:
        for kind in ("passed", "computed"):
            ratios = zip(result["counts"], speedups(result, case, kind), strict=True)
            numbers = ", ".join(f"{count}: {ratio:.2f}" for count, ratio in ratios)
            print(f"{case}, one process to several on {result['cores']} cores, time {kind}: {numbers}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(result, arguments.out / "scaling.png")


if __name__ == "__main__":
    main()
