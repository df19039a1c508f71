"""Which operations kernels use, for tests that compare what different programs have been run with.

A process that has PTX_EMULATOR_OPERATIONS in its environment adds the operations of every kernel that it launches to
the file of that name.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path

from .lower import LoweredKernel

_VARIABLE = "PTX_EMULATOR_OPERATIONS"
_recorded: set[str] = set()


def operations(lowered: LoweredKernel) -> set[str]:
    """Names of a kernel's operations; products of warpgroups by where their left operand is."""
    found = set()
    for name, n_operands in zip(lowered.operations, lowered.code[:, 3], strict=True):
        if name.startswith("wgmma.mma_async"):
            n_accumulators = int(name.split(".")[4].split("n")[1].split("k")[0]) // 2
            name += " with A in registers" if n_operands - n_accumulators >= 8 else " with A in shared memory"
        found.add(name)
    return found


def record(lowered: LoweredKernel) -> None:
    """Remembers the operations of a kernel that is launched, where the environment asks for that."""
    path = os.environ.get(_VARIABLE)
    if path is None:
        return
    if not _recorded:
        atexit.register(_write, Path(path))
    _recorded.update(operations(lowered))


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read(path) if path.exists() else set()
    path.write_text("\n".join(sorted(before | _recorded)) + "\n")


def read(path: Path) -> set[str]:
    """The operations that a file lists."""
    return set(path.read_text().splitlines())
