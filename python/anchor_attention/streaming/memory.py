"""How many queries a call may have within a budget of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .sources import ArraySource, whole_number

# The memory of a call is linear in its queries; two sizes that are far enough apart determine the line.
PROBES = (128, 1024)
# What no probe sees: rounding by the allocator, workspaces of libraries, buffers of one tile per thread.
USABLE = 0.9
ROUNDING = 64


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of the tensors that are made inside, on any device, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return result

    def _forget(self, key: int) -> None:
        self.bytes -= self.live.pop(key, 0)


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes at its peak, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with PeakMemory() as memory:
        call()
    return int(memory.peak)


def chunk_size_for_budget(
    decode: Callable[[Any, Any], Any], cache: Any, queries: Any, memory_budget: int, device: torch.device | str = "cpu"
) -> int:
    """Finds how many queries of each branch a call may have, by trying two small calls.

    Args:
        decode: As for :func:`stream`.
        cache: What ``decode`` takes as its cache.
        queries: Arrays, as for :func:`stream`.
        memory_budget: Bytes that a call may take beyond weights, cache and queries.
        device: Where to decode.

    Returns:
        Rows per branch, at least 1 and at most the longest branch.

    Raises:
        ValueError: If not even one row fits, or the budget is no number of bytes.
    """
    memory_budget = whole_number("memory_budget, in bytes,", memory_budget)
    device = torch.device(device)
    longest = max(ArraySource(queries, 1).totals.values(), default=0)  # type: ignore[union-attr]
    if longest == 0:
        return 1
    peaks = []
    sizes = [min(size, longest) for size in PROBES]
    for size in sizes:
        source = ArraySource(queries, size)
        chunk = next(source.chunks({}))
        inputs = {name: part.to(device) for name, part in chunk.queries.items()}
        given = inputs if source.named else next(iter(inputs.values()))

        def call(given: Any = given) -> object:
            return decode(cache, given)

        with torch.no_grad():
            call()
            peaks.append(peak_of(call, device))
    per_row = max((peaks[1] - peaks[0]) / max(sizes[1] - sizes[0], 1), peaks[1] / sizes[1] if longest < 2 else 1.0)
    constant = max(peaks[1] - per_row * sizes[1], 0.0)
    fitting = int((USABLE * memory_budget - constant) // per_row)
    if fitting < 1:
        raise ValueError(
            f"memory_budget must hold at least one query: {constant + per_row:.0f} of {USABLE:.0%} of "
            f"{memory_budget} bytes"
        )
    return min(fitting if fitting < ROUNDING else fitting // ROUNDING * ROUNDING, longest)
