"""Streaming of a share of the queries by each process, into one file or one shard each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..streaming import StreamReport, stream
from .agreement import agree, fail
from .collectives import Mesh, ProcessError, process_group

# What a file can hold, by number; bfloat16, which NumPy does not know, is written as float32.
_DTYPES = (torch.float32, torch.float64, torch.float16)


def stream_sharded(
    decode: Callable[[Any, Any], Any],
    cache: Any,
    queries: Any,
    path: str | os.PathLike[str],
    mesh: Mesh = None,
    *,
    shards: bool = False,
    **options: Any,
) -> StreamReport:
    """:func:`anchor_attention.streaming.stream` in every process of a mesh, each with queries of its own.

    The outputs of all go to one file, process by process, or to one shard for each process. Files get their names when
    every process has written all of its rows: where one fails, all raise, and no file of these names is there. Until
    then they end in ``.unfinished``.

    Args:
        decode: Called with the cache and a chunk (1, n, F); returns (1, n, C). It reads cached keys alone, so that no
            process waits for another.
        cache: The cache, of all processes, as a pass under :class:`SequenceParallelAttention` leaves it.
        queries: (N, F) queries of this process: a tensor, an array or a memory map. N may differ, and be 0.
        path: The NumPy file (rows of all processes, C), the same on every process, which must see one file system. A
            shard's name has the process in it: ``fields.npy`` becomes ``fields.1-of-8.npy``.
        mesh: The processes: a mesh of one dimension, a group, or all of them.
        shards: Whether each process writes a file of its own.
        options: Of ``stream``, but for outputs and checkpoint.

    Returns:
        The report of this process; its outputs are the path that it wrote to.

    Raises:
        ValueError: On every process, if paths, widths or types of the outputs differ, or nobody has a query.
        ProcessError: If another process fails, has ended or does not answer in time.
        ImportError: If NumPy is not installed.
    """
    import numpy

    group = process_group(mesh)
    file = _File(Path(path), group, shards, numpy)
    try:
        file.begin(int(queries.shape[0]))
        if queries.shape[0]:
            report = stream(decode, cache, queries, file.write, **options)
        else:
            report = StreamReport(None, 0, 0, 0.0, options.get("chunk_size"))
        file.finish()
    except BaseException as error:
        file.discard()
        if isinstance(error, Exception) and not file.all_know:
            fail(error, group)
        raise
    return StreamReport(str(file.name), report.points, report.chunks, report.seconds, report.chunk_size)


class _File:
    """The rows of this process, in a file that it shares or has for itself.

    Attributes:
        name: The file's name in the end.
        all_know: Whether the other processes know what went wrong: it came from an agreement.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup, shards: bool, numpy: Any) -> None:
        self.group, self.shards, self.numpy = group, shards, numpy
        self.rank = group.rank()
        self.name = path
        if shards:
            self.name = path.with_name(f"{path.stem}.{self.rank + 1}-of-{group.size()}{path.suffix}")
        self.all_know = False
        self._path = path
        self._unfinished = self.name.with_name(f"{self.name.name}.unfinished")
        self._owns = shards or self.rank == 0
        self._counts: list[int] = []
        self._whole: Any = None
        self._rows: Any = None

    def begin(self, n_rows: int) -> None:
        """Learns how many rows the others have."""
        described = f"a stream to {str(self._path)!r} with shards={self.shards}"
        self._counts = [row[0] for row in self._agree(described, [n_rows])]

    def write(self, outputs: Any, rows: Any) -> None:
        """Writes the outputs (1, n, C) of a chunk."""
        if not isinstance(outputs, Tensor):
            raise ValueError(f"decode must return one tensor (1, n, C), got {type(outputs).__name__}")
        values = outputs[0].float() if outputs.dtype == torch.bfloat16 else outputs[0]
        if self._rows is None:
            self._make(values)
        self._rows[rows[0] : rows[1]] = values.numpy()

    def finish(self) -> None:
        """Gives the file its name, once every process has written its rows."""
        if self._rows is None:
            self._make(None)
        self._whole.flush()
        self._agree("rows that are written", [])
        if self._owns:
            self._unfinished.replace(self.name)
        self._agree("files that have their names", [])

    def discard(self) -> None:
        """Removes what this process has begun."""
        self._whole = self._rows = None
        if self._owns:
            self._unfinished.unlink(missing_ok=True)

    def _make(self, values: Tensor | None) -> None:
        """Makes the file, when every process knows how wide its rows are."""
        if values is not None and values.dtype not in _DTYPES:
            raise ValueError(f"decode must return one of {_DTYPES} or bfloat16, got {values.dtype}")
        own = [] if values is None else [values.shape[1], _DTYPES.index(values.dtype)]
        found = {tuple(row) for row in self._agree("outputs", own) if row}
        if len(found) != 1:
            # Everybody has heard the same.
            self.all_know = True
            kinds = [(width, _DTYPES[number]) for width, number in sorted(found)]
            raise ValueError(f"decode must return rows of one width and type on every process, got {kinds}")
        ((width, number),) = found
        begin = 0 if self.shards else sum(self._counts[: self.rank])
        total = self._counts[self.rank] if self.shards else sum(self._counts)
        make = self.numpy.lib.format.open_memmap
        if self._owns:
            dtype = str(_DTYPES[number]).removeprefix("torch.")
            self._whole = make(self._unfinished, mode="w+", dtype=dtype, shape=(total, width))
        self._agree("files that are made", [])
        if not self._owns:
            self._whole = make(self._unfinished, mode="r+")
        self._rows = self._whole[begin : begin + self._counts[self.rank]]

    def _agree(self, described: str, numbers: list[int]) -> list[list[int]]:
        try:
            return agree(described, numbers, self.group)
        except (ProcessError, ValueError):
            self.all_know = True
            raise
