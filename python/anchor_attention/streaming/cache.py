"""The keys and values of all layers of an encoding, as one object that can be stored, moved and weighed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modules.kv_cache import join_tokens
from .tensor_file import load_tensors, save_tensors

FORMAT = "anchor_attention.cache.1"


@dataclass(frozen=True)
class LayerCost:
    """What one layer's cache holds, and what a query costs there.

    Args:
        layer: Where it is in the cache, its keys joined by ``/``.
        tokens: Cached tokens by group.
        nbytes: Bytes of keys, values and masks.
        flops_per_query: Floating-point operations of the attention of one query to all groups of the layer.
    """

    layer: str
    tokens: dict[str, int]
    nbytes: int
    flops_per_query: int


class Cache:
    """Nested dictionaries, lists and tuples of tensors: what a model's ``encode`` returns.

    The caches of this package's modules, ``{group: {"k", "v"[, "mask"]}}``, and those of other packages may be anywhere
    in it; other tensors (embedded conditions, say) are carried along. Masks of ragged batches are in it, too.

    Args:
        tree: The nested structure. Keys of dictionaries are strings; leaves are tensors, ``None``, numbers, strings.

    Raises:
        ValueError: If it holds something else.
    """

    def __init__(self, tree: Any) -> None:
        _structure(tree, "", {})
        self.tree = tree

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; memory that several share counts once."""
        return sum({_place(tensor): tensor.numel() * tensor.element_size() for tensor in self.tensors()}.values())

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor."""
        tensors: dict[str, Tensor] = {}
        _structure(self.tree, "", tensors)
        yield from tensors.values()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cache:
        """Returns the cache on a device, its floating-point tensors in a dtype. What fits already is not copied."""

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return Cache(_packed(_mapped(self.tree, convert)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; it appears whole or not at all.

        Raises:
            ValueError: If a dtype can't be stored.
        """
        tensors: dict[str, Tensor] = {}
        structure = _structure(self.tree, "", tensors)
        save_tensors(tensors, path, {"format": FORMAT, "structure": json.dumps(structure)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Cache:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: If the file is none of these.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} must be a file of the format {FORMAT!r}, got {metadata.get('format')!r}")
        tree = _restored(json.loads(metadata["structure"]), tensors)
        return cls(_packed(tree)) if device is None else cls(tree).to(device)

    def costs(self) -> list[LayerCost]:
        """What each layer holds and costs, in order."""
        return [
            LayerCost(
                layer=path,
                tokens={name: entry["k"].shape[2] for name, entry in layer.items()},
                nbytes=sum(t.numel() * t.element_size() for entry in layer.values() for t in entry.values()),
                flops_per_query=sum(
                    4 * entry["k"].shape[1] * entry["k"].shape[2] * entry["k"].shape[3] for entry in layer.values()
                ),
            )
            for path, layer in _layers(self.tree, "")
        ]

    def cost_table(self) -> str:
        """:meth:`costs` as text."""
        rows = [("layer", "tokens", "MiB", "MFLOP per query")]
        for cost in self.costs():
            tokens = ", ".join(f"{name} {count}" for name, count in cost.tokens.items())
            rows.append((cost.layer, tokens, f"{cost.nbytes / 2**20:.2f}", f"{cost.flops_per_query / 1e6:.3f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def __repr__(self) -> str:
        return f"Cache({len(self.costs())} layers, {self.nbytes / 2**20:.1f} MiB)"


def _place(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape)


def _structure(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns the tree as JSON, with paths in place of the tensors, and collects these."""
    if isinstance(tree, Tensor):
        if path in tensors:
            raise ValueError(f"two tensors of the cache would be called {path!r}: rename a key that holds a '/'")
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) for key in tree):
            raise ValueError(f"keys of the cache must be strings, got {list(tree)} at {path!r}")
        return {
            "dict": {key: _structure(value, f"{path}/{key}" if path else key, tensors) for key, value in tree.items()}
        }
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_structure(value, _below(path, i), tensors) for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"value": tree}
    raise ValueError(f"the cache must hold tensors, numbers and strings, got {type(tree).__name__} at {path!r}")


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _restored(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restored(value, tensors) for key, value in content.items()}
    if kind in ("list", "tuple"):
        values = [_restored(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    return content


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, function) for value in tree)
    return tree


def _is_layer(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and bool(tree)
        and all(
            isinstance(entry, Mapping)
            and {"k", "v"} <= set(entry)
            and all(isinstance(value, Tensor) for value in entry.values())
            and entry["k"].dim() == 4
            for entry in tree.values()
        )
    )


def _layers(tree: Any, path: str) -> Iterator[tuple[str, Mapping[str, Mapping[str, Tensor]]]]:
    if _is_layer(tree):
        yield path, tree
        return
    items: Any = (
        tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    )
    for key, value in items:
        yield from _layers(value, f"{path}/{key}" if path else str(key))


def _packed(tree: Any) -> Any:
    """Lays the groups of each layer one behind the other in memory, as the call that made them did.

    Then a call that reads several of them needs no copy; see ``modules.kv_cache``.
    """
    if _is_layer(tree):
        if len({entry["k"].shape[:2] + entry["k"].shape[3:] for entry in tree.values()}) > 1:
            return tree
        packed: dict[str, dict[str, Tensor]] = {name: dict(entry) for name, entry in tree.items()}
        for kind in ("k", "v"):
            joined = join_tokens([entry[kind].transpose(1, 2) for entry in tree.values()])
            parts = torch.split(joined, [entry[kind].shape[2] for entry in tree.values()], dim=1)
            for name, part in zip(tree, parts, strict=True):
                packed[name][kind] = part.transpose(1, 2)
        return packed
    if isinstance(tree, Mapping):
        return {key: _packed(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_packed(value) for value in tree)
    return tree
