"""Decodes chunks on a device, and moves them there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .sources import Chunk

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensors]


def decode_in_turn(call: Call, chunks: Iterator[Chunk], device: torch.device) -> Iterator[tuple[Chunk, Tensors]]:
    """Yields each chunk with its outputs on the host, one after the other.

    Args:
        call: From queries to outputs, both by name, on the device.
        chunks: What to decode.
        device: Where to.
    """
    for chunk in chunks:
        outputs = call({name: queries.to(device) for name, queries in chunk.queries.items()})
        yield chunk, {name: value.cpu() for name, value in outputs.items()}


def decode_overlapped(call: Call, chunks: Iterator[Chunk], device: torch.device) -> Iterator[tuple[Chunk, Tensors]]:
    """As :func:`decode_in_turn` on a GPU that computes while the next queries and the last outputs are copied.

    The outputs are only valid until the next chunk is asked for.
    """
    with torch.cuda.device(device):
        copies = _Copies(torch.device("cuda", torch.cuda.current_device()))
        chunk = next(chunks, None)
        queries = None if chunk is None else copies.upload(chunk.queries)
        behind: tuple[Chunk, Tensors, Any] | None = None
        while chunk is not None and queries is not None:
            copies.wait_for_upload(queries)
            outputs, arrived = copies.download(call(queries))
            following = next(chunks, None)
            queries = None if following is None else copies.upload(following.queries)
            if behind is not None:
                behind[2].synchronize()
                yield behind[:2]
            behind = (chunk, outputs, arrived)
            chunk = following
        if behind is not None:
            behind[2].synchronize()
            yield behind[:2]


class _Copies:
    """Copies through pinned memory on streams of their own; two buffers each way, so that no copy waits for another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.upload_stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.download_stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.buffers: dict[tuple[str, str, int], Tensor] = {}
        self.uploaded: list[Any] = [None, None]
        self.n_uploads = 0
        self.n_downloads = 0

    def upload(self, tensors: Tensors) -> Tensors:
        """Begins to copy to the device; :meth:`wait_for_upload` comes before anything reads the copies."""
        turn = self.n_uploads % 2
        self.n_uploads += 1
        if self.uploaded[turn] is not None:
            # Until then the copy before the last reads the buffer.
            self.uploaded[turn].synchronize()
        copies = {}
        with torch.cuda.stream(self.upload_stream):
            for name, tensor in tensors.items():
                if tensor.device == self.device:
                    copies[name] = tensor
                    continue
                pinned = self._buffer("upload", name, turn, tensor)
                pinned.copy_(tensor)
                copies[name] = pinned.to(self.device, non_blocking=True)
            self.uploaded[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.uploaded[turn].record()
        return copies

    def wait_for_upload(self, copies: Tensors) -> None:
        """Makes the computing stream wait for the uploads so far."""
        computing: Any = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.upload_stream)
        for tensor in copies.values():
            # Their memory belongs to the other stream's pool: it must not be reused before this stream is done with it.
            tensor.record_stream(computing)

    def download(self, tensors: Tensors) -> tuple[Tensors, Any]:
        """Begins to copy to the host after the tensors are computed; returns the copies and the event of arrival."""
        turn = self.n_downloads % 2
        self.n_downloads += 1
        computing: Any = torch.cuda.current_stream(self.device)
        self.download_stream.wait_stream(computing)
        copies = {}
        with torch.cuda.stream(self.download_stream):
            for name, tensor in tensors.items():
                copies[name] = self._buffer("download", name, turn, tensor)
                copies[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self.download_stream)
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return copies, arrived

    def _buffer(self, way: str, name: str, turn: int, like: Tensor) -> Tensor:
        key = (way, name, turn)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
            buffer = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
            self.buffers[key] = buffer
        return buffer[: like.numel()].view(like.shape)
