"""From the token groups of every process to the table of one."""

from __future__ import annotations

from typing import NamedTuple

from ..key_range_table import KeyRangeTable, Slice
from ..modules.plan import GroupSize, Pattern, bounded_cache
from .collectives import Processes
from .sharded_table import KeyShape, ShardedTable


class ShardedPlan(NamedTuple):
    """What a call with given sizes and patterns does on this process.

    Attributes:
        table: Queries on the token axis of x, keys those of the groups of x that are read, on all processes.
        cached: The same queries, keys those of the cache.
        pieces: For every group of x that is read, where its tokens are on the gathered axis, process by process.
    """

    table: ShardedTable
    cached: KeyRangeTable
    pieces: dict[str, tuple[Slice, ...]]


def read_groups(groups: tuple[GroupSize, ...], key_slices: dict[str, Slice]) -> tuple[str, ...]:
    """The groups of x that are read: by name, so that every process finds the same ones whatever its sizes."""
    return tuple(name for name, size, _ in groups if size is not None and name in key_slices)


@bounded_cache
def sharded_plan(
    groups: tuple[GroupSize, ...],
    patterns: tuple[Pattern, ...],
    rows: tuple[tuple[int, ...], ...],
    fresh: tuple[str, ...],
    cached: tuple[tuple[str, Slice], ...],
    processes: Processes,
    shape: KeyShape,
    case: str | None,
    gather_limit: int,
) -> ShardedPlan:
    """Makes the plan of a call.

    Args:
        groups: The token groups of this process, in the order of x.
        patterns: Names of the query groups and names of the key groups, for each pattern.
        rows: For every process whether it has a mask, and the sizes of the groups ``fresh``.
        fresh: The groups of x that are read.
        cached: The groups that come from the cache, on an axis of their own.
        processes: The processes.
        shape: What the keys of all processes have in common.
        case: As for :meth:`ShardedTable.agree`.
        gather_limit: As there.
    """
    everywhere: dict[str, list[Slice]] = {name: [] for name in fresh}
    begin = 0
    for row in rows:
        for name, size in zip(fresh, row[1:], strict=True):
            everywhere[name].append((begin, begin + size))
            begin += size
    counts = [sum(row[1:]) for row in rows]
    query_slices: dict[str, Slice] = {}
    begin = 0
    for name, in_x, _ in groups:
        if in_x is not None:
            query_slices[name] = (begin, begin + in_x)
            begin += in_x
    cached_slices = {name: [place] for name, place in cached}
    table, cached_table = (_table(query_slices, slices, patterns) for slices in (everywhere, cached_slices))
    sharded = ShardedTable.of_counts(
        table, counts, processes, shape, masked=any(row[0] for row in rows), case=case, gather_limit=gather_limit
    )
    pieces: dict[str, tuple[Slice, ...]] = {}
    for i, name in enumerate(fresh):
        begins = [rank * sharded.width + sum(row[1 : 1 + i]) for rank, row in enumerate(rows)]
        pieces[name] = tuple((begin, begin + row[1 + i]) for begin, row in zip(begins, rows, strict=True))
    return ShardedPlan(sharded, cached_table, pieces)


def _table(
    query_slices: dict[str, Slice], key_slices: dict[str, list[Slice]], patterns: tuple[Pattern, ...]
) -> KeyRangeTable:
    q_ranges: list[int] = []
    k_offsets = [0]
    k_ranges: list[int] = []
    for queries, keys in patterns:
        for query in queries:
            if query not in query_slices:
                continue
            q_ranges.extend(query_slices[query])
            k_ranges.extend(bound for key in keys for place in key_slices.get(key, ()) for bound in place)
            k_offsets.append(len(k_ranges) // 2)
    return KeyRangeTable(q_ranges, k_offsets, k_ranges)
