"""The key-range table of a process whose keys are spread over a group of processes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..key_range_table import KeyRangeTable, Slice
from .agreement import agree
from .collectives import Mesh, Processes, process_group, processes_of

CASES = ("replicated", "gathered", "ring")
# Bytes of gathered keys and values above which the ring takes over: 1 GiB.
GATHER_LIMIT = 2**30


class KeyShape(NamedTuple):
    """What keys and values of all processes have in common: batch, heads, widths and type of those that travel."""

    batch: int
    heads: int
    k_width: int
    v_width: int
    dtype: torch.dtype

    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all samples."""
        return self.batch * self.heads * (self.k_width + self.v_width) * self.dtype.itemsize


class ShardedTable(NamedTuple):
    """Which keys the queries of this process read, and where in the group these keys are. Made by its class methods.

    Attributes:
        processes: The processes.
        case: ``"replicated"``, ``"gathered"`` or ``"ring"``.
        shape: What keys and values of all processes have in common.
        masked: Whether some process has a ``key_mask``.
        n_keys: Keys on this process, of which those that some process reads travel.
        sent: For every process, its ranges of keys that travel.
        width: The most keys that travel from one process.
        local: The table itself: queries of this process, keys of all processes, process by process.
        gathered: Keys on the axis (processes · width): the keys that travel, padded to equal numbers by process.
        blocks: For every process, the part of the table that reads its keys, on the axis of those that travel.
    """

    processes: Processes
    case: str
    shape: KeyShape
    masked: bool
    n_keys: int
    sent: tuple[tuple[Slice, ...], ...]
    width: int
    local: KeyRangeTable
    gathered: KeyRangeTable
    blocks: tuple[KeyRangeTable, ...]

    @classmethod
    def agree(
        cls,
        table: KeyRangeTable,
        k: Tensor,
        v: Tensor,
        mesh: Mesh = None,
        *,
        key_mask: Tensor | None = None,
        replicated: bool = False,
        case: str | None = None,
        gather_limit: int = GATHER_LIMIT,
    ) -> ShardedTable:
        """Agrees with the other processes on who holds and reads what. Every process of the mesh must call it.

        It serves every later call with such keys, of all layers: sizes do not travel again.

        Args:
            table: The queries of this process, and the keys of all processes one process after the other.
            k: (B, Nk, Hk, D) keys of this process. Only shape, dtype and device are used.
            v: (B, Nk, Hk, Dv) values.
            mesh: The processes: a mesh of one dimension, a group, or all of them.
            key_mask: (B, Nk) bool, if this process will have one.
            replicated: Whether every process holds the same keys, which are then counted once.
            case: ``"gathered"`` or ``"ring"``. If not given, keys are gathered where those of all processes, padded to
                equal numbers, take no more than ``gather_limit`` bytes with their values.
            gather_limit: Bytes; the same on every process.

        Raises:
            ValueError: On every process, if the keys of two differ in batch, heads, width or dtype, or in an option;
                or if a table reads keys that nobody holds.
            ProcessError: If a process fails, has ended or does not answer in time.
        """
        if case is not None and case not in ("gathered", "ring"):
            raise ValueError(f"case must be 'gathered', 'ring' or None, got {case!r}")
        if replicated and case is not None:
            raise ValueError(f"case must be None where keys are replicated, got {case!r}")
        group = process_group(mesh)
        shape = key_shape(k, v)
        options = f"replicated={replicated}, case={case!r}, gather_limit={gather_limit}"
        reads = union([(begin, end) for _, keys in table.entries() for begin, end in keys])
        numbers = [k.shape[1], int(key_mask is not None), *(bound for run in reads for bound in run)]
        rows = agree(f"{shape} and {options}", numbers, group)
        counts = [row[0] for row in rows]
        if replicated and len(set(counts)) > 1:
            raise ValueError(f"k must have as many keys on every process where keys are replicated, got {counts}")
        total = counts[0] if replicated else sum(counts)
        for rank, row in enumerate(rows):
            if row[-1] > total and len(row) > 2:
                raise ValueError(f"table of process {rank} reads key {row[-1] - 1}, but the processes hold {total}")
        every_read = union([(row[i], row[i + 1]) for row in rows for i in range(2, len(row), 2)])
        return cls.of_counts(
            table,
            counts,
            processes_of(group),
            shape,
            masked=any(row[1] for row in rows),
            reads=every_read,
            case="replicated" if replicated else case,
            gather_limit=gather_limit,
        )

    @classmethod
    def of_counts(
        cls,
        table: KeyRangeTable,
        counts: Sequence[int],
        processes: Processes,
        shape: KeyShape,
        *,
        masked: bool,
        reads: Sequence[Slice] | None = None,
        case: str | None = None,
        gather_limit: int = GATHER_LIMIT,
    ) -> ShardedTable:
        """Makes the table from what is agreed already. Arguments as for :meth:`agree`, the same on every process.

        Args:
            table: As there.
            counts: Keys of every process.
            processes: The processes.
            shape: What the keys have in common.
            masked: Whether some process has a ``key_mask``.
            reads: Sorted ranges of the keys that some process reads; ``None`` for all.
            case: As there, or ``"replicated"``.
            gather_limit: As there.
        """
        rank = processes.rank
        if case == "replicated":
            return cls(processes, case, shape, masked, counts[rank], ((),) * processes.size, 0, table, table, ())
        runs = _runs(counts, [(0, sum(counts))] if reads is None else reads)
        sent = [tuple((run.begin, run.end) for run in runs if run.rank == r) for r in range(processes.size)]
        width = max(sum(end - begin for begin, end in ranges) for ranges in sent)
        if case is None:
            case = "gathered" if processes.size * width * shape.row_bytes() <= gather_limit else "ring"
        ring = case == "ring"
        blocks = tuple(_translated(table, runs, counts, r, 0) for r in range(processes.size)) if ring else ()
        gathered = _translated(table, runs, counts, None, width)
        return cls(processes, case, shape, masked, counts[rank], tuple(sent), width, table, gathered, blocks)

    def n_sent(self, rank: int) -> int:
        """Number of keys that travel from a process."""
        return sum(end - begin for begin, end in self.sent[rank])

    def check(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        """Checks that keys are those that were agreed on.

        Raises:
            ValueError: If they differ in number, batch, heads, width or dtype, or have a mask that nobody announced.
        """
        shape = key_shape(k, v)
        if (shape, k.shape[1]) != (self.shape, self.n_keys):
            raise ValueError(
                f"k and v must be as agreed, {self.n_keys} keys of {self.shape}, got {k.shape[1]} of {shape}"
            )
        if key_mask is None:
            return
        if not self.masked and self.case != "replicated":
            raise ValueError("key_mask must be given to ShardedTable.agree by a process that has one, got None there")
        if key_mask.shape != k.shape[:2] or key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask must be bool of shape {tuple(k.shape[:2])}, got {key_mask.dtype}, {tuple(key_mask.shape)}"
            )


class _Run(NamedTuple):
    """Neighbouring keys of a process that travel: on its own axis, and their place among all that travel from it."""

    rank: int
    begin: int
    end: int
    place: int


def key_shape(k: Tensor, v: Tensor) -> KeyShape:
    """What k (B, N, Hk, D) and v (B, N, Hk, Dv) have in common with those of other processes.

    Raises:
        ValueError: If they are no such tensors.
    """
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        raise ValueError(
            "k and v must be (batch, keys, heads, width) of one dtype, "
            f"got {k.dtype}, {tuple(k.shape)} and {v.dtype}, {tuple(v.shape)}"
        )
    return KeyShape(k.shape[0], k.shape[2], k.shape[3], v.shape[3], k.dtype)


def union(ranges: Sequence[Slice]) -> list[Slice]:
    """Sorts ranges, joins those that touch or overlap, and drops empty ones."""
    joined: list[Slice] = []
    for begin, end in sorted(ranges):
        if begin == end:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _runs(counts: Sequence[int], reads: Sequence[Slice]) -> list[_Run]:
    """Cuts sorted ranges of the axis of all keys by process."""
    runs: list[_Run] = []
    i, offset = 0, 0
    for rank, count in enumerate(counts):
        place = 0
        while i < len(reads) and reads[i][0] < offset + count:
            begin, end = max(reads[i][0] - offset, 0), min(reads[i][1] - offset, count)
            if begin < end:
                runs.append(_Run(rank, begin, end, place))
                place += end - begin
            if reads[i][1] > offset + count:
                break
            i += 1
        offset += count
    return runs


def _translated(
    table: KeyRangeTable, runs: Sequence[_Run], counts: Sequence[int], only: int | None, width: int
) -> KeyRangeTable:
    """The table on the axis of the keys that travel, ``width`` apart by process; or of those of one process alone."""
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    ends = [offsets[run.rank] + run.end for run in runs]
    q_ranges: list[int] = []
    k_offsets = [0]
    k_ranges: list[int] = []
    for query, keys in table.entries():
        q_ranges.extend(query)
        for begin, end in keys:
            i = bisect_right(ends, begin)
            while i < len(runs) and offsets[runs[i].rank] + runs[i].begin < end:
                run = runs[i]
                first = offsets[run.rank] + run.begin
                if only is None or run.rank == only:
                    place = run.rank * width + run.place - first
                    k_ranges.extend((max(begin, first) + place, min(end, ends[i]) + place))
                i += 1
        k_offsets.append(len(k_ranges) // 2)
    return KeyRangeTable(q_ranges, k_offsets, k_ranges)
