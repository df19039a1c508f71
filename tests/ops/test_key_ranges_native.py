"""csrc/key_ranges.cpp, called directly: transpose and compaction."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchor_attention import KeyRangeTable
from tests import native
from tests.generators import tables

N_QUERIES, N_KEYS = 50, 60


@pytest.fixture(scope="module")
def module() -> object:
    return native.load()


def _csr(table: KeyRangeTable) -> tuple[tuple[int, ...], ...]:
    return table.q_ranges, table.k_offsets, table.k_ranges


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _scores(q_ranges: list[int], k_offsets: list[int], k_ranges: list[int]) -> Counter[tuple[int, int]]:
    """How often each (query, key) meets."""
    scores: Counter[tuple[int, int]] = Counter()
    for g, (q_begin, q_end) in enumerate(_pairs(q_ranges)):
        for k_begin, k_end in _pairs(k_ranges)[k_offsets[g] : k_offsets[g + 1]]:
            scores.update((query, key) for query in range(q_begin, q_end) for key in range(k_begin, k_end))
    return scores


@given(table=tables(N_QUERIES, N_KEYS))
def test_transpose_holds_the_same_scores(module: object, table: KeyRangeTable) -> None:
    k_ranges, q_offsets, q_ranges = module.transpose(*_csr(table))
    scores = _scores(list(table.q_ranges), list(table.k_offsets), list(table.k_ranges))
    assert _scores(k_ranges, q_offsets, q_ranges) == Counter({(key, query): n for (query, key), n in scores.items()})
    entries = _pairs(k_ranges)
    assert all(begin < end for begin, end in entries)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(entries)), "ascending, disjoint"
    assert module.area(*_csr(table)) == scores.total() == table.area()


@given(
    table=tables(N_QUERIES, N_KEYS),
    alignment=st.sampled_from([1, 2, 16]),
    mask=st.none() | st.lists(st.booleans(), min_size=N_KEYS, max_size=N_KEYS),
)
def test_compaction_keeps_the_scores_of_kept_keys(
    module: object, table: KeyRangeTable, alignment: int, mask: list[bool] | None
) -> None:
    source, first_copy, q_ranges, k_offsets, k_ranges = module.compact_keys(
        *_csr(table), None if mask is None else np.array(mask, dtype=bool), alignment
    )
    kept = Counter(
        {
            (query, key): n
            for (query, key), n in _scores(list(table.q_ranges), list(table.k_offsets), list(table.k_ranges)).items()
            if mask is None or mask[key]
        }
    )
    compacted = _scores(q_ranges, k_offsets, k_ranges)
    scores: Counter[tuple[int, int]] = Counter()
    for (query, row), n in compacted.items():
        scores[query, source[row]] += n
    assert scores == kept
    real = [key for key in source[:first_copy] if key >= 0]
    assert real == sorted({key for _, key in kept}), "only keys that are read and kept, in their order"
    assert set(source[first_copy:]) <= {*real, -1}
    assert len(source) % alignment == first_copy % alignment == 0
    for begin, end in _pairs(k_ranges):
        assert begin % alignment == 0
        assert all(key < 0 for key in source[end : -(-end // alignment) * alignment]), "nothing follows in the block"
    assert first_copy - len(real) <= (alignment - 1) * len(set(table.k_ranges))
    if alignment == 1:
        assert first_copy == len(source)


@given(table=tables(N_QUERIES, N_KEYS))
def test_readers_are_counted(module: object, table: KeyRangeTable) -> None:
    counts = Counter(key for (_, key), n in _scores(*map(list, _csr(table))).items() for _ in range(n))
    readers = module.count_readers(*_csr(table))
    assert Counter({key: n for begin, end, n in readers for key in range(begin, end)}) == counts
    assert all(end <= begin for (_, end, _), (begin, _, _) in itertools.pairwise(readers))
