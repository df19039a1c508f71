"""What a launch executed, by instruction and by class."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lower import Location, LoweredKernel

_COLUMNS = ("warps", "threads", "requests", "shared_wavefronts", "ideal_wavefronts", "global_sectors",
            "bulk_bytes")  # fmt: skip
_WARPS_PER_GROUP = 4


@dataclass(frozen=True)
class InstructionCount:
    """One static instruction: where it is and what executing it cost."""

    location: Location
    operation: str
    warps: int
    threads: int
    requests: int
    shared_wavefronts: int
    ideal_wavefronts: int
    global_sectors: int
    bulk_bytes: int


class Counters:
    """Counts of one launch. `warps` counts instructions per warp, `threads` per active thread."""

    def __init__(self, lowered: LoweredKernel, counts: NDArray[np.uint64]) -> None:
        self._lowered = lowered
        self._counts = counts.astype(np.int64)

    def instructions(self) -> list[InstructionCount]:
        """Every instruction of the kernel, in program order."""
        return [
            InstructionCount(location, operation, *(int(value) for value in row))
            for location, operation, row in zip(
                self._lowered.locations, self._lowered.operations, self._counts, strict=True
            )
        ]

    def by_operation(self) -> dict[str, int]:
        """Warp instructions of each operation that ran."""
        result: Counter[str] = Counter()
        for operation, row in zip(self._lowered.operations, self._counts, strict=True):
            result[operation] += int(row[0])
        return {operation: n for operation, n in sorted(result.items()) if n}

    def by_class(self) -> dict[str, int]:
        """Warp instructions by the first word of the opcode (`mma`, `ld.shared`, `cp.async`, …)."""
        result: Counter[str] = Counter()
        for operation, n in self.by_operation().items():
            words = operation.split(".")
            spaces = [word for word in words[1:] if word in ("global", "shared", "param", "local", "const", "async")]
            result[".".join([words[0], *spaces[:1]])] += n
        return dict(result)

    def tensor_core(self) -> dict[str, int]:
        """mma instructions of warps and wgmma instructions of warpgroups by shape and types.

        Such as `m16n8k16.f32.bf16.bf16.f32` and `m64n128k16.f32.bf16.bf16`.
        """
        result: Counter[str] = Counter()
        for operation, n in self.by_operation().items():
            words = operation.split(".")
            if words[0] == "mma":
                result[".".join([words[3], *words[6:]])] += n
            elif words[:2] == ["wgmma", "mma_async"]:
                result[".".join(words[4:])] += n // _WARPS_PER_GROUP
        return dict(result)

    def shared_memory(self) -> dict[str, dict[str, int]]:
        """Per operation on shared memory: requests, wavefronts, and wavefronts beyond those without bank conflicts."""
        result: dict[str, dict[str, int]] = defaultdict(lambda: {"requests": 0, "wavefronts": 0, "conflicts": 0})
        for operation, row in zip(self._lowered.operations, self._counts, strict=True):
            if row[3]:
                entry = result[operation]
                entry["requests"] += int(row[2])
                entry["wavefronts"] += int(row[3])
                entry["conflicts"] += int(row[3] - row[4])
        return dict(result)

    def global_memory(self) -> dict[str, dict[str, int]]:
        """Per operation on global memory: requests and 32-byte sectors."""
        result: dict[str, dict[str, int]] = defaultdict(lambda: {"requests": 0, "sectors": 0})
        for operation, row in zip(self._lowered.operations, self._counts, strict=True):
            if row[5]:
                entry = result[operation]
                entry["requests"] += int(row[2])
                entry["sectors"] += int(row[5])
        return dict(result)

    def totals(self) -> dict[str, int]:
        """Sums over the launch, with `ex2` (threads that evaluated one) and `bank_conflicts` beside the columns."""
        sums = {name: int(value) for name, value in zip(_COLUMNS, self._counts.sum(axis=0), strict=True)}
        sums["bank_conflicts"] = sums["shared_wavefronts"] - sums.pop("ideal_wavefronts")
        sums["ex2"] = sum(
            int(row[1])
            for operation, row in zip(self._lowered.operations, self._counts, strict=True)
            if operation.startswith("ex2.")
        )
        return sums

    def as_dict(self) -> dict[str, object]:
        """Everything but the single instructions, ready for JSON."""
        return {
            "totals": self.totals(),
            "classes": self.by_class(),
            "tensor_core": self.tensor_core(),
            "shared_memory": self.shared_memory(),
            "global_memory": self.global_memory(),
        }
