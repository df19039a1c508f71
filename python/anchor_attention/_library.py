"""Loads the compiled operations, or says why they can't be loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MIN_TORCH = (2, 10)
LIBRARY_VARIABLE = "ANCHOR_ATTENTION_LIBRARY"


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
