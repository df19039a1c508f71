"""Times on a GPU: CUDA events around a call that finds a cold level-2 cache and no waiting host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

from anchor_attention.benchmark.timing import cuda_seconds, wall_seconds

T = TypeVar("T")

# Many times the level-2 cache of any GPU yet.
FLUSH_BYTES = 2**30
# No GPU's clock is faster yet. The GPU waits until the host has launched all that a call consists of, and at least a
# millisecond; a contestant that waits for the GPU itself makes the host's time meaningless, hence the most.
CYCLES_PER_SECOND = 2.2e9
LEAST_WAIT_SECONDS, MOST_WAIT_SECONDS, WAITS_PER_LAUNCH = 1e-3, 20e-3, 2.0


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

    if flushed is not None:
        cycles = {name: wait_cycles(_launch_seconds(contestants[name], inputs[0])) for name in names}

    def occupy(name: str) -> None:
        if flushed is not None:
            flushed.zero_()
            torch.cuda._sleep(cycles[name])

    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            chosen = inputs[i % len(inputs)]
            seconds[name].append(
                wall_seconds(contestants[name], chosen)
                if flushed is None
                else cuda_seconds(contestants[name], chosen, partial(occupy, name))
            )
    return seconds


def wait_cycles(launch_seconds: float) -> int:
    """How long the GPU is kept waiting for a host that launches a call in `launch_seconds`."""
    seconds = min(MOST_WAIT_SECONDS, max(LEAST_WAIT_SECONDS, WAITS_PER_LAUNCH * launch_seconds))
    return round(seconds * CYCLES_PER_SECOND)


def _launch_seconds(contestant: Callable[[T], object], inputs: T) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = contestant(inputs)
    seconds = time.perf_counter() - begin
    del result
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
