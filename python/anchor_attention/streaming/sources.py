"""Where queries come from: arrays that are cut into chunks, or an iterator of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Name of the branch of queries that are given without one.
ONLY = ""

Rows = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Chunk:
    """Queries of one call.

    Args:
        rows: Their rows [begin, end), by branch. Branches that have run out are missing.
        queries: (B, end - begin or more, F) by branch; rows beyond are padding.
    """

    rows: Rows
    queries: dict[str, Tensor]


class Source(Protocol):
    """What chunks come from.

    Attributes:
        named: Whether the queries have branches with names.
        batched: Whether they were given with a batch axis.
        totals: Rows by branch, ``None`` if unknown.
    """

    named: bool
    batched: bool
    totals: dict[str, int] | None

    def chunks(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the chunks behind the rows that are done."""
        ...


class ArraySource:
    """Cuts arrays (N, F) or (B, N, F): tensors, NumPy arrays or memory maps, one for each branch.

    Args:
        queries: One array, or arrays by branch.
        chunk_size: Rows of a chunk, of every branch or by branch.
        pad_last: Whether the last chunk of a branch that had whole ones is filled up with copies of its last row.

    Raises:
        ValueError: If a shape or a chunk size does not fit.
    """

    def __init__(self, queries: Any, chunk_size: int | Mapping[str, int], pad_last: bool = False) -> None:
        self.named = isinstance(queries, Mapping)
        arrays: dict[str, Any] = dict(queries) if isinstance(queries, Mapping) else {ONLY: queries}
        ranks = {len(array.shape) for array in arrays.values()}
        if ranks not in ({2}, {3}):
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
            raise ValueError(f"queries must all be (N, F) or all (B, N, F), got shapes {shapes}")
        self.arrays = arrays
        self.batched = ranks == {3}
        self.totals: dict[str, int] | None = {name: int(array.shape[-2]) for name, array in arrays.items()}
        self.sizes = chunk_size if isinstance(chunk_size, Mapping) else dict.fromkeys(arrays, chunk_size)
        if set(self.sizes) != set(arrays) or any(size < 1 for size in self.sizes.values()):
            raise ValueError(f"chunk_size must be positive for each of {sorted(arrays)}, got {chunk_size}")
        self.pad_last = pad_last

    def take(self, rows: Rows) -> Chunk:
        """Returns the queries of some rows."""
        queries = {}
        for name, (begin, end) in rows.items():
            part = self.arrays[name][..., begin:end, :]
            # A copy of what is mapped, which torch would otherwise share although it must not be written to.
            part = part if isinstance(part, Tensor) else torch.tensor(part)
            part = part if self.batched else part[None]
            missing = self.sizes[name] - (end - begin)
            if self.pad_last and 0 < missing and begin > 0:
                part = torch.cat((part, part[:, -1:].expand(-1, missing, -1)), dim=1)
            queries[name] = part
        return Chunk(dict(rows), queries)

    def chunks(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the chunks behind the rows that are done."""
        assert self.totals is not None
        begins = {name: done.get(name, 0) for name in self.arrays}
        while rows := {
            name: (begin, min(begin + self.sizes[name], self.totals[name]))
            for name, begin in begins.items()
            if begin < self.totals[name]
        }:
            yield self.take(rows)
            begins.update({name: end for name, (_, end) in rows.items()})


class IteratorSource:
    """Takes chunks (n, F) or (B, n, F), or dictionaries of these by branch, as they come.

    Args:
        queries: The chunks. To go on where an earlier run stopped, those that are done are taken and dropped.
    """

    def __init__(self, queries: Iterable[Any]) -> None:
        self.iterator = iter(queries)
        self.named = False
        self.batched = True
        self.totals: dict[str, int] | None = None

    def chunks(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the chunks behind the rows that are done.

        Raises:
            ValueError: If a chunk's shape does not fit, or no chunk ends where the earlier run stopped.
        """
        ends: dict[str, int] = {}
        skipping = any(done.values())
        for item in self.iterator:
            self.named = isinstance(item, Mapping)
            parts: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {ONLY: item}
            queries, rows = {}, {}
            for name, part in parts.items():
                tensor = part if isinstance(part, Tensor) else torch.tensor(part)
                if tensor.dim() not in (2, 3):
                    raise ValueError(f"a chunk must be (n, F) or (B, n, F), got shape {tuple(tensor.shape)}")
                self.batched = tensor.dim() == 3
                begin = ends.get(name, 0)
                ends[name] = begin + tensor.shape[-2]
                if ends[name] > begin:
                    rows[name] = (begin, ends[name])
                    queries[name] = tensor if self.batched else tensor[None]
            if skipping:
                if any(end > done.get(name, 0) for name, end in ends.items()):
                    raise ValueError(f"no chunk of the iterator ends where the earlier run stopped, at {dict(done)}")
                skipping = any(ends.get(name, 0) < end for name, end in done.items())
            elif rows:
                yield Chunk(rows, queries)
        if skipping:
            raise ValueError(f"the iterator ended at {ends}, before the rows {dict(done)} of the earlier run")
