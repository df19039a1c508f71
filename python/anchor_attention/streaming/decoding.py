"""Decodes any number of queries in chunks against a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import Cache
from .checkpoint import Checkpoint
from .memory import chunk_size_for_budget
from .progress import Progress, ProgressBar
from .sinks import ArraySink, CallbackSink, branch_of_output
from .sources import ONLY, ArraySource, Chunk, IteratorSource, Source
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
            makes tensors on the host.
        chunk_size: Rows per call of every branch, or by branch; 65536 if neither it nor a budget is given.
        memory_budget: Bytes that a call may take beyond weights, cache and queries: chooses the chunk size.
        device: Where to decode; that of the cache's first tensor if not given. On a GPU, copies of the next queries and
            of the last outputs overlap with the computation.
        pad_last: Whether the last odd chunk is filled up to the size of the others, for a ``decode`` that would be
            compiled anew for another size. What is computed for the padding is dropped.
        raise_on_nan: Whether a NaN in an output ends the run, before its chunk is written.
        checkpoint: A file that notes what is written. If it exists, the run continues after the last whole chunk; it
            is deleted at the end. An iterable must begin at its beginning again.
        branch_of: The branch of outputs whose name does not contain it.
        progress: ``True`` draws a bar with speed and time left; a function is called after every chunk.

    Returns:
        The outputs and some figures.

    Raises:
        ValueError: If arguments contradict each other, or a shape does not fit.
        FloatingPointError: If ``raise_on_nan`` and an output holds a NaN; the text says in which row.
    """
    tree = cache.tree if isinstance(cache, Cache) else cache
    place = _device(tree, device)
    source, size = _source(decode, tree, queries, chunk_size, memory_budget, place, pad_last)
    note = None if checkpoint is None else Checkpoint(checkpoint)
    if note is not None and outputs is None:
        raise ValueError("checkpoint needs outputs that outlive an interruption, got outputs=None")
    done = {} if note is None else note.read(source.totals)
    report = _bar(progress)
    before = sum(done.values())

    def call(inputs: Tensors) -> Tensors:
        with torch.no_grad():
            result = decode(tree, inputs if source.named else inputs[ONLY])
        return dict(result) if isinstance(result, Mapping) else {ONLY: result}

    decoded = decode_overlapped if place.type == "cuda" else decode_in_turn
    sink: ArraySink | CallbackSink | None = None
    start, n_points, n_chunks = time.perf_counter(), 0, 0
    for chunk, values in decoded(call, source.chunks(done), place):
        branches = {name: branch_of_output(name, list(source.totals or chunk.rows), branch_of) for name in values}
        values = _own_rows(values, branches, chunk)
        if raise_on_nan:
            for name, value in values.items():
                _refuse_nan(name, value, chunk.rows[branches[name]][0])
        if sink is None:
            sink = _sink(outputs, source, place)
        sink.write(values, chunk.rows, branches)
        done = {**done, **{name: end for name, (_, end) in chunk.rows.items()}}
        if note is not None:
            sink.flush()
            note.write(done, source.totals)
        n_points += sum(end - begin for begin, end in chunk.rows.values())
        n_chunks += 1
        total = None if source.totals is None else sum(source.totals.values())
        if report is not None:
            report(Progress(before + n_points, total, n_points, time.perf_counter() - start))
    sink = _sink(outputs, source, place) if sink is None else sink
    sink.flush()
    if note is not None:
        note.remove()
    if isinstance(report, ProgressBar):
        report.close()
    return StreamReport(sink.result(), n_points, n_chunks, time.perf_counter() - start, size)


def _device(tree: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
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


def _sink(outputs: Any, source: Source, device: torch.device) -> ArraySink | CallbackSink:
    if callable(outputs):
        # What came through a pinned buffer will be written over.
        return CallbackSink(outputs, source.named, copy=device.type == "cuda")
    return ArraySink(outputs, source.totals, source.batched)


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
        n = chunk.queries[branches[name]].shape[1]
        if value.dim() != 3 or value.shape[1] != n:
            raise ValueError(f"decode must return (B, {n}, C) for {name or 'its output'!r}, got {tuple(value.shape)}")
        kept[name] = value.detach()[:, : end - begin]
    return kept


def _refuse_nan(name: str, value: Tensor, begin: int) -> None:
    rows = value.isnan().any(dim=-1).any(dim=0)
    if bool(rows.any()):
        row = begin + int(rows.nonzero()[0])
        raise FloatingPointError(f"{name or 'the output'} holds NaN in {int(rows.sum())} rows, first in row {row}")
