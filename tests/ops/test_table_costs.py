"""Memory and time of a call follow the table's area and its tokens, whatever the table looks like."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests import native

Table = tuple[list[int], list[int], list[int]]


def _table(queries: np.ndarray, k_offsets: np.ndarray, keys: np.ndarray) -> Table:
    return queries.ravel().tolist(), k_offsets.tolist(), keys.ravel().tolist()


def _one_range_each(begins: np.ndarray, ends: np.ndarray) -> Table:
    """Group i is query 2 i, so that groups with equal keys don't join."""
    n = len(begins)
    q = 2 * np.arange(n)
    return _table(np.stack([q, q + 1], 1), np.arange(n + 1), np.stack([begins, ends], 1))


def _random(n: int) -> Table:
    bounds = np.sort(np.random.default_rng(0).integers(0, n + 1, (n, 2)), axis=1)
    return _one_range_each(bounds[:, 0], bounds[:, 1])


def _repeated(n: int) -> Table:
    rows = np.arange(n // 2)
    keys = np.repeat(np.stack([rows, rows + 3], 1), 2, axis=0)
    return _table(np.stack([rows, rows + 1], 1), 2 * np.arange(n // 2 + 1), keys)


def _alternating(n: int) -> Table:
    odd = np.arange(n) % 2
    return _one_range_each(odd * (n // 2 - 1), np.where(odd, n, n // 2))


def _star(n: int) -> Table:
    """One query reads n - 8 ranges, eight read one."""
    rows = np.arange(n - 8)
    keys = np.concatenate([np.stack([2 * rows, 2 * rows + 1], 1), np.array([[0, 2 * n]] * 8)])
    offsets = np.concatenate([[0], n - 8 + np.arange(9)])
    q = 2 * np.arange(9)
    return _table(np.stack([q, q + 1], 1), offsets, keys)


def _comb(n: int) -> Table:
    """Eight groups, each of which reads every eighth key."""
    teeth = n // 8
    begins = (8 * np.arange(teeth)[None, :] + np.arange(8)[:, None]).ravel()
    q = 100 * np.arange(8)
    return _table(np.stack([q, q + 100], 1), teeth * np.arange(9), np.stack([begins, begins + 1], 1))


FAMILIES: dict[str, Callable[[int], Table]] = {
    "prefixes": lambda n: _one_range_each(np.zeros(n, int), np.arange(1, n + 1)),
    "suffixes": lambda n: _one_range_each(np.arange(n), np.full(n, n)),
    "banded": lambda n: _one_range_each(np.arange(n), np.arange(n) + 65),
    "one key each": lambda n: _one_range_each(np.arange(n), np.arange(n) + 1),
    "samples": lambda n: _one_range_each(61 * np.arange(n), 61 * np.arange(1, n + 1)),
    "shared": lambda n: _one_range_each(np.full(n, 3), np.full(n, n)),
    "repeated": _repeated,
    "random": _random,
    "alternating": _alternating,
    "star": _star,
    "comb": _comb,
    "empty": lambda n: _one_range_each(np.arange(n), np.arange(n)),
}


@pytest.mark.parametrize("n", [5000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_of_a_table_grows_with_its_ranges_and_keys(family: str, n: int) -> None:
    module = native.load()
    table = FAMILIES[family](n)
    n_ranges = len(table[2]) // 2
    bounds = np.array(table[2]).reshape(-1, 2)
    filled = bounds[bounds[:, 0] < bounds[:, 1]]
    change = np.zeros(bounds.max() + 1, int)
    np.add.at(change, filled[:, 0], 1)
    np.add.at(change, filled[:, 1], -1)
    n_keys = int((np.cumsum(change) > 0).sum())

    start = time.process_time()
    assert len(module.count_readers(*table)) <= 2 * n_ranges
    for alignment in (1, 2):
        source, first_copy, _, _, k_ranges = module.compact_keys(*table, None, alignment)
        # A gap for each bound at most, and the copies of each block of two keys: the first, the second.
        assert first_copy <= n_keys + (alignment - 1) * 2 * n_ranges
        assert len(source) <= first_copy + (alignment - 1) * 2 * n_keys
        # 2 n bounds cut two ranges each at most, and the ends of a piece may be copies.
        assert len(k_ranges) // 2 <= (1 if alignment == 1 else 15) * n_ranges
    # Loose, because the machine may be busy: with 10⁶ nested ranges the square would be hours.
    assert time.process_time() - start < 5 + 60e-6 * n


MEASURE = """
import resource, torch
from anchor_attention import KeyRangeTable, anchor_attention
n = {n}
queries, prefixes = ([x for i in range(n) for x in (begin * i, i + 1)] for begin in (1, 0))
table = KeyRangeTable(queries, range(n + 1), prefixes)
q, k, v = (torch.randn(1, n, 1, 8, dtype=torch.{dtype}, requires_grad=True) for _ in range(3))
small = KeyRangeTable.from_ranges([[0, 8]], [[0, 8]])
anchor_attention(q, k, v, small).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
anchor_attention(q, k, v, table).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_block_mask_takes_memory_of_its_blocks() -> None:
    """8 bytes for each sample and key segment would be 2 GiB."""
    program = """
import resource, torch.nn.attention.flex_attention
from anchor_attention import KeyRangeTable
n = 16000
table = KeyRangeTable.from_cu_seqlens(range(n + 1), range(n + 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table.to_block_mask(n, n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64 * 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nested_ranges_take_memory_of_the_tokens(dtype: str) -> None:
    """8 bytes for each group and key segment would be 128 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE.format(n=6000, dtype=dtype)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 24 * 1024
