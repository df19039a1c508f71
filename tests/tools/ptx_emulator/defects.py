"""Runs programs for sm_90a that have planted defects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tools.ptx_emulator.errors import EmulatorError
from tools.ptx_emulator.tensor_map import TensorMap

from tests.tools.ptx_emulator.harness import program, run

SEEDS = range(6)
WORDS = 1024


def launch(
    body: str, threads: int = 128, seed: int = 0, maps: Sequence[tuple[int, TensorMap]] = (), directives: str = ""
) -> NDArray[np.uint32]:
    """Run a program with an output and an input of 4 KiB, and return the output; the input counts from 1."""
    out, source = np.zeros(WORDS, np.uint32), np.arange(1, WORDS + 1, dtype=np.uint32)
    text = program(body, 2, "sm_90a", len(maps), directives)
    run(text, [out, source], threads, maps=maps, seed=seed)
    return out


def without(body: str, line: str, instead: str = "") -> str:
    """The program with one of its lines gone or replaced."""
    if body.count(line) != 1:
        raise ValueError(f"{line!r} is in the program {body.count(line)} times")
    return body.replace(line, instead)


def reported(body: str, error: type[EmulatorError] | tuple[type[EmulatorError], ...], match: str | None = None) -> None:
    """Every seed meets one of the errors."""
    for seed in SEEDS:
        with pytest.raises(error, match=match):
            launch(body, seed=seed)
