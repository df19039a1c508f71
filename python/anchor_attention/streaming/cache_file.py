"""The file of a cache: what ``torch.save`` writes, with a checksum behind it.

``torch.load`` opens it as it is. The checksum is over every byte before it, so that damage is found and not computed
with; the tensors are copied into memory, so that nothing happens to them if the file does not stay as it was.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch

MARK = b"anchor_attention sha256 "
TRAILER = len(MARK) + hashlib.sha256().digest_size
BLOCK = 1 << 20


class _Hashing:
    """Writes to a file, and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_file(content: Any, path: str | os.PathLike[str]) -> None:
    """Writes tensors and plain values in dictionaries, lists and tuples; the file appears whole or not at all.

    Raises:
        OSError: If the disk does not take it; the old file stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save(content, cast(BinaryIO, hashing))
            except RuntimeError:
                # torch tells only that its writer is not where it should be.
                if hashing.error is None:
                    raise
                raise hashing.error from None
            file.write(MARK + hashing.hash.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_file(path: str | os.PathLike[str]) -> Any:
    """Reads what :func:`save_file` wrote, onto the CPU.

    Raises:
        ValueError: If the file is none of these, or damaged.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - TRAILER, 0))
        trailer = file.read()
        if len(trailer) != TRAILER or not trailer.startswith(MARK):
            raise ValueError(f"{path} is no file of a cache, or its end is missing: {size} bytes without a checksum")
        file.seek(0)
        found = hashlib.sha256()
        left = size - TRAILER
        while left > 0 and (block := file.read(min(BLOCK, left))):
            found.update(block)
            left -= len(block)
        if left or MARK + found.digest() != trailer:
            raise ValueError(f"{path} is damaged: its {size} bytes don't have the checksum that was written with them")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
