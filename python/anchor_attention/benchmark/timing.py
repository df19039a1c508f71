"""Interleaved timing: on a machine whose clock rate varies, only times from the same moment can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float


def interleave(
    contestants: Mapping[str, Callable[[T], object]],
    make_inputs: Callable[[], T],
    *,
    rounds: int,
    warmup: int = 2,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Times every contestant once per round, on inputs that are new in each round.

    Args:
        contestants: Functions of the inputs, by name. What they return is dropped outside the timing.
        make_inputs: Makes the inputs of one round.
        rounds: Rounds that count.
        warmup: Rounds before them that don't.
        device: Where the contestants run. On a GPU, CUDA events take the time.

    Returns:
        Seconds by contestant, one entry for each round.

    Raises:
        ValueError: If there is no contestant, ``rounds`` is below 1 or ``warmup`` negative.
    """
    if not contestants:
        raise ValueError("contestants must hold at least one function, got none")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got rounds={rounds} and warmup={warmup}")
    elapsed = cuda_seconds if torch.device(device).type == "cuda" else wall_seconds
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        inputs = make_inputs()
        # Each contestant goes first in turn, so that none always finds the caches left by the same other one.
        first = i % len(names)
        for name in names[first:] + names[:first]:
            duration = elapsed(contestants[name], inputs)
            if i >= warmup:
                seconds[name].append(duration)
    return seconds


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Quartiles:
    """Quartiles of the quotients of the same rounds.

    Raises:
        ValueError: If there is no round, or the numbers of rounds differ.
    """
    if not numerator or len(numerator) != len(denominator):
        raise ValueError(f"both must have the same rounds, at least one, got {len(numerator)} and {len(denominator)}")
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of at least one value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def wall_seconds(contestant: Callable[[T], object], inputs: T) -> float:
    """Seconds of a call by the wall clock; what it returns is dropped outside them."""
    begin = time.perf_counter()
    result = contestant(inputs)
    duration = time.perf_counter() - begin
    del result
    return duration


def cuda_seconds(contestant: Callable[[T], object], inputs: T, prepare: Callable[[], object] = lambda: None) -> float:
    """Seconds between CUDA events around a call; ``prepare`` is launched before the first of them."""
    begin: Any
    end: Any
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    prepare()
    begin.record()
    result = contestant(inputs)
    end.record()
    end.synchronize()
    del result
    return float(begin.elapsed_time(end)) / 1e3
