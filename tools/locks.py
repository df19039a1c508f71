"""Keeps parallel processes from doing one piece of work twice."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def once_at_a_time(lock: Path) -> Iterator[None]:
    """Waits for other processes that hold the lock file; a process that dies gives it back."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
