"""How time grows: with the queries at fixed anchors, and with the threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anchor_attention.benchmark import PASSES, interleave
from anchor_attention.benchmark.operation import FORWARD
from anchor_attention.benchmark.peers import OURS

from .cases import OPERATION, Case, make_contest
from .workloads import CPU, Branch, Workload, by_name

QUERY_COUNTS = (1024, 2048, 4096, 8192, 16384, 32768)
ANCHORS_PER_BRANCH = 512
PEERS = ("eager", "sdpa_per_pattern")


def time_against_queries(rounds: int, device: str = "cpu", counts: tuple[int, ...] = QUERY_COUNTS) -> dict[str, Any]:
    """Seconds of the joint operation by contestant, for growing numbers of queries that read the same anchors."""
    points = []
    for count in counts:
        half = Branch("surface", ANCHORS_PER_BRANCH, count // 2), Branch("volume", ANCHORS_PER_BRANCH, count // 2)
        case = Case(OPERATION, Workload("scaling", 192, 3, half, cached=True), "joint", "float32", FORWARD)
        contest = make_contest(case, PEERS, device)
        seconds = interleave(contest.contestants, contest.make_inputs, rounds=rounds, device=device)
        points.append({"queries": count, "seconds": seconds})
    return {"anchors": 2 * ANCHORS_PER_BRANCH, "points": points}


def time_against_threads(rounds: int, max_threads: int, workload: Workload | None = None) -> dict[str, Any]:
    """Seconds of the joint operation by pass, contestant and thread count, all thread counts in the same rounds."""
    workload = workload or by_name(CPU, ["drivaer_train"])[0]
    counts = sorted({1, *(2**i for i in range(1, 10) if 2**i <= max_threads), max_threads})
    before = torch.get_num_threads()
    result: dict[str, Any] = {"workload": workload.name, "threads": counts, "passes": {}}
    try:
        for passes in PASSES:
            contest = make_contest(Case(OPERATION, workload, "joint", "float32", passes), PEERS)
            contestants = {
                f"{name} {threads}": _on_threads(contestant, threads)
                for threads in counts
                for name, contestant in contest.contestants.items()
            }
            result["passes"][passes] = interleave(contestants, contest.make_inputs, rounds=rounds)
    finally:
        torch.set_num_threads(before)
    return result | {"contestants": [OURS, *PEERS]}


def _on_threads(contestant: Callable[[Any], tuple[Tensor, ...]], threads: int) -> Callable[[Any], tuple[Tensor, ...]]:
    def run(inputs: Any) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        return contestant(inputs)

    return run
