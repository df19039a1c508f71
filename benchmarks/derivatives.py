"""Cost of tangents and of second derivatives, in forwards: ``python -m benchmarks.derivatives``.

Processor time of one thread: every contestant has its turn in every round, and reported is the median over the rounds
of the ratio within a round. Beside them stand central differences, which take two forwards for each tangent, and, at
the size for which it has the memory, plain PyTorch: the attention of matrices (math SDPA), which can be differentiated
twice. Writes raw JSON and a table to ``benchmarks/results/<device>/``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from anchor_attention import KeyRangeTable, anchor_attention, anchor_attention_jvp
from anchor_attention.benchmark.timing import quartiles

from .machine import environment, listing, results_folder, write_results
from .memory import map_large_blocks, peak_of

NAME = "derivatives"
HEADS, HEAD_DIM = 2, 64
# Queries and keys. At the last one plain PyTorch takes part: each of its matrices takes 32 MiB there.
SIZES = ((8192, 8192), (8192, 1024), (2048, 2048))
STEP = 1e-3

Contestants = dict[str, Callable[[], object]]


def contestants(queries: int, keys: int, with_plain: bool) -> Contestants:
    """Calls by name, on inputs of their own; what is differentiated twice has its graph made before."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, HEADS, HEAD_DIM) for n in (queries, keys, keys))
    table = KeyRangeTable.from_ranges([[0, queries]], [[0, keys]])
    along = torch.randn(3, *q.shape)
    directions = tuple(torch.randn_like(tensor) for tensor in (q, k, v))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    grad_out = torch.randn_like(q).requires_grad_()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anchor_attention(q, k, v, table)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)

    def of(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contestants:
        def forward() -> Tensor:
            return attend(q, k, v)

        def tangents() -> object:
            return vmap(lambda t: jvp(lambda q: attend(q, k, v), (q,), (t,)), out_dims=(None, 0))(along)

        def gradients() -> object:
            return torch.autograd.grad(attend(*leaves), leaves, grad_out.detach())

        first = torch.autograd.grad(attend(*leaves), leaves, grad_out, create_graph=True)

        def second() -> object:
            return torch.autograd.grad(first, [grad_out, *leaves], directions, retain_graph=True)

        return {
            "forward": torch.no_grad()(forward),
            "jvp, 1 tangent": torch.no_grad()(lambda: jvp(lambda q: attend(q, k, v), (q,), (along[0],))),
            "vmap of jvp, 3 tangents": torch.no_grad()(tangents),
            "forward + backward": gradients,
            "double backward": second,
        }

    def differences() -> object:
        shifts = [sign * STEP * along[i] for i in range(3) for sign in (1, -1)]
        return ours(q, k, v), [ours(q + shift, k, v) for shift in shifts]

    fused = of(ours)
    fused["anchor_attention_jvp, 1 tangent"] = torch.no_grad()(lambda: anchor_attention_jvp(q, k, v, table, along[:1]))
    fused["anchor_attention_jvp, 3 tangents"] = torch.no_grad()(lambda: anchor_attention_jvp(q, k, v, table, along))
    fused["value and central differences, 3 directions"] = torch.no_grad()(differences)
    return fused | ({f"plain: {name}": call for name, call in of(plain).items()} if with_plain else {})


def measure(calls: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of one thread's processor time, one entry for each round."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-1, rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            begin = time.thread_time()
            calls[name]()
            if i >= 0:
                seconds[name].append(time.thread_time() - begin)
    return seconds


def run(sizes: tuple[tuple[int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """The raw results of every size; with plain PyTorch at the last one."""

    def calls_of(size: tuple[int, int]) -> Contestants:
        return contestants(*size, with_plain=size == sizes[-1])

    seconds = [measure(calls_of(size), rounds) for size in sizes]
    # Behind all timing, which it would change.
    map_large_blocks()
    peaks = [{name: peak_of(call) for name, call in calls_of(size).items()} for size in sizes]
    return [
        {
            "queries": queries,
            "keys": keys,
            "seconds": {name: [round(value, 6) for value in values] for name, values in of_size.items()},
            "peak_bytes": peak,
        }
        for (queries, keys), of_size, peak in zip(sizes, seconds, peaks, strict=True)
    ]


def _median_ratio(values: list[float], units: list[float]) -> float:
    return quartiles([value / unit for value, unit in zip(values, units, strict=True)]).median


def markdown(results: dict[str, Any]) -> str:
    """The page of a run."""
    lines = listing(results["environment"] | {"rounds": results["rounds"]})
    for case in results["cases"]:
        seconds, peak = case["seconds"], case["peak_bytes"]
        lines += [
            f"{case['queries']} queries, {case['keys']} keys, {HEADS} heads of {HEAD_DIM}, float32:",
            "",
            "| call | ms | in forwards | MiB |",
            "|---|---|---|---|",
        ]
        for name, values in seconds.items():
            ratio = _median_ratio(values, seconds["forward"])
            lines.append(f"| {name} | {1e3 * quartiles(values).median:.1f} | {ratio:.2f} | {peak[name] / 2**20:.0f} |")
        both = _median_ratio(seconds["double backward"], seconds["forward + backward"])
        lines += ["", f"Double backward to forward + backward: {both:.2f}."]
        tangents, differences = "anchor_attention_jvp, 3 tangents", "value and central differences, 3 directions"
        gain = _median_ratio(seconds[tangents], seconds[differences])
        lines.append(f"Three tangents to central differences: {gain:.2f}.")
        for name in ("jvp, 1 tangent", "double backward"):
            if f"plain: {name}" in seconds:
                lines.append(
                    f"Plain PyTorch to ours, {name}: {_median_ratio(seconds[f'plain: {name}'], seconds[name]):.1f}."
                )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.derivatives", description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--out", type=Path, help="folder of the results; that of the device when left out")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = ((64, 64), (64, 16)) if options.quick else SIZES
        machine, before = environment(threads=1), os.getloadavg()[0]
        cases = run(sizes, options.rounds)
    finally:
        torch.set_num_threads(threads)
    results = {
        "environment": machine,
        "load_average": [before, os.getloadavg()[0]],
        "rounds": options.rounds,
        "cases": cases,
    }
    print(write_results(NAME, results, markdown, options.out or results_folder()))


if __name__ == "__main__":
    main()
