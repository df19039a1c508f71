"""Times on a GPU: CUDA events around a call that finds a cold level-2 cache and no waiting host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from anchor_attention.benchmark.timing import cuda_seconds, wall_seconds

T = TypeVar("T")

# Many times the level-2 cache of any GPU yet.
FLUSH_BYTES = 2**30
# About a millisecond in which the GPU waits: the host launches meanwhile all that a call consists of.
WAIT_CYCLES = 2_000_000


def interleave_cold(
    contestants: Mapping[str, Callable[[T], object]], inputs: Sequence[T], rounds: int, device: str
) -> dict[str, list[float]]:
    """Times every contestant once per round, each after a flush of the cache, on input sets taken in turn.

    Args:
        contestants: Functions of the inputs, by name; they have run before.
        inputs: The sets of inputs.
        rounds: How many.
        device: Where; on the CPU it is the wall clock, without a flush.

    Returns:
        Seconds by contestant, one entry for each round.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def occupy() -> None:
        if flushed is not None:
            flushed.zero_()
            torch.cuda._sleep(WAIT_CYCLES)

    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            chosen = inputs[i % len(inputs)]
            seconds[name].append(
                wall_seconds(contestants[name], chosen)
                if flushed is None
                else cuda_seconds(contestants[name], chosen, occupy)
            )
    return seconds


def peak_above_inputs(contestant: Callable[[T], object], inputs: T, device: str) -> int | None:
    """Bytes of GPU memory that a call needs at its peak above what is there before it; ``None`` on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = contestant(inputs)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
