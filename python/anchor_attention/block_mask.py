"""A key-range table as a mask of FlexAttention, in memory proportional to its ranges, tokens and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Of tokens: as many entries may a matrix of groups and key segments have.
DENSE_SHARE = 4


def make_block_mask(
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    device: Any,
) -> BlockMask:
    """Makes the mask of a table whose groups read no key twice: see :meth:`KeyRangeTable.to_block_mask`."""
    from torch.nn.attention.flex_attention import BlockMask

    (n_queries, n_keys), (q_block, k_block) = lengths, block_size
    queries, offsets, keys = (
        torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (q_ranges, k_offsets, k_ranges)
    )
    queries, keys = queries.view(-1, 2), keys.view(-1, 2)
    scores = _scores_per_block(queries, offsets, keys, (n_queries, n_keys), (q_block, k_block))
    full = scores == q_block * k_block
    partial = (scores > 0) & ~full

    # Queries of no group belong to one more, which has no range.
    n_groups = queries.size(0)
    positions = torch.arange(n_queries, device=device)
    group_of_query = torch.searchsorted(queries[:, 1].contiguous(), positions, right=True)
    begins_later = queries.new_zeros(n_queries, dtype=torch.bool)
    if n_groups:
        begins_later = queries[group_of_query.clamp_max(n_groups - 1), 0] > positions
    group_of_query = torch.where(begins_later, n_groups, group_of_query)
    lookup = _by_segments if (n_groups + 1) * (keys.numel() + 1) <= DENSE_SHARE * (n_queries + n_keys) else _by_search
    may_read = lookup(offsets, keys, n_keys)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return may_read(group_of_query[q_idx], kv_idx)

    return BlockMask.from_kv_blocks(
        *_ordered_blocks(partial),
        *_ordered_blocks(full),
        BLOCK_SIZE=(q_block, k_block),
        mask_mod=mask_mod,
        seq_lengths=(n_queries, n_keys),
    )


def _by_segments(offsets: Tensor, keys: Tensor, n_keys: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Looks up, in a matrix of groups and segments between range bounds, whether the query's group reads the key."""
    bounds = torch.unique(torch.cat([keys.flatten(), keys.new_tensor([0, n_keys])]))
    n_groups = offsets.numel() - 1
    group = torch.repeat_interleave(offsets.diff())
    changes = keys.new_zeros(n_groups + 1, bounds.numel())
    for sign, edge in zip((1, -1), keys.unbind(1), strict=True):
        at = torch.searchsorted(bounds, edge.contiguous())
        changes.index_put_((group, at), torch.full_like(at, sign), accumulate=True)
    reads = changes.cumsum(1) > 0
    positions = torch.arange(n_keys, device=keys.device)
    segment_of_key = torch.searchsorted(bounds, positions, right=True) - 1
    return lambda group, key: reads[group, segment_of_key[key]]


def _by_search(offsets: Tensor, keys: Tensor, n_keys: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Searches the ranges of the query's group, where a matrix of groups and segments would exceed the tokens.

    The compiled CPU kernel (torch 2.13) rejects it; on a GPU and uncompiled it runs.
    """
    steps = int(offsets.diff().max()).bit_length() if offsets.numel() > 1 else 0
    offsets = torch.cat([offsets, offsets[-1:]])
    begins, ends = (part.contiguous() for part in torch.cat([keys, keys.new_zeros(1, 2)]).unbind(1))

    def may_read(group: Tensor, key: Tensor) -> Tensor:
        first = low = offsets[group]
        high = offsets[group + 1]
        # The number of the group's ranges that begin at the key or before it, by halving: no branch, no loop over data.
        for _ in range(steps):
            middle = (low + high) // 2
            before = (low < high) & (begins[middle] <= key)
            low = torch.where(before, middle + 1, low)
            high = torch.where(before, high, middle)
        return (low > first) & (key < ends[torch.where(low > first, low - 1, 0)])

    return may_read


def _scores_per_block(
    queries: Tensor, offsets: Tensor, keys: Tensor, lengths: tuple[int, int], blocks: tuple[int, int]
) -> Tensor:
    """Counts the scores in each block: (query blocks, key blocks) int64."""
    (n_queries, n_keys), (q_block, k_block) = lengths, blocks
    n_rows, n_columns = -(-n_queries // q_block), -(-n_keys // k_block)
    # Every group overlaps some rows of blocks, each with some of its queries, which read all ranges of the group.
    first_row = queries[:, 0] // q_block
    group, step = _expand((queries[:, 1] - 1) // q_block - first_row + 1)
    row = first_row[group] + step
    n_readers = torch.minimum(queries[group, 1], (row + 1) * q_block) - torch.maximum(queries[group, 0], row * q_block)
    meeting, step = _expand(offsets.diff()[group])
    row, n_readers = row[meeting], n_readers[meeting]
    begin, end = keys[offsets[:-1][group[meeting]] + step].unbind(1)
    first, last = begin // k_block, (end - 1) // k_block
    # A range fills the blocks between its first and its last one.
    counts = queries.new_zeros(2, n_rows * (n_columns + 1))
    at = row * (n_columns + 1)
    several = last > first
    counts[0].index_add_(0, at + first, n_readers * (torch.minimum(end, (first + 1) * k_block) - begin))
    counts[0].index_add_(0, at + last, n_readers * (end - last * k_block) * several)
    counts[1].index_add_(0, at + first + 1, n_readers * k_block * several)
    counts[1].index_add_(0, at + last, -n_readers * k_block * several)
    at_ends, between = counts.view(2, n_rows, n_columns + 1)[:, :, :n_columns]
    scores: Tensor = at_ends + between.cumsum(1)
    return scores


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts (2, 1, 3): which entry, (0, 0, 1, 2, 2, 2), and the step within it, (0, 1, 0, 0, 1, 2)."""
    entry = torch.repeat_interleave(counts)
    return entry, torch.arange(entry.numel(), device=counts.device) - (counts.cumsum(0) - counts)[entry]


def _ordered_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Turns a (rows, columns) bool matrix into FlexAttention's counts and index lists, (1, 1, rows[, columns])."""
    counts = chosen.sum(-1).to(torch.int32)
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]
