"""Loads the compiled operations, or says why they can't be loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

MIN_TORCH = (2, 10)
LIBRARY_VARIABLE = "ANCHOR_ATTENTION_LIBRARY"


class CpuInstructionSets(NamedTuple):
    """Instruction sets that the CPU kernels are compiled for, best first.

    Attributes:
        selected: The one in use: the best, or the one that ``$ANCHOR_ATTENTION_CPU_ISA`` names.
        runnable: Those that this processor runs.
        compiled: All that are in the library.
    """

    selected: str
    runnable: tuple[str, ...]
    compiled: tuple[str, ...]


def cpu_instruction_sets() -> CpuInstructionSets:
    """Says which instruction sets the CPU kernels have, and which one they use.

    Raises:
        RuntimeError: If ``$ANCHOR_ATTENTION_CPU_ISA`` names none that this processor runs.
    """
    selected, runnable, compiled = torch.ops.anchor_attention.cpu_instruction_sets()
    return CpuInstructionSets(selected, tuple(runnable.split(",")), tuple(compiled.split(",")))


def library_path() -> Path:
    """Path of the shared library: ``$ANCHOR_ATTENTION_LIBRARY`` where it is set, else the one in the package."""
    override = os.environ.get(LIBRARY_VARIABLE)
    return Path(override) if override else Path(__file__).with_name("libanchor_attention.so")


def load() -> None:
    """Registers ``torch.ops.anchor_attention.*``.

    Raises:
        ImportError: If torch is too old, the library is missing, or it was built for another architecture or torch.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise ImportError(f"anchor_attention needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found {torch.__version__}")
    path = library_path()
    if not path.is_file():
        raise ImportError(
            f"anchor_attention: the compiled library {path} is missing; build it with "
            f"'pip install --no-build-isolation .' or point {LIBRARY_VARIABLE} to one"
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"anchor_attention: {path} can't be loaded with torch {torch.__version__} on this machine; "
            f"rebuild it here with 'pip install --no-build-isolation .' ({error})"
        ) from error
