"""Every format against the dense mask, there and back."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from anchor_attention import KeyRangeTable
from anchor_attention.converters import (
    from_block_mask,
    from_dense,
    from_gappy_keys,
    from_prefix,
    to_cu_seqlens,
    to_gappy_keys,
    to_prefix,
    to_ranges,
)


@st.composite
def banded_masks(draw: st.DrawFn) -> torch.Tensor:
    """Groups of equal rows, each reading some ranges; empty groups and empty axes included."""
    n_keys = draw(st.integers(0, 30))
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        row = torch.zeros(n_keys, dtype=torch.bool)
        for _ in range(draw(st.integers(0, 3))):
            begin = draw(st.integers(0, n_keys))
            row[begin : draw(st.integers(begin, n_keys))] = True
        rows += [row] * draw(st.integers(1, 20))
    return torch.stack(rows) if rows else torch.zeros(0, n_keys, dtype=torch.bool)


@given(banded_masks())
def test_dense_masks(mask: torch.Tensor) -> None:
    table = from_dense(mask)
    assert torch.equal(table.to_dense(*mask.shape), mask)
    # It is the shortest table: neighbours differ.
    for (first, keys), (second, other_keys) in itertools.pairwise(table.entries()):
        assert first[1] < second[0] or keys != other_keys
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert from_dense(added) == table
    assert from_dense(mask.expand(2, 3, *mask.shape)) == table


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**36 - 1))
def test_any_mask_is_exact(n_queries: int, n_keys: int, bits: int) -> None:
    mask = torch.tensor([bits >> i & 1 for i in range(n_queries * n_keys)], dtype=torch.bool).view(n_queries, n_keys)
    assert torch.equal(from_dense(mask).to_dense(n_queries, n_keys), mask)


def test_masks_that_no_table_can_say() -> None:
    mask = torch.eye(40, dtype=torch.bool)
    with pytest.raises(ValueError, match="not a union of at most max_ranges=39 ranges: row 39"):
        from_dense(mask, max_ranges=39)
    assert len(from_dense(mask, max_ranges=40).entries()) == 40
    cases = [
        (torch.stack((mask, ~mask)), r"\(2, 40, 40\) must not vary over its leading axes"),
        (torch.full((4, 4), 0.5), "only 0 and −inf"),
        (torch.ones(4, 4, dtype=torch.int32), "bool or floating point, got torch.int32"),
        (torch.ones(4, dtype=torch.bool), r"\(\.\.\., queries, keys\), got shape \(4,\)"),
        (torch.ones(0, 4, 4, dtype=torch.bool), "at least one pattern"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            from_dense(wrong)


@given(banded_masks())
def test_paired_ranges(mask: torch.Tensor) -> None:
    table = from_dense(mask)
    q_ranges, k_ranges = to_ranges(table)
    assert q_ranges.dtype == k_ranges.dtype == torch.int32 and q_ranges.shape == k_ranges.shape
    dense = torch.zeros_like(mask)
    for (q_begin, q_end), (k_begin, k_end) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        dense[q_begin:q_end, k_begin:k_end] = True
    assert torch.equal(dense, mask)
    assert KeyRangeTable.from_ranges(q_ranges, k_ranges) == table


samples = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8)


@given(samples)
def test_cu_seqlens(lengths: list[tuple[int, int]]) -> None:
    bounds = [[0, *itertools.accumulate(counts)] for counts in (*zip(*lengths, strict=True),)] or [[0], [0]]
    n_queries, n_keys = bounds[0][-1], bounds[1][-1]
    dense = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for (q_begin, q_end), (k_begin, k_end) in zip(*map(itertools.pairwise, bounds), strict=True):
        dense[q_begin:q_end, k_begin:k_end] = True
    table = KeyRangeTable.from_cu_seqlens(*bounds)
    assert torch.equal(table.to_dense(n_queries, n_keys), dense)
    cu_q, cu_k = to_cu_seqlens(table, n_queries, n_keys)
    assert (cu_q[-1], cu_k[-1]) == (n_queries, n_keys)
    assert KeyRangeTable.from_cu_seqlens(cu_q, cu_k) == table


def test_tables_that_cu_seqlens_can_not_say() -> None:
    for rows in ([[0, 2], [3, 5]], [[3, 5], [0, 3]], [[0, 3], [2, 5]]):
        queries = [[0, 2], [0, 2]] if rows[0] == [0, 2] else [[0, 2], [2, 4]]
        with pytest.raises(ValueError, match="cu_seqlens can't express that the queries"):
            to_cu_seqlens(KeyRangeTable.from_ranges(queries, rows), 4, 5)
    with pytest.raises(ValueError, match="query 4 and key 5, beyond n_queries=3"):
        to_cu_seqlens(KeyRangeTable.from_ranges([[0, 4]], [[0, 5]]), 3, 5)


@given(samples, st.integers(0, 4))
def test_gappy_keys(lengths: list[tuple[int, int]], gap: int) -> None:
    queries = [0, *itertools.accumulate(count for count, _ in lengths)]
    begins = [0, *itertools.accumulate(count + gap for _, count in lengths)]
    counts = [count for _, count in lengths]
    n_queries, n_keys = queries[-1], begins[-1]
    dense = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for i, count in enumerate(counts):
        dense[queries[i] : queries[i + 1], begins[i] : begins[i] + count] = True
    # What xFormers' masks hold.
    mask = SimpleNamespace(
        q_seqinfo=SimpleNamespace(seqstart=torch.tensor(queries, dtype=torch.int32)),
        k_seqinfo=SimpleNamespace(
            seqstart=torch.tensor(begins, dtype=torch.int32), seqlen=torch.tensor(counts, dtype=torch.int32)
        ),
    )
    table = from_gappy_keys(mask.q_seqinfo.seqstart, mask.k_seqinfo.seqstart, mask.k_seqinfo.seqlen)
    assert torch.equal(table.to_dense(n_queries, n_keys), dense)
    assert from_gappy_keys(queries, begins[:-1], counts) == table
    assert from_gappy_keys(*to_gappy_keys(table, n_queries)) == table


def test_gappy_keys_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="got 3, 2 and 1"):
        from_gappy_keys([0, 1, 2], [0, 5], [3])
    with pytest.raises(ValueError, match=r"cu_seqlens_q must have n \+ 1 numbers, the first one 0"):
        from_gappy_keys([1, 2], [0], [3])
    with pytest.raises(ValueError, match="read several ranges"):
        to_gappy_keys(KeyRangeTable.from_ranges([[0, 2], [0, 2]], [[0, 1], [3, 4]]), 2)
    with pytest.raises(ValueError, match="beyond n_queries=1"):
        to_gappy_keys(KeyRangeTable.from_ranges([[0, 2]], [[0, 1]]), 1)


@given(st.integers(0, 20), st.integers(0, 20))
def test_integer_prefixes(first: int, rest: int) -> None:
    n_tokens = first + rest
    dense = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    dense[:first, :first] = True
    dense[first:, :first] = True
    table = from_prefix(n_tokens, first)
    assert torch.equal(table.to_dense(n_tokens, n_tokens), dense)
    assert to_prefix(table, n_tokens) == first


def test_prefixes_that_are_none() -> None:
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"n must be between 0 and n_tokens=3, got {wrong}"):
            from_prefix(3, wrong)
    for table in (
        KeyRangeTable.from_ranges([[0, 2]], [[0, 1]]),
        KeyRangeTable.from_ranges([[0, 3]], [[1, 2]]),
        KeyRangeTable.from_ranges([[0, 1], [1, 3]], [[0, 1], [0, 2]]),
        KeyRangeTable.from_ranges([[0, 3]], [[0, 9]]),
    ):
        with pytest.raises(ValueError, match="a prefix of 3 tokens can't express"):
            to_prefix(table, 3)


@pytest.mark.parametrize("block_size", [16, (16, 32)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(64, 96), (50, 70), (7, 5)])
def test_block_masks(n_queries: int, n_keys: int, block_size: int | tuple[int, int]) -> None:
    def anchors(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.where(q < n_queries // 3, k < n_keys // 2, (k >= n_keys // 4) & (k % 20 < 11))

    block_mask = create_block_mask(anchors, None, None, n_queries, n_keys, device="cpu", BLOCK_SIZE=block_size)
    zero = torch.zeros((), dtype=torch.int64)
    dense = anchors(zero, zero, torch.arange(n_queries)[:, None], torch.arange(n_keys)[None])
    table = from_block_mask(block_mask)
    assert torch.equal(table.to_dense(n_queries, n_keys), dense)
    assert from_block_mask(table.to_block_mask(n_queries, n_keys, block_size=block_size)) == table
    with pytest.raises(ValueError, match="max_ranges=1"):
        from_block_mask(block_mask, max_ranges=1)


def test_block_masks_that_vary_over_samples_are_refused() -> None:
    block_mask = create_block_mask(lambda b, h, q, k: k <= q + b, 2, None, 32, 32, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=r"kv_num_blocks must be for one sample and head"):
        from_block_mask(block_mask)
