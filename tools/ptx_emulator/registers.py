"""Maps virtual registers to rows, so that a warp's registers fit into the processor's cache.

nvcc's PTX has thousands of virtual registers with short lives. A register's life is the span of text between its first
and its last mention, widened to whole loops where a value can travel around the back edge.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Span = NDArray[np.int64]


def _widen_over_loops(
    begin: Span,
    end: Span,
    carried: NDArray[np.bool_],
    loops: Sequence[tuple[int, int]],
    skips: Sequence[tuple[int, int]],
) -> None:
    """Widen spans in place. `carried`: the first mention may read a value that an earlier iteration left."""
    first_mention = begin.copy()
    changed = True
    while changed:
        changed = False
        # A write that can be skipped on the way to a read leaves what an earlier iteration wrote.
        for source, target in skips:
            carried |= (first_mention > source) & (first_mention < target) & (end >= target)
        for first, last in loops:
            enters = (begin < first) & (end >= first) & (end < last)
            end[enters] = last
            leaves = (begin > first) & (begin <= last) & (end > last)
            begin[leaves] = first
            inside = carried & (begin >= first) & (end <= last) & ((begin > first) | (end < last))
            begin[inside] = first
            end[inside] = last
            changed |= bool(enters.any() or leaves.any() or inside.any())


def assign_rows(
    mentions: Sequence[tuple[int, int, bool]],
    wide: Sequence[bool],
    permanent: Sequence[int],
    loops: Sequence[tuple[int, int]],
    skips: Sequence[tuple[int, int]],
    first_row: int,
) -> tuple[list[int], int]:
    """Rows of all virtual registers, and the number of rows.

    mentions: (instruction, register, whether it is an unconditional write), in program order.
    wide: per register, whether it takes two rows.
    permanent: registers that keep their row (constants).
    loops: (target, source) of every backward branch.
    skips: (source, target) of every forward branch.
    """
    n = len(wide)
    never = np.iinfo(np.int64).max
    begin = np.full(n, never)
    end = np.full(n, -1)
    carried = np.zeros(n, dtype=bool)
    for position, register, is_write in mentions:
        if begin[register] == never:
            begin[register] = position
            carried[register] = not is_write
        end[register] = position
    _widen_over_loops(begin, end, carried, loops, skips)
    begin[list(permanent)] = -1
    end[list(permanent)] = never

    rows = [-1] * n
    n_rows = first_row
    free: dict[bool, list[int]] = {False: [], True: []}
    active: list[tuple[int, int]] = []
    for register in sorted(range(n), key=lambda index: int(begin[index])):
        # Strictly before: a result never shares a row with its instruction's sources, whose lanes may be unread.
        while active and active[0][0] < begin[register]:
            _, finished = heapq.heappop(active)
            free[wide[finished]].append(rows[finished])
        if free[wide[register]]:
            rows[register] = free[wide[register]].pop()
        else:
            rows[register] = n_rows
            n_rows += 2 if wide[register] else 1
        heapq.heappush(active, (int(end[register]), register))
    return rows, n_rows
