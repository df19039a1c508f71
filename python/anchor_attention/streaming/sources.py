"""Where queries come from: arrays that are cut into chunks, or an iterator of chunks."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .mapped_files import mapped_file

# Name of the branch of queries that are given without one.
ONLY = ""

Rows = dict[str, tuple[int, int]]

# Rows that are read at once where nothing is decoded.
BLOCK = 65536


def refuse_path(name: str, value: object) -> None:
    """Refuses the path of a file where its content belongs.

    Raises:
        ValueError: If the value is one.
    """
    if isinstance(value, (str, os.PathLike)):
        raise ValueError(
            f"{name} must be an array, got the path {os.fspath(value)!r}: numpy.load(path, mmap_mode=...) opens it"
        )


def whole_number(name: str, value: Any) -> int:
    """A positive whole number.

    Raises:
        ValueError: If the value is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be positive and whole, got {value!r}")
    return number


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
        branches: Names of the branches that are known.
    """

    named: bool
    batched: bool
    totals: dict[str, int] | None
    branches: list[str]

    def skip(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the rows that are done; taken to its end before :meth:`chunks` begins."""
        ...

    def chunks(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the chunks behind the rows that are done."""
        ...

    def like(self, branch: str, n: int) -> Tensor:
        """Returns n rows of zeros (B, n, F) such as the branch has."""
        ...


class ArraySource:
    """Cuts arrays (N, F) or (B, N, F): tensors, NumPy arrays or memory maps, one for each branch.

    Args:
        queries: One array, or arrays by branch.
        chunk_size: Rows of a chunk, of every branch or by branch.
        pad_last: Whether a shorter last chunk of a branch that had whole ones is padded with copies of its last row.

    Raises:
        ValueError: If a shape or a chunk size does not fit.
    """

    def __init__(self, queries: Any, chunk_size: int | Mapping[str, int], pad_last: bool = False) -> None:
        self.named = isinstance(queries, Mapping)
        arrays: dict[str, Any] = dict(queries) if isinstance(queries, Mapping) else {ONLY: queries}
        for name, array in arrays.items():
            refuse_path(f"queries[{name!r}]" if self.named else "queries", array)
            if not isinstance(name, str) or not hasattr(array, "shape"):
                raise ValueError(f"queries must be arrays by names of branches, got {type(array).__name__} at {name!r}")
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        ranks = {len(shape) for shape in shapes.values()}
        if ranks not in ({2}, {3}):
            raise ValueError(f"queries must all be (N, F) or all (B, N, F), got shapes {shapes}")
        if len({shape[:-2] for shape in shapes.values()}) > 1:
            raise ValueError(f"queries must all have one batch size, got shapes {shapes}")
        self.arrays = arrays
        self.files = {name: mapped_file(f"queries[{name!r}]", array) for name, array in arrays.items()}
        self.batched = ranks == {3}
        self.totals: dict[str, int] | None = {name: int(array.shape[-2]) for name, array in arrays.items()}
        self.branches = list(arrays)
        sizes = dict(chunk_size) if isinstance(chunk_size, Mapping) else dict.fromkeys(arrays, chunk_size)
        if set(sizes) != set(arrays):
            raise ValueError(f"chunk_size must be positive for each of {sorted(arrays)}, got {chunk_size}")
        self.sizes = {name: whole_number("chunk_size", size) for name, size in sizes.items()}
        self.pad_last = pad_last

    def take(self, rows: Rows) -> Chunk:
        """Returns the queries of some rows.

        Raises:
            OSError: If they are mapped and their file has become shorter.
        """
        queries = {}
        for name, (begin, end) in rows.items():
            file = self.files[name]
            if file is not None:
                file.check()
            part = self.arrays[name][..., begin:end, :]
            # A copy of what is mapped, which torch would otherwise share although it must not be written to.
            part = part if isinstance(part, Tensor) else torch.tensor(part)
            part = part if self.batched else part[None]
            missing = self.sizes[name] - (end - begin)
            if self.pad_last and 0 < missing and begin > 0:
                part = torch.cat((part, part[:, -1:].expand(-1, missing, -1)), dim=1)
            queries[name] = part
        return Chunk(dict(rows), queries)

    def skip(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the rows that are done."""
        for name, end in done.items():
            for begin in range(0, end, BLOCK):
                chunk = self.take({name: (begin, min(begin + BLOCK, end))})
                rows = chunk.rows[name]
                yield Chunk(chunk.rows, {name: chunk.queries[name][:, : rows[1] - rows[0]]})

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

    def like(self, branch: str, n: int) -> Tensor:
        """Returns n rows of zeros (B, n, F) such as the branch has."""
        part = self.arrays[branch][..., :0, :]
        part = part if isinstance(part, Tensor) else torch.tensor(part)
        part = part if self.batched else part[None]
        return part.new_zeros((part.shape[0], n, part.shape[2]))


class IteratorSource:
    """Takes chunks (n, F) or (B, n, F), or dictionaries of these by branch, as they come.

    Args:
        queries: The chunks. To continue where an earlier run stopped, those that are done are read and dropped.
    """

    def __init__(self, queries: Iterable[Any]) -> None:
        self.iterator = iter(queries)
        self.named = False
        self.batched = True
        self.totals: dict[str, int] | None = None
        self.branches: list[str] = []
        self.first: tuple[bool, tuple[int, ...]] | None = None
        self.ends: dict[str, int] = {}
        self.empty: dict[str, Tensor] = {}

    def skip(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the rows that are done.

        Raises:
            ValueError: If no chunk ends where the earlier run stopped.
        """
        while any(self.ends.get(name, 0) < end for name, end in done.items()):
            chunk = self._next()
            if chunk is None:
                raise ValueError(f"the iterator ended at {self.ends}, before the rows {dict(done)} of the earlier run")
            if any(end > done.get(name, 0) for name, end in self.ends.items()):
                raise ValueError(f"no chunk of the iterator ends where the earlier run stopped, at {dict(done)}")
            yield chunk

    def chunks(self, done: Mapping[str, int]) -> Iterator[Chunk]:
        """Yields the chunks behind the rows that were skipped.

        Raises:
            ValueError: If a chunk's shape does not fit, or there was none at all.
        """
        while (chunk := self._next()) is not None:
            if chunk.rows:
                yield chunk
        if self.first is None:
            raise ValueError("queries gave no chunk at all; an iterator that was used before is empty")

    def like(self, branch: str, n: int) -> Tensor:
        """Returns n rows of zeros (B, n, F) such as the branch has."""
        part = self.empty[branch]
        return part.new_zeros((part.shape[0], n, part.shape[2]))

    def _next(self) -> Chunk | None:
        for item in self.iterator:
            named = isinstance(item, Mapping)
            parts: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {ONLY: item}
            queries, rows = {}, {}
            for name, part in parts.items():
                refuse_path("a chunk", part)
                tensor = part if isinstance(part, Tensor) else torch.tensor(part)
                if tensor.dim() not in (2, 3):
                    raise ValueError(f"a chunk must be (n, F) or (B, n, F), got shape {tuple(tensor.shape)}")
                kind = (named, tuple(tensor.shape[:-2]))
                self.first = kind if self.first is None else self.first
                if kind != self.first:
                    raise ValueError(
                        "chunks must all be arrays or all dictionaries, of one rank and batch size, got one of shape "
                        f"{tuple(tensor.shape)} at {name!r} behind others of batch {self.first[1]}"
                    )
                self.named, self.batched = named, tensor.dim() == 3
                tensor = tensor if self.batched else tensor[None]
                if name not in self.empty:
                    self.empty[name] = tensor[:, :0]
                    self.branches.append(name)
                begin = self.ends.get(name, 0)
                self.ends[name] = begin + tensor.shape[1]
                if self.ends[name] > begin:
                    rows[name] = (begin, self.ends[name])
                    queries[name] = tensor
            return Chunk(rows, queries)
        return None
