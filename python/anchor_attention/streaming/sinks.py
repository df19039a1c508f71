"""Where outputs go: arrays that are filled, or a function that is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .sources import ONLY, Rows

Callback = Callable[[Any, Any], None]


def branch_of_output(name: str, branches: list[str], given: Mapping[str, str] | None) -> str:
    """Tells whose rows an output has: the branch that is given, of the same name, or the longest one in its name.

    Raises:
        ValueError: If that is none.
    """
    if given is not None and name in given:
        return given[name]
    if len(branches) == 1:
        return branches[0]
    contained = [branch for branch in branches if branch in name]
    if not contained:
        raise ValueError(f"output {name!r} is of none of the branches {branches}: say which in branch_of")
    return max(contained, key=len)


class CallbackSink:
    """Hands every chunk's outputs to a function.

    Args:
        callback: Called with the outputs (B, n, C) and their rows: (begin, end), or a dictionary of these by branch.
        named: Whether the queries have branches.
        copy: Whether the function gets copies.
    """

    def __init__(self, callback: Callback, named: bool, copy: bool) -> None:
        self.callback = callback
        self.named = named
        self.copy = copy

    def write(self, outputs: dict[str, Tensor], rows: Rows, branches: Mapping[str, str]) -> None:
        """Hands on the outputs of one chunk."""
        if self.copy:
            outputs = {name: value.clone() for name, value in outputs.items()}
        handed: Any = outputs[ONLY] if list(outputs) == [ONLY] else outputs
        self.callback(handed, rows if self.named else rows[ONLY])

    def flush(self) -> None:
        """The function keeps what it needs."""

    def result(self) -> None:
        """Nothing is kept."""


class ArraySink:
    """Fills arrays: tensors, NumPy arrays or memory maps (N, C) or (B, N, C). Those that are not given are made.

    Args:
        arrays: One array, arrays by the name of the output, or ``None``.
        totals: Rows by branch, ``None`` if unknown: then outputs are kept in pieces.
        batched: Whether the outputs get a batch axis.
    """

    def __init__(self, arrays: Any, totals: Mapping[str, int] | None, batched: bool) -> None:
        self.arrays: dict[str, Any] = dict(arrays) if isinstance(arrays, Mapping) else {}
        if arrays is not None and not isinstance(arrays, Mapping):
            self.arrays[ONLY] = arrays
        self.given = set(self.arrays)
        self.totals = totals
        self.batched = batched
        self.pieces: dict[str, list[Tensor]] = {}

    def write(self, outputs: dict[str, Tensor], rows: Rows, branches: Mapping[str, str]) -> None:
        """Writes the outputs of one chunk.

        Raises:
            ValueError: If an array is missing or too small.
        """
        for name, value in outputs.items():
            begin, end = rows[branches[name]]
            value = value if self.batched else value[0]
            if self.given and name not in self.given:
                raise ValueError(f"outputs must hold an array for {name!r}, got {sorted(self.arrays)}")
            if self.totals is None and not self.given:
                self.pieces.setdefault(name, []).append(value.clone())
                continue
            if name not in self.arrays:
                assert self.totals is not None
                shape = (*value.shape[:-2], self.totals[branches[name]], value.shape[-1])
                self.arrays[name] = torch.empty(shape, dtype=value.dtype)
            array = self.arrays[name]
            place = array[..., begin:end, :]
            if tuple(place.shape) != tuple(value.shape):
                raise ValueError(
                    f"outputs[{name!r}] of shape {tuple(array.shape)} can't take the rows [{begin}, {end}) "
                    f"of shape {tuple(value.shape)}"
                )
            if isinstance(array, Tensor):
                place.copy_(value)
            else:
                array[..., begin:end, :] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    def flush(self) -> None:
        """Writes memory maps to disk."""
        for array in self.arrays.values():
            if hasattr(array, "flush"):
                array.flush()

    def result(self) -> Any:
        """All outputs: a single array or tensor if they have no names, else by name."""
        made = {**self.arrays, **{name: torch.cat(pieces, dim=-2) for name, pieces in self.pieces.items()}}
        return made[ONLY] if list(made) == [ONLY] else made
