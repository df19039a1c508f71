"""Conversions from and to the index formats of other attention libraries.

Together with the constructors of :class:`KeyRangeTable` (paired ranges, ``cu_seqlens``) and its ``to_dense`` and
``to_block_mask``:

==========================================  ==============================  ============================
format                                      to a table                      from a table
==========================================  ==============================  ============================
paired rows ``q_ranges``, ``k_ranges``      ``KeyRangeTable.from_ranges``   :func:`to_ranges`
``cu_seqlens`` of packed samples            ``…from_cu_seqlens``            :func:`to_cu_seqlens`
FlexAttention ``BlockMask``                 :func:`from_block_mask`         ``KeyRangeTable.to_block_mask``
gappy keys: packed queries, padded keys     :func:`from_gappy_keys`         :func:`to_gappy_keys`
dense mask                                  :func:`from_dense`              ``KeyRangeTable.to_dense``
integer prefix of tabular transformers      :func:`from_prefix`             :func:`to_prefix`
==========================================  ==============================  ============================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .key_range_table import KeyRangeTable, integers

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Slice = tuple[int, int]

# A mask with more ranges than this is too scattered for a table of ranges to be useful.
MAX_RANGES = 65536


def to_ranges(table: KeyRangeTable) -> tuple[Tensor, Tensor]:
    """Returns paired rows: the queries of ``q_ranges[i]`` read the keys of ``k_ranges[i]``.

    Returns:
        q_ranges and k_ranges, (n, 2) int32; a query range with several key ranges is repeated.
    """
    rows = [(query, key) for query, keys in table.entries() for key in keys]
    q_ranges = torch.tensor([query for query, _ in rows], dtype=torch.int32).view(-1, 2)
    k_ranges = torch.tensor([key for _, key in rows], dtype=torch.int32).view(-1, 2)
    return q_ranges, k_ranges


def to_cu_seqlens(table: KeyRangeTable, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """Returns the cumulative lengths of packed samples.

    Queries without a key become samples without keys, and keys that are never read become samples without queries.

    Args:
        table: A block-diagonal table.
        n_queries: Length of the query axis.
        n_keys: Length of the key axis.

    Returns:
        cu_seqlens_q and cu_seqlens_k, (n + 1,) int32.

    Raises:
        ValueError: If a group reads several ranges, or later groups read earlier keys.
    """
    bounds_q, bounds_k = [0], [0]

    def until(q: int, k: int) -> None:
        if q > bounds_q[-1]:
            bounds_q.append(q)
            bounds_k.append(bounds_k[-1])
        if k > bounds_k[-1]:
            bounds_q.append(bounds_q[-1])
            bounds_k.append(k)

    for (q_begin, q_end), keys in table.entries():
        if len(keys) != 1 or keys[0][0] < bounds_k[-1]:
            raise ValueError(
                f"cu_seqlens can't express that the queries [{q_begin}, {q_end}) read {keys}: "
                f"it would have to be one range from {bounds_k[-1]} on"
            )
        until(q_begin, keys[0][0])
        bounds_q.append(q_end)
        bounds_k.append(keys[0][1])
    if n_queries < bounds_q[-1] or n_keys < bounds_k[-1]:
        raise ValueError(
            f"the table reaches to query {bounds_q[-1]} and key {bounds_k[-1]}, beyond n_queries={n_queries} "
            f"and n_keys={n_keys}"
        )
    until(n_queries, n_keys)
    return torch.tensor(bounds_q, dtype=torch.int32), torch.tensor(bounds_k, dtype=torch.int32)


def from_gappy_keys(cu_seqlens_q: Sequence[int] | Tensor, k_begins: Any, k_lengths: Any) -> KeyRangeTable:
    """Makes the table of packed queries whose keys are at given places, with gaps between the samples.

    xFormers' block-diagonal masks with gappy or padded keys hold these numbers: ``q_seqinfo.seqstart``,
    ``k_seqinfo.seqstart`` and ``k_seqinfo.seqlen``.

    Args:
        cu_seqlens_q: (n + 1,) cumulative query counts, 0 first.
        k_begins: (n,) or (n + 1,) first key of each sample; the last of n + 1 is the end of the axis and is ignored.
        k_lengths: (n,) keys of each sample.

    Raises:
        ValueError: If the lengths do not match.
    """
    queries = integers("cu_seqlens_q", cu_seqlens_q)
    begins, lengths = integers("k_begins", k_begins), integers("k_lengths", k_lengths)
    n = len(queries) - 1
    if n < 0 or queries[0] != 0 or len(begins) not in (n, n + 1) or len(lengths) != n:
        raise ValueError(
            f"cu_seqlens_q must have n + 1 numbers, the first one 0, k_begins n or n + 1 and k_lengths n, "
            f"got {len(queries)}, {len(begins)} and {len(lengths)}"
        )
    return KeyRangeTable(
        (bound for pair in itertools.pairwise(queries) for bound in pair),
        range(n + 1),
        (bound for begin, length in zip(begins, lengths, strict=False) for bound in (begin, begin + length)),
    )


def to_gappy_keys(table: KeyRangeTable, n_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns packed queries and where the keys of each sample are.

    Returns:
        cu_seqlens_q (n + 1,), k_begins (n,) and k_lengths (n,), int32. Queries without a key make samples of length 0.

    Raises:
        ValueError: If a group reads several ranges, or the table has more than n_queries queries.
    """
    bounds, begins, lengths = [0], [], []
    entries = [*table.entries(), ((n_queries, n_queries), [(0, 0)])]
    for (q_begin, q_end), keys in entries:
        if len(keys) != 1:
            raise ValueError(
                f"gappy keys can't express that the queries [{q_begin}, {q_end}) read several ranges, {keys}"
            )
        if q_end > n_queries:
            raise ValueError(f"the table reaches to query {q_end}, beyond n_queries={n_queries}")
        if q_begin > bounds[-1]:
            bounds.append(q_begin)
            begins.append(0)
            lengths.append(0)
        if q_end > q_begin:
            bounds.append(q_end)
            begins.append(keys[0][0])
            lengths.append(keys[0][1] - keys[0][0])
    q, k, n = (torch.tensor(numbers, dtype=torch.int32) for numbers in (bounds, begins, lengths))
    return q, k, n


def from_dense(mask: Tensor, *, max_ranges: int = MAX_RANGES) -> KeyRangeTable:
    """Makes the table of a dense mask. It is exact; neighbouring queries with the same keys become one group.

    Args:
        mask: (Nq, Nk), or with leading axes over which it does not vary: bool, True where a query reads a key, or
            floating point to be added to the scores, 0 or −inf.
        max_ranges: Key ranges that the table may have at most.

    Raises:
        ValueError: If the mask varies over batch or heads, is scattered into too many ranges, or holds other numbers.
    """
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"mask must be a torch.Tensor, got {type(mask)!r}")
    if mask.device.type == "meta":
        raise ValueError("mask must hold values, but a tensor on the meta device has none")
    if mask.dim() < 2:
        raise ValueError(f"mask must be (..., queries, keys), got shape {tuple(mask.shape)}")
    if mask.is_floating_point():
        if not bool(((mask == 0) | (mask == -torch.inf)).all()):
            raise ValueError("mask must hold only 0 and −inf: a table can't express a bias")
        mask = mask == 0
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool or floating point, got {mask.dtype}")
    flat = mask.reshape(math.prod(mask.shape[:-2]), *mask.shape[-2:])
    if flat.shape[0] == 0:
        raise ValueError(f"mask must hold at least one pattern, got shape {tuple(mask.shape)}")
    if not bool((flat == flat[:1]).all()):
        raise ValueError(f"mask of shape {tuple(mask.shape)} must not vary over its leading axes: all share one table")
    groups = _RangeGroups(max_ranges)
    groups.append(flat[0])
    return groups.table()


def from_block_mask(block_mask: BlockMask, *, max_ranges: int = MAX_RANGES) -> KeyRangeTable:
    """Makes the table of a FlexAttention mask, one row of blocks at a time: the dense mask never exists.

    Args:
        block_mask: A mask that is the same for all samples and heads.
        max_ranges: Key ranges that the table may have at most.

    Raises:
        ValueError: If it varies over samples or heads, or is scattered into too many ranges.
    """
    n_queries, n_keys = block_mask.seq_lengths
    q_block, k_block = block_mask.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        tensor = getattr(block_mask, name)
        if tensor is not None and tensor.shape[:2].numel() != 1:
            raise ValueError(
                f"block_mask.{name} must be for one sample and head, since all share one table, "
                f"got shape {tuple(tensor.shape)}"
            )
    device = block_mask.kv_num_blocks.device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    groups = _RangeGroups(max_ranges)
    for row in range(-(-n_queries // q_block)):
        queries = torch.arange(row * q_block, min((row + 1) * q_block, n_queries), device=device)
        dense = torch.zeros(len(queries), n_keys, dtype=torch.bool, device=device)
        for counts, indices, full in (
            (block_mask.kv_num_blocks, block_mask.kv_indices, False),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
        ):
            if counts is None or indices is None:
                continue
            for column in indices[0, 0, row, : int(counts[0, 0, row])].tolist():
                begin, end = column * k_block, min((column + 1) * k_block, n_keys)
                keys = torch.arange(begin, end, device=device)
                read = full or block_mask.mask_mod(zero, zero, queries[:, None], keys[None, :])
                dense[:, begin:end] = read
        groups.append(dense)
    return groups.table()


def from_prefix(n_tokens: int, n: int) -> KeyRangeTable:
    """Makes the table of an integer mask: the first n tokens attend to themselves, the rest to the first n.

    Args:
        n_tokens: Length of the axis.
        n: Tokens that are read.

    Raises:
        ValueError: If not 0 <= n <= n_tokens.
    """
    for name, number in (("n_tokens", n_tokens), ("n", n)):
        integers(name, [number])
    if not 0 <= n <= n_tokens:
        raise ValueError(f"n must be between 0 and n_tokens={n_tokens}, got {n}")
    return KeyRangeTable((0, n_tokens), (0, 1), (0, n))


def to_prefix(table: KeyRangeTable, n_tokens: int) -> int:
    """Returns n, if all tokens read the first n.

    Raises:
        ValueError: If they don't.
    """
    entries = table.entries()
    if not entries:
        return 0
    n = entries[0][1][0][1]
    if n > n_tokens or table != from_prefix(n_tokens, n):
        raise ValueError(f"a prefix of {n_tokens} tokens can't express {table}")
    return n


class _RangeGroups:
    """Collects rows of a dense mask into groups of equal neighbours."""

    def __init__(self, max_ranges: int) -> None:
        self.max_ranges = max_ranges
        self.n_rows = 0
        self.n_ranges = 0
        self.queries: list[list[int]] = []
        self.keys: list[list[Slice]] = []

    def append(self, rows: Tensor) -> None:
        """Appends rows (n, Nk) bool."""
        if rows.shape[0] == 0:
            return
        changes = (rows[1:] != rows[:-1]).any(dim=1).nonzero().flatten() + 1
        begins = [0, *changes.tolist()]
        for begin, end in itertools.pairwise([*begins, rows.shape[0]]):
            keys = _runs(rows[begin])
            if self.keys and self.keys[-1] == keys:
                self.queries[-1][1] = self.n_rows + end
                continue
            self.n_ranges += len(keys)
            if self.n_ranges > self.max_ranges:
                raise ValueError(
                    f"the mask is not a union of at most max_ranges={self.max_ranges} ranges: "
                    f"row {self.n_rows + begin} exceeds them"
                )
            self.queries.append([self.n_rows + begin, self.n_rows + end])
            self.keys.append(keys)
        self.n_rows += rows.shape[0]

    def table(self) -> KeyRangeTable:
        """The table of all rows."""
        return KeyRangeTable(
            itertools.chain.from_iterable(self.queries),
            itertools.accumulate((len(keys) for keys in self.keys), initial=0),
            (bound for keys in self.keys for key in keys for bound in key),
        )


def _runs(row: Tensor) -> list[Slice]:
    edge = row.new_zeros(1)
    steps = torch.diff(torch.cat((edge, row, edge)).to(torch.int8)).cpu()
    begins, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return list(zip(begins, ends, strict=True))
