"""Files that are mapped into memory: touching a page that the file or its disk lacks would end the process."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MappedFile:
    """The part of a file that is mapped.

    Args:
        name: What is mapped, for messages.
        path: The file.
        begin: First byte, and end: behind the last.
    """

    name: str
    path: str
    begin: int
    end: int

    def check(self) -> None:
        """Checks that the file is as long as its map.

        Raises:
            OSError: If it is gone or has become shorter.
        """
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            raise OSError(errno.ENOENT, f"{self.name} maps a file that is gone", self.path) from None
        if size < self.end:
            raise OSError(
                errno.EIO, f"{self.name} maps {self.end} bytes of a file that was truncated to {size} bytes", self.path
            )

    def reserve(self) -> None:
        """Has the file system reserve the space that the map may write to.

        Raises:
            OSError: If the disk is too full, or as for :meth:`check`.
        """
        self.check()
        size = self.end - self.begin
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(self.path))).free
        full = OSError(
            errno.ENOSPC,
            f"{self.name} maps {size} bytes of a file, for the rest of which its disk has {free} bytes left",
            self.path,
        )
        # Asked first: a file system may fill its disk before it says that it can't.
        if size - os.stat(self.path).st_blocks * 512 > free:
            raise full
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, self.begin, size)
        except OSError as error:
            # Any other error means that the file system can't reserve space.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise full from None
        finally:
            os.close(descriptor)


def mapped_file(name: str, array: Any) -> MappedFile | None:
    """The file behind a NumPy memory map, a view of one, or a tensor that torch has mapped; ``None`` if there is none.

    A tensor that ``torch.from_numpy`` made from a memory map hides its file.
    """
    if isinstance(array, Tensor):
        storage = array.untyped_storage() if array.device.type == "cpu" else None
        path = getattr(storage, "filename", None)
        return None if path is None or storage is None else MappedFile(name, path, 0, storage.nbytes())
    numpy = sys.modules.get("numpy")
    while numpy is not None and isinstance(array, numpy.ndarray):
        if isinstance(array, numpy.memmap) and array._mmap is not None and array.filename is not None:
            begin = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
            return MappedFile(name, os.fspath(array.filename), begin, begin + len(array._mmap))
        array = array.base
    return None
