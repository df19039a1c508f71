"""Shapes at the edges: few queries, few keys, tiny groups, nested ranges; test_instruction_sets.py runs it, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from anchor_attention import KeyRangeTable, anchor_attention, use_backend
from tests.generators import AttentionInputs, strided
from tests.oracle import assert_as_good_as_plain, fused, plain_attention, reference, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _nested(n: int) -> KeyRangeTable:
    """Prefixes, and ranges that begin everywhere: no multiple of any alignment."""
    return KeyRangeTable(
        [x for i in range(n) for x in (2 * i, 2 * i + 1)],
        range(n + 1),
        [x for i in range(n) for x in ((0, 3 * i + 1) if i % 2 else (i, 3 * n))],
    )


# Queries, keys, heads, size of a head, table.
SHAPES = {
    "few_queries": (33, 3001, 1, 32, KeyRangeTable.from_ranges([[0, 33]], [[0, 3001]])),
    "two_tiles_of_parts": (
        80, 2600, 1, 16, KeyRangeTable.from_ranges([[0, 1], [5, 80], [5, 80]], [[3, 2599], [7, 1303], [900, 2411]])
    ),
    "few_keys": (700, 9, 2, 16, KeyRangeTable.from_ranges([[0, 700]], [[0, 9]])),
    "tiny_samples": (520, 520, 1, 16, KeyRangeTable.from_cu_seqlens(range(0, 521, 13), range(0, 521, 13))),
    "nested": (120, 180, 1, 16, _nested(60)),
    "wide_head": (70, 131, 1, 256, KeyRangeTable.from_ranges([[0, 70]], [[0, 131]])),
}  # fmt: skip


@pytest.fixture(params=[1, 3], ids=["one_thread", "three_threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("masked", [False, True], ids=["all_keys", "key_mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_passes_match_float64_and_repeat(shape: str, dtype: torch.dtype, masked: bool) -> None:
    n_queries, n_keys, heads, head_dim, table = SHAPES[shape]
    q, k, v, grad_out = (
        strided(1, n, heads, head_dim, dtype, "packed") for n in (n_queries, n_keys, n_keys, n_queries)
    )
    inputs = AttentionInputs(q, k, v, table, grad_out)
    if masked:
        inputs.key_mask = torch.rand(1, n_keys) < 0.8
    result, again = run(fused, inputs), run(fused, inputs)
    assert all(torch.equal(result[name], again[name]) for name in result)
    exact = run(reference, inputs.to(torch.float64))
    assert_as_good_as_plain(result, exact, run(plain_attention, inputs), inputs)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("wanted", ["qkv", "q", "k", "v", "kv"])
@pytest.mark.parametrize("n_queries", [40, 600])
def test_gradients_reach_every_key_of_every_sample(n_queries: int, wanted: str) -> None:
    """Where few queries read many keys, these come and go in pieces: whoever writes a piece also writes what lies
    unread before and behind it, in samples of which a mask leaves nothing or the end alone, too. Samples of 600 queries
    that read few keys are finished tile by tile, and so are those of which no key is left."""
    batch, n_keys, heads, kv_heads, head_dim, value_dim = 4, 2900, 4, 2, 24, 40
    table = KeyRangeTable.from_ranges([[3, 30], [3, 30], [30, 39]], [[500, 501], [520, 2200], [1000, 1400]])
    if n_queries == 600:
        table = KeyRangeTable.from_ranges([[3, 301], [301, 600]], [[500, 560], [20, 90]])
    q = torch.randn(batch, n_queries, heads, head_dim, dtype=torch.float64)
    k = torch.randn(batch, n_keys, kv_heads, head_dim, dtype=torch.float64)
    v = torch.randn(batch, n_keys, kv_heads, value_dim, dtype=torch.float64)
    key_mask = torch.ones(batch, n_keys, dtype=torch.bool)
    key_mask[[0, 2]] = False
    key_mask[3, :1390] = False
    leaves = {"q": q, "k": k, "v": v}
    moving = [leaves[name].requires_grad_() for name in wanted]
    grad_out = torch.randn(batch, n_queries, heads, value_dim, dtype=torch.float64)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(anchor_attention(q, k, v, table, key_mask=key_mask), moving, grad_out)

    found, again = gradients(), gradients()
    with use_backend("reference"):
        exact = gradients()
    for one, other, truth in zip(found, again, exact, strict=True):
        assert torch.equal(one, other)
        assert (one - truth).abs().max() <= 1e-12 * truth.abs().max()
        assert torch.equal(one[[0, 2]], torch.zeros_like(one[[0, 2]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_without_sense_reaches_its_readers_alone(dtype: torch.dtype) -> None:
    """Where ranges share a block of keys, a product with zero would not keep NaN out."""
    n_queries, n_keys, heads, head_dim, table = SHAPES["nested"]
    dense = table.to_dense(n_queries, n_keys)
    for key in (40, 41, 179):
        q, k, v = (
            torch.randn(1, n, heads, head_dim, dtype=dtype, requires_grad=True) for n in (n_queries, n_keys, n_keys)
        )
        k.data[0, key], v.data[0, key] = torch.nan, torch.nan
        out = anchor_attention(q, k, v, table)
        assert torch.equal(out.isnan().any(-1)[0, :, 0], dense[:, key])
        untouched = ~dense[:, key]
        grads = torch.autograd.grad(out[:, untouched].sum(), (q, k, v))
        assert torch.equal(
            grads[0].isfinite().all(-1)[0, :, 0] | dense[:, key], torch.ones(n_queries, dtype=torch.bool)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_without_a_finite_score(dtype: torch.dtype) -> None:
    """Scores of −inf in a whole part of the keys weigh nothing; in all of them they give 0, as without keys."""
    q = torch.ones(1, 40, 1, 16, dtype=dtype)
    k = torch.ones(1, 3000, 1, 16, dtype=dtype)
    v = torch.randn(1, 3000, 1, 16, dtype=dtype)
    table = KeyRangeTable.from_ranges([[0, 40]], [[0, 3000]])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        k[:, 5:2990] = -torch.inf
        out, lse = anchor_attention(q, k, v, table, return_lse=True)
        kept = torch.cat([v[:, :5], v[:, 2990:]], 1).double().mean(1, keepdim=True)
        assert (out.double() - kept).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()
        assert lse.isfinite().all()
        k[:] = -torch.inf
        out, lse = anchor_attention(q, k, v, table, return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()
    finally:
        torch.set_num_threads(threads)
