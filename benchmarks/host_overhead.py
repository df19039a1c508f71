"""Time of a call around its kernels, at a problem with nothing to compute: ``python -m benchmarks.host_overhead``.

Each contestant stands beside what does the same through ``scaled_dot_product_attention``. They take turns in every
round; reported is the median over the rounds. Writes raw JSON and a table to ``benchmarks/results/<device>/``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention import KeyRangeTable, TokenSpec, anchor_attention
from anchor_attention.benchmark import ratios
from anchor_attention.benchmark.timing import quartiles
from anchor_attention.modules import SelfAnchorAttention

from .machine import environment, listing, results_folder, write_results

NAME = "host_overhead"
BUDGETED, BUDGET_MICROSECONDS = "functional forward", 40.0
TOKENS, ANCHORS, HEADS, HEAD_DIM = 12, 8, 1, 8

# Each contestant's peer: the same through torch's own attention.
PEERS = {
    "operation forward": "SDPA forward",
    "functional forward": "SDPA forward",
    "functional forward, recorded": "SDPA forward, recorded",
    "functional forward + backward": "SDPA forward + backward",
    "functional forward, rotated": "SDPA forward",
    "module forward": "linear, SDPA, linear forward",
    "module forward + backward": "linear, SDPA, linear forward + backward",
}


def contestants() -> dict[str, Callable[[], object]]:
    """Calls of one thread's work of about a microsecond, by name."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, HEADS, HEAD_DIM) for n in (TOKENS, ANCHORS, ANCHORS))
    recorded = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    grad = torch.randn_like(q)
    table = KeyRangeTable([0, TOKENS], [0, 1], [0, ANCHORS])
    ranges = (table.q_ranges, table.k_offsets, table.k_ranges)
    q_freqs, k_freqs = (torch.ones(1, n, HEAD_DIM // 2, dtype=torch.complex64) for n in (TOKENS, ANCHORS))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    specs = [TokenSpec("surface_anchors", ANCHORS), TokenSpec("surface_queries", TOKENS - ANCHORS)]
    dim = HEADS * HEAD_DIM
    module = SelfAnchorAttention(dim=dim, num_heads=HEADS, branches=("surface",))
    qkv, proj = module.mixed_attention.qkv, module.mixed_attention.proj
    x = torch.randn(1, TOKENS, dim)

    def by_hand() -> Tensor:
        q, k, v = qkv(x).view(1, TOKENS, 3, HEADS, HEAD_DIM).unbind(2)
        attended: Tensor = proj(sdpa(q, k[:, :ANCHORS], v[:, :ANCHORS]).flatten(2))
        return attended

    grad_y = torch.randn_like(x)
    parameters = list(module.parameters())
    operation = torch.ops.anchor_attention.attention
    return {
        "operation forward": torch.no_grad()(lambda: operation(q, k, v, *ranges)),
        "functional forward": torch.no_grad()(lambda: anchor_attention(q, k, v, table)),
        "functional forward, recorded": lambda: anchor_attention(*recorded, table),
        "functional forward + backward": lambda: torch.autograd.grad(
            anchor_attention(*recorded, table), recorded, grad
        ),
        "functional forward, rotated": torch.no_grad()(
            lambda: anchor_attention(q, k, v, table, q_freqs=q_freqs, k_freqs=k_freqs)
        ),
        "module forward": torch.no_grad()(lambda: module(x, specs)),
        "module forward + backward": lambda: torch.autograd.grad(module(x, specs), parameters, grad_y),
        "SDPA forward": torch.no_grad()(lambda: sdpa(q, k, v)),
        "SDPA forward, recorded": lambda: sdpa(*recorded),
        "SDPA forward + backward": lambda: torch.autograd.grad(sdpa(*recorded), recorded, grad),
        "linear, SDPA, linear forward": torch.no_grad()(by_hand),
        "linear, SDPA, linear forward + backward": lambda: torch.autograd.grad(by_hand(), parameters, grad_y),
    }


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds per call of every contestant, one entry for each round, on one thread.

    Args:
        rounds: Rounds in which each contestant has its turn.
        calls: Calls of one turn.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        functions = contestants()
        names = list(functions)
        microseconds: dict[str, list[float]] = {name: [] for name in names}
        for function in functions.values():
            for _ in range(calls):
                function()
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                function = functions[name]
                begin = time.perf_counter()
                for _ in range(calls):
                    function()
                microseconds[name].append((time.perf_counter() - begin) / calls * 1e6)
        return microseconds
    finally:
        torch.set_num_threads(threads)


def markdown(results: dict[str, Any]) -> str:
    """The page of a run."""
    microseconds = results["microseconds"]
    load_before, load_after = results["load_average"]
    run = {
        "load average before and after": f"{load_before:.2f}, {load_after:.2f}; niceness {results['niceness']}",
        "rounds": f"{results['rounds']} of {results['calls']} calls",
    }
    lines = listing(results["environment"] | run)
    lines += [
        f"{TOKENS} queries, {ANCHORS} keys, {HEADS} head of {HEAD_DIM}, float32. Medians (quartiles) over the rounds; "
        "the last column is the median of the quotients inside a round.",
        "",
        "| call | µs | beside it | µs | quotient |",
        "|---|---|---|---|---|",
    ]
    for name, peer in PEERS.items():
        quotient = ratios(microseconds[name], microseconds[peer]).median
        lines.append(
            f"| {name} | {_cell(microseconds[name])} | {peer} | {_cell(microseconds[peer])} | {quotient:.2f} |"
        )
    median = quartiles(microseconds[BUDGETED]).median
    verdict = "kept" if median <= BUDGET_MICROSECONDS else "exceeded"
    lines += ["", f"Budget of `{BUDGETED}`: {BUDGET_MICROSECONDS:.0f} µs, {verdict} ({median:.1f} µs)."]
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    lower, median, upper = quartiles(values)
    return f"{median:.1f} ({lower:.1f} – {upper:.1f})"


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--out", type=Path, help="folder of the results; that of the device when left out")
    options = parser.parse_args(arguments)
    machine = environment(threads=1)
    before = os.getloadavg()[0]
    microseconds = measure(options.rounds, options.calls)
    results = {
        "environment": machine,
        "load_average": [before, os.getloadavg()[0]],
        "niceness": os.nice(0),
        "rounds": options.rounds,
        "calls": options.calls,
        "microseconds": {name: [round(value, 3) for value in values] for name, values in microseconds.items()},
    }
    print(write_results(NAME, results, markdown, options.out or results_folder()))


if __name__ == "__main__":
    main()
