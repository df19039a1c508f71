"""Where outputs go: arrays that are filled, or a function that is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .fingerprints import RowHash
from .mapped_files import mapped_file
from .sources import BLOCK, ONLY, Rows, Source, refuse_path

Callback = Callable[[Any, Any], None]


def branch_of_output(name: str, branches: list[str], given: Mapping[str, str] | None) -> str:
    """Tells whose rows an output has: the branch that is given, of the same name, or the longest one in its name.

    Raises:
        ValueError: If that is none.
    """
    if given is not None and name in given:
        if given[name] not in branches:
            raise ValueError(f"branch_of[{name!r}] must be one of the branches {branches}, got {given[name]!r}")
        return given[name]
    if len(branches) == 1:
        return branches[0]
    contained = [branch for branch in branches if branch in name]
    if not contained:
        raise ValueError(f"output {name!r} belongs to none of the branches {branches}: name its branch in branch_of")
    return max(contained, key=len)


class CallbackSink:
    """Hands every chunk's outputs to a function.

    Args:
        callback: Called with the outputs (B, n, C) and their rows: (begin, end), or a dictionary of these by branch.
        source: Where the queries come from.
        copy: Whether the function gets copies.
    """

    def __init__(self, callback: Callback, source: Source, copy: bool) -> None:
        self.callback = callback
        self.source = source
        self.copy = copy
        self.given: set[str] = set()

    def check(self, outputs: dict[str, Tensor], rows: Rows, branches: Mapping[str, str]) -> None:
        """The function takes what it gets."""

    def write(self, outputs: dict[str, Tensor], rows: Rows, branches: Mapping[str, str]) -> None:
        """Hands on the outputs of one chunk."""
        if self.copy:
            outputs = {name: value.clone() for name, value in outputs.items()}
        handed: Any = outputs[ONLY] if list(outputs) == [ONLY] else outputs
        self.callback(handed, rows if self.source.named else rows[ONLY])

    def hash_rows(self, state: RowHash, name: str, begin: int, end: int) -> None:
        """What the function did with them can't be checked."""

    def flush(self) -> None:
        """The function keeps what it needs."""

    def result(self) -> None:
        """Nothing is kept."""


class ArraySink:
    """Fills arrays: tensors, NumPy arrays or memory maps (N, C) or (B, N, C). Those that are not given are made.

    The space that a memory map may take on its disk is reserved first.

    Args:
        arrays: One array, arrays by the name of the output, or ``None``.
        source: Where the queries come from. If it doesn't know its rows, outputs without an array are kept in pieces.
        branch_of: The branch of outputs whose name does not contain it.

    Raises:
        ValueError: If an array can't take what the source gives.
        OSError: If the disk of a memory map is too full.
    """

    def __init__(self, arrays: Any, source: Source, branch_of: Mapping[str, str] | None) -> None:
        self.arrays: dict[str, Any] = dict(arrays) if isinstance(arrays, Mapping) else {}
        if arrays is not None and not isinstance(arrays, Mapping):
            self.arrays[ONLY] = arrays
        self.given = set(self.arrays)
        self.source = source
        self.pieces: dict[str, list[Tensor]] = {}
        for name, array in self.arrays.items():
            _check_array(name, array)
            if source.totals is not None:
                self._check_length(name, source.totals[branch_of_output(name, source.branches, branch_of)])
        self.files = {name: mapped_file(f"outputs[{name!r}]", array) for name, array in self.arrays.items()}
        for file in self.files.values():
            if file is not None:
                file.reserve()

    def check(self, outputs: dict[str, Tensor], rows: Rows, branches: Mapping[str, str]) -> None:
        """Checks that all outputs of a chunk can be written.

        Raises:
            ValueError: If an array does not fit.
            OSError: If the file of a memory map has become shorter.
        """
        for name, value in outputs.items():
            if not self.given:
                continue
            begin, end = rows[branches[name]]
            array = self.arrays[name]
            expected = self._unbatched(value).shape
            if tuple(array.shape) != (*expected[:-2], array.shape[-2], expected[-1]) or array.shape[-2] < end:
                raise ValueError(
                    f"outputs[{name!r}] of shape {tuple(array.shape)} can't take the rows [{begin}, {end}) "
                    f"of shape {tuple(expected)}"
                )
            dtype = getattr(torch, str(array.dtype).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and not torch.can_cast(value.dtype, dtype):
                raise ValueError(f"outputs[{name!r}] of {array.dtype} can't hold what decode returns, {value.dtype}")
            file = self.files[name]
            if file is not None:
                file.check()

    def write(self, outputs: dict[str, Tensor], rows: Rows, branches: Mapping[str, str]) -> None:
        """Writes the outputs of one chunk, which are checked."""
        for name, value in outputs.items():
            begin, end = rows[branches[name]]
            value = self._unbatched(value)
            if self.source.totals is None and not self.given:
                self.pieces.setdefault(name, []).append(value.clone())
                continue
            if name not in self.arrays:
                self.make(name, branches[name], value)
            array = self.arrays[name]
            if isinstance(array, Tensor):
                array[..., begin:end, :].copy_(value)
            else:
                array[..., begin:end, :] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    def make(self, name: str, branch: str, like: Tensor) -> None:
        """Makes room for an output of a branch."""
        if self.source.totals is None:
            self.pieces[name] = [like]
        else:
            shape = (*like.shape[:-2], self.source.totals[branch], like.shape[-1])
            self.arrays[name] = torch.empty(shape, dtype=like.dtype)

    def make_empty(self, outputs: dict[str, Tensor], branches: Mapping[str, str]) -> None:
        """Makes the outputs of branches without rows."""
        for name, value in outputs.items():
            self.make(name, branches[name], self._unbatched(value)[..., :0, :])

    def hash_rows(self, state: RowHash, name: str, begin: int, end: int) -> None:
        """Adds rows that are written to a hash.

        Raises:
            ValueError: If there is no such array.
            OSError: If the file of a memory map has become shorter.
        """
        if name not in self.arrays:
            raise ValueError(f"outputs must hold an array for {name!r}, got {sorted(self.arrays)}")
        for first in range(begin, end, BLOCK):
            file = self.files.get(name)
            if file is not None:
                file.check()
            state.update(name, self.arrays[name][..., first : min(first + BLOCK, end), :])

    def finish(self, branches: Mapping[str, str], ends: Mapping[str, int]) -> None:
        """Checks that every row of the given arrays was written, where only the end of the source tells how many.

        Raises:
            ValueError: If not.
        """
        for name in self.given if self.source.totals is None else ():
            if name not in branches:
                raise ValueError(f"decode never returned {name!r}, for which outputs holds an array")
            self._check_length(name, ends.get(branches[name], 0))

    def flush(self) -> None:
        """Writes memory maps to disk."""
        for array in self.arrays.values():
            if hasattr(array, "flush"):
                array.flush()

    def result(self) -> Any:
        """All outputs: a single array or tensor if they have no names, else by name."""
        made = {**self.arrays, **{name: torch.cat(pieces, dim=-2) for name, pieces in self.pieces.items()}}
        return made[ONLY] if list(made) == [ONLY] else made

    def _unbatched(self, value: Tensor) -> Tensor:
        return value if self.source.batched else value[0]

    def _check_length(self, name: str, n: int) -> None:
        if self.arrays[name].shape[-2] != n:
            raise ValueError(
                f"outputs[{name!r}] of shape {tuple(self.arrays[name].shape)} must have {n} rows, one for each query"
            )


def _check_array(name: str, array: Any) -> None:
    refuse_path(f"outputs[{name!r}]", array)
    if not hasattr(array, "shape") or len(array.shape) not in (2, 3):
        shape = tuple(array.shape) if hasattr(array, "shape") else type(array).__name__
        raise ValueError(f"outputs[{name!r}] must be an array (N, C) or (B, N, C), got {shape}")
    if not getattr(getattr(array, "flags", None), "writeable", True):
        raise ValueError(f"outputs[{name!r}] is read-only: open it for writing, a memory map with mode 'r+'")
    if getattr(array, "mode", None) == "c":
        raise ValueError(f"outputs[{name!r}] is a memory map of mode 'c', which is never written to its file: use 'r+'")
