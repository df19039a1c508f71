"""ShardTensors of PhysicsNeMo, where it is installed or ``make test-physicsnemo`` puts it on the path."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from anchor_attention import KeyRangeTable, anchor_attention
from anchor_attention.integrations.physicsnemo import register_shard_tensor
from tests.distributed.processes import Processes, processes

if importlib.util.find_spec("physicsnemo") is None:
    pytest.skip("needs the package nvidia-physicsnemo: `make test-physicsnemo`", allow_module_level=True)

BATCH, HEADS, WIDTH = 2, 4, 16
# Of the queries and of the keys, by process: uneven, and one without any.
QUERIES, KEYS = (9, 0, 12), (1, 8, 4)
TABLE = KeyRangeTable.from_ranges([[0, 6], [6, 15], [6, 15], [15, 21]], [[2, 9], [0, 3], [7, 12], [2, 9]])
# Float32 results and gradients of order one: other orders of summation.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    with processes(3) as pool:
        yield pool


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    n_queries, n_keys = sum(QUERIES), sum(KEYS)
    q, k, v = (torch.randn(BATCH, n, HEADS, WIDTH, generator=generator) for n in (n_queries, n_keys, n_keys))
    angles = torch.rand(1, n_queries + n_keys, WIDTH // 2, generator=generator) * 6
    freqs = torch.polar(torch.ones_like(angles), angles)
    mask = torch.rand(BATCH, n_keys, generator=generator) < 0.8
    weight = torch.randn(BATCH, n_queries, HEADS, WIDTH, generator=generator)
    return q, k, v, freqs[:, :n_queries], freqs[:, n_queries:], mask, weight


def shard_of(tensor: torch.Tensor, mesh: Any, places: list[Any], sizes: tuple[int, ...]) -> Any:
    """A leaf of a ShardTensor: tokens are cut at ``sizes``, heads evenly."""
    (place,) = places
    parts = [tensor]
    if isinstance(place, Shard):
        parts = list(tensor.split(sizes, 1) if place.dim == 1 else tensor.chunk(mesh.size(), place.dim))
    local = parts[mesh.get_local_rank() % len(parts)].clone()
    # To infer them needs a torch with CUDA.
    shapes = {0: tuple(tuple(part.shape) for part in parts)} if isinstance(place, Shard) else {}
    shard_tensor = importlib.import_module("physicsnemo.domain_parallel").ShardTensor
    return shard_tensor.from_local(local, mesh, places, sharding_shapes=shapes).detach().requires_grad_()


def attend(mesh: Any, q_places: Any, k_places: Any) -> Any:
    register_shard_tensor()
    q, k, v, q_freqs, k_freqs, mask, weight = inputs()
    leaves = [
        shard_of(tensor, mesh, places, sizes)
        for tensor, places, sizes in ((q, q_places, QUERIES), (k, k_places, KEYS), (v, k_places, KEYS))
    ]
    out = anchor_attention(*leaves, TABLE, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=mask)
    assert type(out) is type(leaves[0]) and out.shape == weight.shape and out.placements == tuple(q_places)
    (out.to_local() * shard_of(weight, mesh, q_places, QUERIES).to_local().detach()).sum().backward()
    return [out.to_local().detach(), *(leaf.grad.to_local() for leaf in leaves)]


WHOLE, TOKENS, HEAD = Replicate(), Shard(1), Shard(2)


@pytest.mark.parametrize(
    ("world", "q_places", "k_places"),
    [(3, [TOKENS], [TOKENS]), (3, [TOKENS], [WHOLE]), (2, [HEAD], [HEAD]), (2, [Shard(0)], [Shard(0)])],
)
def test_results_are_those_of_plain_tensors(three: Processes, world: int, q_places: Any, k_places: Any) -> None:
    q, k, v, q_freqs, k_freqs, mask, weight = inputs()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = anchor_attention(*leaves, TABLE, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=mask)
    (out * weight).sum().backward()
    expected = [out.detach(), *(leaf.grad for leaf in leaves)]
    found = three.run(attend, world, q_places, k_places)
    for i, (whole, (place,)) in enumerate(zip(expected, (q_places, q_places, k_places, k_places), strict=True)):
        parts = [those[i] for those in found]
        for part in [torch.cat(parts, place.dim)] if isinstance(place, Shard) else parts:
            torch.testing.assert_close(part, whole, rtol=0, atol=TOLERANCE)


def plain_keys(mesh: Any) -> Any:
    register_shard_tensor()
    q, k, v, *_ = inputs()
    k, v = k.requires_grad_(), v.requires_grad_()
    out = anchor_attention(shard_of(q, mesh, [TOKENS], QUERIES), k, v, TABLE)
    out.to_local().square().sum().backward()
    return [out.to_local().detach(), k.grad, v.grad]


def test_plain_keys_count_as_replicated(three: Processes) -> None:
    q, k, v, *_ = inputs()
    k, v = k.requires_grad_(), v.requires_grad_()
    out = anchor_attention(q, k, v, TABLE)
    out.square().sum().backward()
    found = three.run(plain_keys, 3)
    torch.testing.assert_close(torch.cat([those[0] for those in found], 1), out.detach(), rtol=0, atol=TOLERANCE)
    for _, *grads in found:
        torch.testing.assert_close(grads, [k.grad, v.grad], rtol=0, atol=TOLERANCE)


def plain_queries(mesh: Any) -> Any:
    register_shard_tensor()
    q, k, v, *_ = inputs()
    out = anchor_attention(q, *(shard_of(tensor, mesh, [WHOLE], KEYS) for tensor in (k, v)), TABLE)
    assert out.placements == (WHOLE,)
    return out.to_local().detach()


def test_plain_queries_count_as_replicated(three: Processes) -> None:
    q, k, v, *_ = inputs()
    for found in three.run(plain_queries, 2):
        torch.testing.assert_close(found, anchor_attention(q, k, v, TABLE), rtol=0, atol=TOLERANCE)


def refused(mesh: Any, q_places: Any, k_places: Any, options: dict[str, Any]) -> str:
    register_shard_tensor()
    q, k, v, *_ = inputs()
    leaves = [
        shard_of(tensor, mesh, places, sizes)
        for tensor, places, sizes in ((q, q_places, QUERIES), (k, k_places, KEYS), (v, k_places, KEYS))
    ]
    with pytest.raises(ValueError) as error:
        anchor_attention(*leaves, TABLE, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("q_places", "k_places", "options", "message"),
    [
        ([WHOLE], [TOKENS], {}, "q, k and v must be sharded alike"),
        ([TOKENS], [Shard(0)], {}, "q, k and v must be sharded alike"),
        ([TOKENS], [TOKENS], {"return_lse": True}, "return_lse must be False for ShardTensors, got True"),
        ([TOKENS], [TOKENS], {"scale": torch.tensor(0.3)}, "scale must be a number for ShardTensors"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    three: Processes, q_places: Any, k_places: Any, options: dict[str, Any], message: str
) -> None:
    for found in three.run(refused, 3, q_places, k_places, options):
        assert found.startswith(message)
