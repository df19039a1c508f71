"""Queries through a cache of the anchors: ``python -m benchmarks.cached_query``.

A small anchored-branch model (blocks of self, cross and joint anchor attention, each with a feed-forward network)
decodes query points in three ways: in one pass, in chunks that encode the anchors anew each time, and streamed against
the cache of one encoding. Their times are taken in turns. Then the peak memory of a fresh process that streams N
queries, for N over three decades, points coming from an iterator and outputs going to a function.

Writes raw JSON, a table and a plot to ``benchmarks/results/<device>/``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention import TokenSpec
from anchor_attention.benchmark import interleave, ratios
from anchor_attention.benchmark.timing import quartiles
from anchor_attention.modules import CrossAnchorAttention, JointAnchorAttention, RopeFrequency, SelfAnchorAttention
from anchor_attention.streaming import Cache, record, replay, stream

from .machine import environment, listing, results_folder

BRANCHES = ("surface", "volume")
MEMORY_QUERIES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
NAME = "cached_query_streaming"


class AnchoredModel(nn.Module):
    """Points (B, N, 3) of each group in, three numbers at each of them out."""

    def __init__(self, dim: int, heads: int, blocks: str) -> None:
        super().__init__()
        classes = {"s": SelfAnchorAttention, "c": CrossAnchorAttention, "j": JointAnchorAttention}
        self.rope = RopeFrequency(dim // heads, 3)
        self.embedding = nn.Linear(3, dim)
        self.attention = nn.ModuleList(
            classes[letter](dim=dim, num_heads=heads, branches=BRANCHES, use_rope=True, init_weights="torch")
            for letter in blocks
        )
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in blocks
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in blocks)
        self.head = nn.Linear(dim, 3)

    def forward(self, groups: dict[str, Tensor]) -> dict[str, Tensor]:
        """Groups of points in, groups of values out."""
        sizes = [points.shape[1] for points in groups.values()]
        points = torch.cat(tuple(groups.values()), dim=1)
        specs = [TokenSpec(name, size) for name, size in zip(groups, sizes, strict=True)]
        x, freqs = self.embedding(points), self.rope(points)
        for attention, norm, mlp in zip(self.attention, self.norm, self.mlp, strict=True):
            x = x + attention(norm(x), specs, freqs)
            x = x + mlp(x)
        return dict(zip(groups, self.head(x).split(sizes, dim=1), strict=True))

    def encode(self, anchors: dict[str, Tensor]) -> Cache:
        """The cache of all layers of the anchors."""
        with torch.no_grad(), record(self) as caches:
            self(anchors)
        return Cache(caches)

    def decode(self, cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values at query points."""
        with replay(self, cache):
            values = self({f"{branch}_queries": points for branch, points in chunk.items()})
        return {name.removesuffix("_queries"): value for name, value in values.items()}


def random_points(n: int) -> dict[str, Tensor]:
    """Points (1, n, 3) of both branches, in a box of the size of a car."""
    return {branch: torch.rand(1, n, 3) * torch.tensor([4.0, 2.0, 1.5]) for branch in BRANCHES}


def grouped(anchors: dict[str, Tensor], queries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Anchors and queries of each branch, one behind the other."""
    groups = {}
    for branch in BRANCHES:
        groups |= {f"{branch}_anchors": anchors[branch], f"{branch}_queries": queries[branch]}
    return groups


def throughput(n_anchors: int, n_queries: int, chunk_size: int, model: AnchoredModel, rounds: int) -> dict[str, Any]:
    """Seconds of the three ways in every round, and how far their results are apart."""

    @torch.no_grad()
    def one_pass(inputs: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        values = model(grouped(*inputs))
        return {branch: values[f"{branch}_queries"] for branch in BRANCHES}

    @torch.no_grad()
    def encoding_anew(inputs: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        anchors, queries = inputs
        parts: dict[str, list[Tensor]] = {branch: [] for branch in BRANCHES}
        for begin in range(0, n_queries, chunk_size):
            chunk = {branch: points[:, begin : begin + chunk_size] for branch, points in queries.items()}
            values = model(grouped(anchors, chunk))
            for branch in BRANCHES:
                parts[branch].append(values[f"{branch}_queries"])
        return {branch: torch.cat(values, dim=1) for branch, values in parts.items()}

    def streamed(inputs: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        anchors, queries = inputs
        cache = model.encode({f"{branch}_anchors": points for branch, points in anchors.items()})
        outputs: dict[str, Tensor] = stream(model.decode, cache, queries, chunk_size=chunk_size).outputs
        return outputs

    ways = {"streamed": streamed, "encoding anew": encoding_anew, "one pass": one_pass}
    inputs = (random_points(n_anchors), random_points(n_queries))
    results = {name: way(inputs) for name, way in ways.items()}
    scale = max(value.abs().max().item() for value in results["one pass"].values())
    difference = max(
        (results[name][branch] - results["one pass"][branch]).abs().max().item() / scale
        for name in ("streamed", "encoding anew")
        for branch in BRANCHES
    )
    seconds = interleave(ways, lambda: (random_points(n_anchors), random_points(n_queries)), rounds=rounds)
    return {
        "anchors": n_anchors,
        "queries": 2 * n_queries,
        "chunk_size": chunk_size,
        "relative_difference": difference,
        "seconds": seconds,
    }


def stream_and_forget(n_queries: int, chunk_size: int) -> dict[str, float]:
    """Streams N points of one branch in this process; returns its peak memory."""
    torch.manual_seed(0)
    model = AnchoredModel(32, 1, "c").eval()
    cache = model.encode({f"{branch}_anchors": points for branch, points in random_points(128).items()})

    def chunks() -> Iterator[dict[str, Tensor]]:
        for begin in range(0, n_queries, chunk_size):
            yield {"volume": torch.rand(1, min(chunk_size, n_queries - begin), 3)}

    total = torch.zeros(3, dtype=torch.float64)
    begin = time.perf_counter()
    stream(model.decode, cache, chunks(), lambda outputs, rows: total.add_(outputs["volume"].double().sum((0, 1))))
    seconds = time.perf_counter() - begin
    # Not the peak of getrusage, which begins with what the parent had when it made this process.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if peak is None:
        raise OSError("/proc/self/status does not tell the peak memory")
    return {"queries": n_queries, "peak_bytes": 1024 * int(peak.group(1)), "seconds": seconds}


def memory(most: int, chunk_size: int, threads: int) -> list[dict[str, float]]:
    """Peak memory of a fresh process for each number of queries."""
    records = []
    for n_queries in (n for n in MEMORY_QUERIES if n <= most):
        command = [sys.executable, "-m", __spec__.name, "--child", str(n_queries)]
        command += ["--memory-chunk", str(chunk_size), "--threads", str(threads)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        records.append(json.loads(run.stdout))
        print(f"{n_queries:>10,} queries: {records[-1]['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    return records


def report(folder: Path, about: dict[str, Any], speed: dict[str, Any], peaks: list[dict[str, float]]) -> None:
    """Writes the raw figures, the table and the plot."""
    (folder / f"{NAME}.json").write_text(
        json.dumps({"environment": about, "throughput": speed, "memory": peaks}, indent=1) + "\n"
    )
    seconds = speed["seconds"]
    lines = listing(about)
    lines += [
        f"{speed['queries']} queries, {speed['anchors']} anchors in each of two branches, chunks of "
        f"{speed['chunk_size']} per branch; results agree within {speed['relative_difference']:.1e} of the largest.",
        "",
        "| way | queries per second | time in units of streaming (quartiles) |",
        "|---|---|---|",
    ]
    for name, own in seconds.items():
        low, middle, high = ratios(own, seconds["streamed"])
        rate = speed["queries"] / quartiles(own).median
        lines.append(f"| {name} | {rate:,.0f} | {middle:.2f} ({low:.2f} – {high:.2f}) |")
    lines += ["", "| queries | peak memory of the process, MiB |", "|---|---|"]
    lines += [f"| {int(peak['queries']):,} | {peak['peak_bytes'] / 2**20:.0f} |" for peak in peaks]
    (folder / f"{NAME}.md").write_text("\n".join(lines) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.semilogx([peak["queries"] for peak in peaks], [peak["peak_bytes"] / 2**20 for peak in peaks], "o-")
    axes.set(xlabel="queries", ylabel="peak memory of the process, MiB", ylim=(0, None))
    axes.set_title(f"Streaming, {int(about['memory_chunk']):,} queries a chunk")
    axes.grid(alpha=0.3)
    figure.savefig(folder / f"{NAME}_memory.svg")


def main() -> None:
    """Runs both parts, or a child of the second."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--blocks", default="sc")
    parser.add_argument("--anchors", type=int, default=2048, help="of each branch")
    parser.add_argument("--queries", type=int, default=8192, help="of each branch")
    parser.add_argument("--chunk", type=int, default=2048, help="queries of each branch in a call")
    parser.add_argument("--most", type=int, default=MEMORY_QUERIES[-1], help="queries of the memory plot")
    parser.add_argument("--memory-chunk", type=int, default=8192)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="where to write; the device's folder in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child is not None:
        print(json.dumps(stream_and_forget(arguments.child, arguments.memory_chunk)))
        return
    torch.manual_seed(0)
    model = AnchoredModel(arguments.dim, arguments.heads, arguments.blocks).eval()
    speed = throughput(arguments.anchors, arguments.queries, arguments.chunk, model, arguments.rounds)
    peaks = memory(arguments.most, arguments.memory_chunk, arguments.threads)
    about = environment(arguments.threads) | {
        "rounds": arguments.rounds,
        "dim": arguments.dim,
        "heads": arguments.heads,
        "blocks": arguments.blocks,
        "memory_chunk": arguments.memory_chunk,
    }
    folder = arguments.results or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    report(folder, about, speed, peaks)


if __name__ == "__main__":
    main()
