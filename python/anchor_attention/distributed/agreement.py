"""What processes tell each other once per layout: sizes, and whether all are making the same call."""

from __future__ import annotations

import hashlib

import torch.distributed as dist

from .collectives import ProcessError, exchange_numbers

# Integers in the first message. What does not fit goes in a second one.
HEADER = 64
INLINE = HEADER - 4


def agree(description: str, numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Tells the other processes ``numbers`` and learns theirs. Each of them must call it, or :func:`fail`.

    Args:
        description: What must be the same everywhere.
        numbers: What may differ.
        group: The processes.

    Returns:
        The numbers of every process.

    Raises:
        ValueError: On every process, if the descriptions differ; the message holds two that do.
        ProcessError: On every process but those that called :func:`fail`, if some did; or if one has ended or does not
            answer in time.
    """
    return _exchange(description, numbers, group, failed=False)


def fail(error: Exception, group: dist.ProcessGroup) -> None:
    """Joins the agreement in which the other processes are waiting, to tell them that this one can't continue."""
    try:
        _exchange(f"{type(error).__name__}: {error}", [], group, failed=True)
    except (ProcessError, ValueError):
        # The caller raises what it came from.
        return


def _exchange(text: str, numbers: list[int], group: dist.ProcessGroup, *, failed: bool) -> list[list[int]]:
    data = text.encode()
    digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)
    inline = numbers[:INLINE]
    header = [int(failed), digest, len(data), len(numbers), *inline, *(0,) * (INLINE - len(inline))]
    headers = exchange_numbers(header, group)
    failures = [rank for rank, header in enumerate(headers) if header[0]]
    different = [rank for rank, header in enumerate(headers) if header[1] != headers[0][1]]
    if failures or different:
        texts = _texts(data, [header[2] for header in headers], group)
        if failures:
            raise ProcessError(f"process {failures[0]} of the group failed: {texts[failures[0]]}")
        raise ValueError(
            f"processes must make the same call, got on process 0 of the group {texts[0]}, "
            f"on process {different[0]} {texts[different[0]]}"
        )
    most = max(header[3] for header in headers)
    rows = [header[4:] for header in headers]
    if most > INLINE:
        rest = exchange_numbers([*numbers[INLINE:], *(0,) * (most - max(len(numbers), INLINE))], group)
        rows = [row + more for row, more in zip(rows, rest, strict=True)]
    return [row[: header[3]] for row, header in zip(rows, headers, strict=True)]


def _texts(data: bytes, lengths: list[int], group: dist.ProcessGroup) -> list[str]:
    rows = exchange_numbers([*data, *(0,) * (max(lengths) - len(data))], group)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
