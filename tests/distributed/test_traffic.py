"""Bytes that processes send are those of the formulas, and the documentation's table is the script's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.distributed.traffic import Traffic

from anchor_attention import KeyRangeTable
from anchor_attention.distributed import ShardedTable, sharded_attention
from tests.distributed.processes import Processes, bytes_sent

ROOT = Path(__file__).parents[2]
KEYS = [1000, 600, 1000, 400]
HEADS, WIDTH, V_WIDTH = 8, 32, 16
# Headers and barriers of gloo: some hundred bytes for each message.
OVERHEAD = 8192


def measured(mesh: Any, case: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that this process sent: forward, and in the backward."""
    rank, keys, group = mesh.get_local_rank(), KEYS[: mesh.size()], mesh.get_group()
    replicated = case == "replicated"
    n = sum(keys) if replicated else keys[rank]
    q = torch.randn(1, 50, HEADS, WIDTH, dtype=dtype)
    k = torch.randn(1, n, HEADS, WIDTH, dtype=dtype, requires_grad=True)
    v = torch.randn(1, n, HEADS, V_WIDTH, dtype=dtype, requires_grad=True)
    reads = KeyRangeTable.from_ranges([[0, 50]], [[0, sum(keys)]])
    table = ShardedTable.agree(reads, k, v, mesh, replicated=replicated, case=None if replicated else case)
    dist.barrier(group)
    begin = bytes_sent()
    out = sharded_attention(q, k, v, table)
    dist.barrier(group)
    forward = bytes_sent() - begin
    out.sum().backward()
    dist.barrier(group)
    return forward, bytes_sent() - begin - forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["replicated", "gathered", "ring"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_are_those_of_the_formulas(four: Processes, world: int, case: str, dtype: torch.dtype) -> None:
    keys = KEYS[:world]
    traffic = Traffic([sum(keys)] * world if case == "replicated" else keys, HEADS * (WIDTH + V_WIDTH), dtype.itemsize)
    sent = four.run(measured, world, case, dtype)
    for rank, (forward, backward) in enumerate(sent):
        assert 0 <= forward - traffic.forward(case, rank) <= OVERHEAD
        # gloo makes a reduce-scatter of an all-reduce, whose second half sends as much again.
        expected = traffic.backward(case, rank) * (2 if case == "gathered" else 1)
        # An all-reduce of a number of elements that the processes do not divide is cut unevenly.
        assert abs(backward - expected) <= OVERHEAD
    assert world == 1 or all(backward > 10 * OVERHEAD for _, backward in sent)


def test_the_table_of_the_documentation_is_that_of_the_script() -> None:
    command = [sys.executable, "-m", "benchmarks.distributed.traffic"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert table in (ROOT / "docs" / "distributed.md").read_text()
