"""What travels between processes, by formula: the bytes that each one sends, and the seconds that they take.

    python -m benchmarks.distributed.traffic                     # the table of docs/distributed.md

``tests/distributed/test_traffic.py`` holds the bytes to what the sockets of real processes count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from anchor_attention.distributed import GATHER_LIMIT

# Gradients travel in float32.
SUM_BYTES = 4
# Multiply-adds of the products of a pass, counted twice: scores and outputs; in the backward five products.
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10


@dataclass(frozen=True)
class Traffic:
    """What attention sends in one layer.

    Args:
        keys: Keys that travel from each process.
        row_elements: Elements of one token's keys and values: batch · heads · (D + Dv).
        element_bytes: Bytes of an element.
    """

    keys: Sequence[int]
    row_elements: int
    element_bytes: int

    def gathered_bytes(self) -> int:
        """Bytes of the gathered keys and values on every process, padding included: what ``gather_limit`` limits."""
        return len(self.keys) * max(self.keys) * self.row_elements * self.element_bytes

    def forward(self, case: str, rank: int) -> int:
        """Bytes that a process sends in the forward."""
        processes, row = len(self.keys), self.row_elements * self.element_bytes
        if case == "gathered":
            return (processes - 1) * max(self.keys) * row
        # Every block but that of the next process passes through: that one is where it ends.
        return (sum(self.keys) - self.keys[(rank + 1) % processes]) * row if case == "ring" else 0

    def backward(self, case: str, rank: int) -> int:
        """Bytes that a process sends in the backward. ``keys`` are all keys, once, where they are replicated."""
        processes, row = len(self.keys), self.row_elements * SUM_BYTES
        if processes == 1:
            return 0
        if case == "gathered":
            return (processes - 1) * max(self.keys) * row
        if case == "ring":
            return self.forward(case, rank) + sum(self.keys) * row
        # A ring of sums and a ring of results.
        return 2 * (processes - 1) * max(self.keys) * row // processes


def attention_flops(queries: int, keys: int, dim: int, factor: int) -> int:
    """Operations of one layer on one process: every query reads ``keys`` keys."""
    return factor * queries * keys * dim


def table(
    processes: int, points: int, anchors: int, dim: int, rates: Sequence[float], latency: float, flops: float
) -> str:
    """One layer of two domains of ``anchors`` anchors each, bfloat16, joint attention, in Markdown.

    Args:
        processes: GPUs.
        points: Queries of all processes.
        anchors: Anchors of each domain.
        dim: Width of the tokens.
        rates: Bytes per second of one GPU's network.
        latency: Seconds of one step of a collective.
        flops: Operations per second that attention reaches on one GPU.
    """
    keys = -(-2 * anchors // processes)
    traffic = Traffic([keys] * processes, 2 * dim, 2)
    queries = -(-points // processes) + keys
    # With replicated anchors every process has all keys.
    everywhere = Traffic([2 * anchors] * processes, 2 * dim, 2)
    lines = [
        f"{processes:,} GPUs, {points:.0e} points, {anchors:.0e} anchors in each of two domains, {dim} wide, bfloat16; "
        f"{flops / 1e12:.0f} TFLOP/s and {latency * 1e6:.0f} µs a message are".replace("e+0", "e"),
        "assumed.",
        "",
        "| case | pass | sent by a process | " + " | ".join(f"at {rate / 1e9:.0f} GB/s" for rate in rates)
        + " | computes | what bounds |",
        "| --- | --- | ---: |" + " ---: |" * (len(rates) + 1) + " --- |",
    ]  # fmt: skip
    for case, source, steps in (
        ("replicated", everywhere, 2 * (processes - 1)),
        ("gathered", traffic, processes - 1),
        ("ring", traffic, processes - 1),
    ):
        for name, sent, factor in (
            ("forward", source.forward(case, 0), FORWARD_FLOPS),
            ("backward", source.backward(case, 0), BACKWARD_FLOPS),
        ):
            computes = attention_flops(queries, 2 * anchors, dim, factor) / flops
            # A message takes its latency even where the network is idle otherwise.
            seconds = [sent / rate + steps * latency if sent else 0.0 for rate in rates]
            bound = "computing" if computes >= max(seconds) else "the network"
            columns = [f"{1e3 * second:.1f} ms" for second in seconds]
            lines.append(
                f"| {case} | {name} | {sent / 1e6:,.1f} MB | {' | '.join(columns)} | {computes:.2f} s | {bound} |"
            )
    rows = GATHER_LIMIT // (2 * dim * 2)
    gathered = traffic.gathered_bytes() / 1e6
    lines += [
        "",
        f"Gathered keys and values take {gathered:,.0f} MB on each GPU, and their gradients twice that. The ring takes",
        f"over automatically above {GATHER_LIMIT / 2**30:.0f} GiB: {rows:,} anchors in all domains together.",
    ]
    for rate in rates:
        # A step of the ring hides what travels where the queries of a process compute longer with a block.
        hidden = flops / rate * 2 * 2 / FORWARD_FLOPS
        lines.append(
            f"At {rate / 1e9:.0f} GB/s computation hides the transfer of a block from {hidden:,.0f} queries per GPU on."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1024, help="GPUs")
    parser.add_argument("--points", type=int, default=10**9, help="queries of all processes")
    parser.add_argument("--anchors", type=int, default=10**5, help="anchors of each of two domains")
    parser.add_argument("--dim", type=int, default=256, help="width of the tokens")
    parser.add_argument("--rates", type=float, nargs="+", default=[50e9, 400e9], help="bytes per second of a network")
    parser.add_argument("--latency", type=float, default=5e-6, help="seconds of a message")
    parser.add_argument("--flops", type=float, default=400e12, help="operations per second of attention on a GPU")
    print(table(**vars(parser.parse_args())), end="")


if __name__ == "__main__":
    main()
