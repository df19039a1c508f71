"""Checks that a run continues with what an interrupted one began with: queries, cache, weights, and what it wrote."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .recording import plain_name


class RowHash:
    """Hash of the rows of arrays, row after row, however they are cut into chunks.

    Args:
        kind: What the arrays are called in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.hashes: dict[str, Any] = {}

    def update(self, name: str, rows: Any) -> None:
        """Adds rows (n, C) or (B, n, C): a tensor or a NumPy array."""
        if name not in self.hashes:
            dtype = str(rows.dtype).removeprefix("torch.")
            self.hashes[name] = hashlib.sha256(f"{dtype} {tuple(rows.shape[:-2])} {rows.shape[-1]}".encode())
        self.hashes[name].update(_bytes(rows if len(rows.shape) == 2 else rows.swapaxes(0, 1)))

    def digests(self) -> dict[str, str]:
        """The hashes so far, by name."""
        return {name: value.hexdigest() for name, value in self.hashes.items()}


def fingerprint(tree: Any) -> str:
    """Hash of a cache: of tensors, arrays, numbers and strings in containers, modules and objects with attributes."""
    state = hashlib.sha256()
    _add(state, tree, set())
    return state.hexdigest()


def weights_fingerprint(function: Any) -> str:
    """Hash of the parameters and buffers of the modules that a function reaches.

    A function reaches a module if it is one, is a method of one, or has one among its bound arguments, its closure, its
    attributes, or the global names that it uses; the same holds for functions that it uses.
    """
    state = hashlib.sha256()
    for module in _modules(function, set()):
        _add(state, module, set())
    return state.hexdigest()


def _add(state: Any, value: Any, seen: set[int]) -> None:
    if isinstance(value, Tensor):
        value = getattr(value, "to_local", lambda: value)()
        state.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            state.update(_bytes(value))
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        state.update(f"{type(value).__name__} {value!r}".encode())
    elif hasattr(value, "dtype") and hasattr(value, "tobytes"):
        state.update(f"array {value.dtype} {value.shape}".encode() + value.tobytes())
    elif id(value) in seen:
        state.update(b"again")
    else:
        seen.add(id(value))
        state.update(type(value).__qualname__.encode())
        for key, part in _parts(value):
            state.update(f"{key}:".encode())
            _add(state, part, seen)
        state.update(b";")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from sorted(((str(key), part) for key, part in value.items()), key=lambda item: item[0])
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), part) for i, part in enumerate(value))
    elif isinstance(value, nn.Module):
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            yield plain_name(name), tensor
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
        yield from sorted(vars(value).items())


def _bytes(array: Any) -> Any:
    if not isinstance(array, Tensor):
        return array.tobytes()
    dense = array.detach().cpu().to_dense() if array.layout != torch.strided else array.detach().cpu()
    return dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _modules(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    # Numbers and texts lead nowhere, and an object may hold a great many.
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules(part, seen)
    elif isinstance(value, types.MethodType):
        yield from _modules(value.__self__, seen)
        yield from _modules(value.__func__, seen)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            # A name that is not bound yet has an empty cell.
            yield from _modules(getattr(cell, "cell_contents", None), seen)
        for name in _names(value.__code__):
            part = value.__globals__.get(name)
            if isinstance(part, nn.Module) or getattr(part, "__module__", None) == value.__module__:
                yield from _modules(part, seen)
        yield from _modules(getattr(value, "__wrapped__", None), seen)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _modules(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _modules(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
        yield from _modules(vars(value), seen)
        if callable(value):
            yield from _modules(type(value).__call__, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
