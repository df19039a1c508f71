"""DTensors: results, gradients and their placements, for every way of sharding that is taken; and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from anchor_attention import KeyRangeTable, anchor_attention
from anchor_attention.distributed import dtensor_attention
from tests.distributed.processes import Processes

BATCH, N_QUERIES, N_KEYS, HEADS, WIDTH = 4, 21, 13, 4, 16
# Float32 results and gradients of order one: other orders of summation.
TOLERANCE = 2e-5
TABLE = KeyRangeTable.from_ranges([[0, 6], [6, 15], [6, 15], [15, 21]], [[2, 9], [0, 3], [7, 12], [2, 9]])
WHOLE, BATCHES, TOKENS, HEAD = Replicate(), Shard(0), Shard(1), Shard(2)


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = (N_QUERIES, N_KEYS, N_KEYS)
    q, k, v = (torch.randn(BATCH, n, HEADS, WIDTH, generator=generator) for n in sizes)
    angles = torch.rand(BATCH, N_QUERIES + N_KEYS, WIDTH // 2, generator=generator) * 6
    freqs = torch.polar(torch.ones_like(angles), angles)
    mask = torch.rand(BATCH, N_KEYS, generator=generator) < 0.8
    weight = torch.randn(BATCH, N_QUERIES, HEADS, WIDTH, generator=generator)
    return q, k, v, freqs[:, :N_QUERIES], freqs[:, N_QUERIES:], mask, weight


def sharded(mesh: Any, shape: tuple[int, ...], q_places: Any, k_places: Any, case: str | None) -> Any:
    if len(shape) > 1:
        mesh = init_device_mesh("cpu", shape)
    q, k, v, q_freqs, k_freqs, mask, weight = inputs()
    leaves = [
        distribute_tensor(tensor, mesh, places).requires_grad_()
        for tensor, places in ((q, q_places), (k, k_places), (v, k_places))
    ]
    out = dtensor_attention(*leaves, TABLE, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=mask, case=case)
    assert out.placements == tuple(q_places) and out.shape == weight.shape
    (out * distribute_tensor(weight, mesh, q_places)).sum().backward()
    assert all(leaf.grad.placements == leaf.placements for leaf in leaves)
    return [out.full_tensor().detach(), *(leaf.grad.full_tensor() for leaf in leaves)]


@pytest.mark.parametrize(
    ("shape", "q_places", "k_places", "case"),
    [
        ((4,), [TOKENS], [TOKENS], "gathered"),
        ((3,), [TOKENS], [TOKENS], "ring"),
        ((3,), [TOKENS], [WHOLE], None),
        ((4,), [HEAD], [HEAD], None),
        ((4,), [BATCHES], [BATCHES], None),
        ((2,), [WHOLE], [WHOLE], None),
        # Tensor parallelism over heads beside tokens that are spread.
        ((2, 2), [HEAD, TOKENS], [HEAD, TOKENS], "gathered"),
        ((2, 2), [HEAD, TOKENS], [HEAD, TOKENS], "ring"),
        ((2, 2), [TOKENS, BATCHES], [WHOLE, BATCHES], None),
    ],
)
def test_results_are_those_of_plain_tensors(
    four: Processes, shape: tuple[int, ...], q_places: Any, k_places: Any, case: str | None
) -> None:
    q, k, v, q_freqs, k_freqs, mask, weight = inputs()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = anchor_attention(*leaves, TABLE, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=mask)
    (out * weight).sum().backward()
    expected = [out.detach(), *(leaf.grad for leaf in leaves)]
    for found in four.run(sharded, math.prod(shape), shape, q_places, k_places, case):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("q_places", "k_places", "message"),
    [
        ([TOKENS], [HEAD], "q, k and v must be sharded alike"),
        ([WHOLE], [TOKENS], "q, k and v must be sharded alike"),
        ([Shard(3)], [Shard(3)], "q, k and v must be sharded alike"),
        ([Partial()], [WHOLE], "q, k and v must be sharded alike"),
    ],
)
def test_other_placements_are_refused(four: Processes, q_places: Any, k_places: Any, message: str) -> None:
    for outcome in four.outcomes(refused, 2, q_places, k_places):
        assert re.match(f"ValueError: {message}", str(outcome)), outcome


def refused(mesh: Any, q_places: Any, k_places: Any) -> None:
    q = DTensor.from_local(torch.zeros(1, 4, 2, 8), mesh, q_places)
    k = DTensor.from_local(torch.zeros(1, 4, 2, 8), mesh, k_places)
    dtensor_attention(q, k, k, TABLE)


def test_plain_tensors_are_refused() -> None:
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="q must be a DTensor, got Tensor"):
        dtensor_attention(x, x, x, TABLE)  # type: ignore[arg-type]
