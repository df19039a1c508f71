"""Decodes any number of queries in chunks against a cache."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import Cache
from .checkpoint import Checkpoint, Progressed
from .fingerprints import RowHash, fingerprint, weights_fingerprint
from .memory import chunk_size_for_budget
from .progress import Progress, ProgressBar
from .sinks import ArraySink, CallbackSink, branch_of_output
from .sources import ONLY, ArraySource, Chunk, IteratorSource, Rows, Source, refuse_path
from .transfer import Tensors, decode_in_turn, decode_overlapped

DEFAULT_CHUNK_SIZE = 65536


@dataclass(frozen=True)
class StreamReport:
    """What a stream did.

    Args:
        outputs: All outputs, ``None`` if they went to a function.
        points: Points of all branches that this run decoded.
        chunks: Calls that it took.
        seconds: Time that it took.
        chunk_size: Rows of a chunk, ``None`` if an iterator gave them.
    """

    outputs: Any
    points: int
    chunks: int
    seconds: float
    chunk_size: int | Mapping[str, int] | None


def stream(
    decode: Callable[[Any, Any], Any],
    cache: Any,
    queries: Any,
    outputs: Any = None,
    *,
    chunk_size: int | Mapping[str, int] | None = None,
    memory_budget: int | None = None,
    device: torch.device | str | None = None,
    pad_last: bool = False,
    raise_on_nan: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    branch_of: Mapping[str, str] | None = None,
    progress: bool | Callable[[Progress], None] = False,
) -> StreamReport:
    """Decodes queries in chunks. The result does not depend on the chunks, since queries don't read each other.

    Args:
        decode: Called with the cache and a chunk: (B, n, F), or a dictionary of these by branch, in which branches that
            have run out are missing. Returns (B, n, C), or a dictionary of these by any names.
        cache: What ``decode`` takes; of a :class:`Cache`, its tree.
        queries: (N, F) or (B, N, F), where (N, F) stands for B = 1: a tensor, a NumPy array or memory map, or a
            dictionary of these by branch, whose lengths may differ; or an iterable of chunks, used as they are.
        outputs: Where the outputs go: an array (N, C) or (B, N, C) as above, a dictionary of these by the names that
            ``decode`` returns, or a function that is called once per chunk with the outputs and their rows. ``None``
            makes tensors on the host. Every row of an array must have its query.
        chunk_size: Rows per call of every branch, or by branch; 65536 if neither it nor a budget is given.
        memory_budget: Bytes that a call may take beyond weights, cache and queries: chooses the chunk size.
        device: Where to decode; that of the cache's first tensor if not given. On a GPU, copies of the next queries and
            of the last outputs overlap with the computation.
        pad_last: Whether a shorter last chunk is padded to the size of the others, for a ``decode`` that would be
            compiled again for another size. What is computed for the padding is dropped.
        raise_on_nan: Whether a NaN in an output ends the run, before its chunk is written.
        checkpoint: A file that notes what is written. If it exists, the run continues after the last whole chunk; it
            is deleted at the end. An iterable must begin at its beginning again. The finished rows are read again,
            queries and outputs, and these, the cache and the weights of the modules that ``decode`` reaches must be
            what they were. What a function received can't be checked.
        branch_of: The branch of outputs whose name does not contain it.
        progress: ``True`` draws a bar with speed and time left; a function is called after every chunk.

    Returns:
        The outputs and some figures.

    Raises:
        ValueError: If arguments contradict each other, a shape does not fit, an output of a chunk is missing, or the
            checkpoint belongs to another run. Arrays are checked before anything is decoded, outputs before any is
            written.
        OSError: If a file that is mapped into memory has become shorter, or its disk lacks the space.
        FloatingPointError: If ``raise_on_nan`` and an output holds a NaN; the message says in which row.
    """
    tree = cache.tree if isinstance(cache, Cache) else cache
    if isinstance(cache, (str, os.PathLike)):
        raise ValueError(f"cache must be what decode takes, got the path {os.fspath(cache)!r}: use Cache.load(path)")
    place = _device(tree, device)
    note = None if checkpoint is None else Checkpoint(checkpoint)
    if note is not None and outputs is None:
        raise ValueError("checkpoint needs outputs that outlive an interruption, got outputs=None")
    source, size = _source(decode, tree, queries, chunk_size, memory_budget, place, pad_last)
    if source.totals is not None:
        for name in branch_of or ():
            branch_of_output(name, source.branches, branch_of)
    sink: ArraySink | CallbackSink
    if callable(outputs):
        # What came through a pinned buffer will be overwritten.
        sink = CallbackSink(outputs, source, copy=place.type == "cuda")
    else:
        sink = ArraySink(outputs, source, branch_of)
    report = _bar(progress)

    def call(inputs: Tensors) -> Tensors:
        with torch.no_grad():
            return _named(decode(tree, inputs if source.named else inputs[ONLY]))

    run = _Run(source, sink, branch_of, raise_on_nan)
    if note is not None:
        run.go_on(note, fingerprint(tree), weights_fingerprint(decode))
    empty = _Empty(call, source, sink, run, place)
    empty.fill()
    before = sum(run.done.values())
    decoded = decode_overlapped if place.type == "cuda" else decode_in_turn
    start, n_points, n_chunks = time.perf_counter(), 0, 0
    try:
        for chunk, values in decoded(call, source.chunks(run.done), place):
            run.take(chunk, values)
            if note is not None:
                sink.flush()
                run.note(note, chunk)
            n_points += sum(end - begin for begin, end in chunk.rows.values())
            n_chunks += 1
            total = None if source.totals is None else sum(source.totals.values())
            if report is not None:
                report(Progress(before + n_points, total, n_points, time.perf_counter() - start))
    finally:
        if isinstance(report, ProgressBar):
            report.close()
    if source.totals is None:
        empty.fill()
    sink.flush()
    if isinstance(sink, ArraySink):
        sink.finish(run.branches, run.done)
    if note is not None:
        note.remove()
    return StreamReport(sink.result(), n_points, n_chunks, time.perf_counter() - start, size)


class _Run:
    """Checks and writes chunk after chunk.

    Attributes:
        done: Rows that are written, by branch.
        branches: The branch of every output that was seen.
    """

    def __init__(
        self, source: Source, sink: ArraySink | CallbackSink, branch_of: Mapping[str, str] | None, raise_on_nan: bool
    ) -> None:
        self.source = source
        self.sink = sink
        self.branch_of = branch_of
        self.raise_on_nan = raise_on_nan
        self.done: dict[str, int] = {}
        self.branches: dict[str, str] = {}
        self.begun: set[str] = set()
        self.read, self.written = RowHash("queries"), RowHash("outputs")
        self.hashes = ("", "")

    def go_on(self, note: Checkpoint, cache: str, weights: str) -> None:
        """Continues an earlier run, if the checkpoint describes one and nothing else has changed."""
        self.hashes = (cache, weights)
        earlier = note.read_all(self.source.totals)
        if not earlier.rows:
            return
        note.check("contents of the cache", earlier.cache, cache)
        note.check("weights", earlier.weights, weights)
        for chunk in self.source.skip(earlier.rows):
            self._read(chunk)
        note.check("queries", earlier.queries, self.read.digests())
        branches = {name: self._branch(name) for name in earlier.outputs}
        for name, branch in branches.items():
            self.sink.hash_rows(self.written, name, 0, earlier.rows.get(branch, 0))
        note.check("rows in outputs than it wrote", earlier.outputs, self.written.digests())
        self.branches.update(branches)
        self.begun.update(branches.values())
        self.done = dict(earlier.rows)

    def take(self, chunk: Chunk, values: Tensors) -> None:
        """Writes the outputs of a chunk."""
        branches = {name: self._branch(name) for name in values}
        values = _own_rows(values, branches, chunk)
        self._check_names(values, branches, chunk.rows)
        if self.raise_on_nan:
            for name, value in values.items():
                _refuse_nan(name, value, chunk.rows[branches[name]][0])
        self.sink.check(values, chunk.rows, branches)
        self.sink.write(values, chunk.rows, branches)
        self.branches.update({name: branches[name] for name in values})
        self.begun.update(chunk.rows)
        self.done = {**self.done, **{name: end for name, (_, end) in chunk.rows.items()}}

    def note(self, note: Checkpoint, chunk: Chunk) -> None:
        """Notes that the outputs of a chunk are on disk."""
        self._read(chunk)
        for name, branch in self.branches.items():
            if branch in chunk.rows:
                self.sink.hash_rows(self.written, name, *chunk.rows[branch])
        cache, weights = self.hashes
        progressed = Progressed(self.done, cache, weights, self.read.digests(), self.written.digests())
        note.write(progressed, self.source.totals)

    def _branch(self, name: str) -> str:
        return branch_of_output(name, self.source.branches, self.branch_of)

    def _read(self, chunk: Chunk) -> None:
        for name, (begin, end) in chunk.rows.items():
            self.read.update(name, chunk.queries[name][:, : end - begin])

    def _check_names(self, values: Tensors, branches: Mapping[str, str], rows: Rows) -> None:
        """Checks that a chunk has the outputs that the chunks before it had: else some of their rows stay unwritten."""
        given = self.sink.given
        for name in values:
            if given and name not in given:
                raise ValueError(f"outputs must hold an array for {name!r}, got {sorted(given)}")
        known = {**{name: self._branch(name) for name in given}, **self.branches}
        for name, branch in known.items():
            if branch in rows and name not in values:
                raise ValueError(f"decode must return {name!r} for rows {rows[branch]} too, got {sorted(values)}")
        for name in values:
            if name not in known and branches[name] in self.begun:
                raise ValueError(f"decode returned {name!r} only from row {rows[branches[name]][0]} on")
        for branch in rows:
            if branch not in {branches[name] for name in values}:
                raise ValueError(f"decode returned no output for rows {rows[branch]} of {branch or 'the queries'!r}")


@dataclass
class _Empty:
    """Gives branches without a row outputs without a row.

    The number of channels is found by a call with no rows, or, if the model can't take that, with one row of zeros.
    """

    call: Callable[[Tensors], Tensors]
    source: Source
    sink: ArraySink | CallbackSink
    run: _Run
    device: torch.device

    def fill(self) -> None:
        """Makes the outputs that no chunk will make."""
        ends = self.run.done if self.source.totals is None else self.source.totals
        branches = [name for name in self.source.branches if not ends.get(name, 0)]
        if not branches or isinstance(self.sink, CallbackSink) or self.sink.given:
            return
        failed: Exception | None = None
        for n in (0, 1):
            try:
                values = self.call({name: self.source.like(name, n).to(self.device) for name in branches})
                owners = {name: branch_of_output(name, self.source.branches, self.run.branch_of) for name in values}
                rows = {name: (0, n) for name in branches}
                queries = {name: self.source.like(name, n) for name in branches}
                values = {name: value.cpu() for name, value in values.items()}
                self.sink.make_empty(_own_rows(values, owners, Chunk(rows, queries)), owners)
                return
            except Exception as error:  # A model may raise anything on such a call.
                failed = failed or error
        message = f"decode can't be called for the branches {branches}, which have no rows ({failed!r})"
        if len(branches) == len(self.source.branches):
            raise ValueError(f"{message}: give outputs, or don't call stream") from failed
        warnings.warn(f"{message}: they have no outputs", stacklevel=3)


def _named(result: Any) -> Tensors:
    values = dict(result) if isinstance(result, Mapping) else {ONLY: result}
    for name, value in values.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            what = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
            raise ValueError(
                f"decode must return a tensor (B, n, C) or a dictionary of these by name, got {what}"
                + (f" at {name!r}" if isinstance(result, Mapping) else "")
            )
    return values


def _device(tree: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one of this machine, got {str(place)!r}: torch finds no GPU")
        return place
    first = next((leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)
    return torch.device("cpu") if first is None else first.device


def _source(
    decode: Callable[[Any, Any], Any],
    tree: Any,
    queries: Any,
    chunk_size: int | Mapping[str, int] | None,
    memory_budget: int | None,
    device: torch.device,
    pad_last: bool,
) -> tuple[Source, int | Mapping[str, int] | None]:
    refuse_path("queries", queries)
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(f"give chunk_size or memory_budget, got {chunk_size} and {memory_budget}")
    if not isinstance(queries, Mapping) and not hasattr(queries, "shape"):
        if not isinstance(queries, Iterable):
            raise ValueError(f"queries must be an array, a dictionary of arrays or an iterable, got {type(queries)}")
        if chunk_size is not None or memory_budget is not None or pad_last:
            raise ValueError("an iterable decides on the chunks: chunk_size, memory_budget and pad_last don't apply")
        return IteratorSource(queries), None
    if memory_budget is not None:
        chunk_size = chunk_size_for_budget(decode, tree, queries, memory_budget, device)
    size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
    return ArraySource(queries, size, pad_last), size


def _bar(progress: bool | Callable[[Progress], None]) -> Callable[[Progress], None] | None:
    if callable(progress):
        return progress
    return ProgressBar() if progress else None


def _own_rows(values: Tensors, branches: Mapping[str, str], chunk: Chunk) -> Tensors:
    """Checks the shapes, and drops what belongs to padding or to a branch that has run out."""
    kept = {}
    for name, value in values.items():
        if branches[name] not in chunk.rows:
            continue
        begin, end = chunk.rows[branches[name]]
        batch, n, _ = chunk.queries[branches[name]].shape
        if value.dim() != 3 or tuple(value.shape[:2]) != (batch, n):
            raise ValueError(
                f"decode must return ({batch}, {n}, C) for {name or 'its output'!r}, got {tuple(value.shape)}"
            )
        kept[name] = value.detach()[:, : end - begin]
    return kept


def _refuse_nan(name: str, value: Tensor, begin: int) -> None:
    rows = value.isnan().any(dim=-1).any(dim=0)
    if bool(rows.any()):
        row = begin + int(rows.nonzero()[0])
        raise FloatingPointError(f"{name or 'the output'} holds NaN in {int(rows.sum())} rows, first in row {row}")
