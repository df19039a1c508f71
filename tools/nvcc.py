"""Where the CUDA compiler is: the one answer for builds of the tools, and for the tests that need it."""

from __future__ import annotations

import os
import shutil

MISSING = "nvcc is not on PATH, and CUDACXX does not name it"


def find_nvcc() -> str | None:
    """The compiler that CMake would use too: ``CUDACXX``, or nvcc on ``PATH``; None where there is none."""
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def nvcc() -> str:
    """The compiler, or an error that says how to have it found."""
    found = find_nvcc()
    if found is None:
        raise RuntimeError(f"{MISSING}: install the CUDA toolkit")
    return found
