"""The keys and values of all layers of an encoding, as one object that can be stored, moved and measured."""

from __future__ import annotations

import collections.abc
import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modules.kv_cache import join_tokens
from .cache_file import load_file, save_file

FORMAT = "anchor_attention.cache.2"


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
        tree: The nested structure; NamedTuples are tuples. Keys of dictionaries are strings; leaves are tensors,
            ``None``, numbers, strings.

    Raises:
        ValueError: If it holds something else.
    """

    def __init__(self, tree: Any) -> None:
        for path, leaf in _leaves(tree, ""):
            if not (leaf is None or isinstance(leaf, (Tensor, bool, int, float, str))):
                raise ValueError(
                    f"the cache must hold tensors, numbers, strings, got {type(leaf).__name__} at {path!r}"
                )
        self.tree = tree

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; memory that several share counts once."""
        return sum({_place(tensor): tensor.numel() * tensor.element_size() for tensor in self.tensors()}.values())

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor."""
        for _, leaf in _leaves(self.tree, ""):
            if isinstance(leaf, Tensor):
                yield leaf

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cache:
        """Returns the cache on a device, its floating-point tensors in a dtype. Tensors that fit are not copied.

        Keys and values of a layer whose groups fit together are stored one after the other, as a call reads them.
        """

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return Cache(_packed(_mapped(self.tree, convert)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file with a checksum; it appears whole or not at all. ``torch.load`` opens it, too.

        Raises:
            ValueError: If a tensor has no data of its own to store: a sparse one, one on the meta device, a subclass.
        """
        for place, leaf in _leaves(self.tree, ""):
            if isinstance(leaf, Tensor) and (
                type(leaf) not in (Tensor, torch.nn.Parameter) or leaf.layout != torch.strided or leaf.is_meta
            ):
                raise ValueError(
                    f"tensors of a saved cache must be dense and hold data, got a {type(leaf).__name__} of layout "
                    f"{leaf.layout} on {leaf.device} at {place!r}"
                )
        covered: dict[int, int] = {}
        for begin, tensor in {_place(tensor): tensor for tensor in self.tensors()}.items():
            covered[begin[0]] = covered.get(begin[0], 0) + tensor.numel() * tensor.element_size()

        def stored(tensor: Tensor) -> Tensor:
            # Of a view, all the memory behind it would be written.
            partly = covered[_place(tensor)[0]] < tensor.untyped_storage().nbytes()
            tensor = tensor.detach()
            return (tensor.clone(memory_format=torch.contiguous_format) if partly else tensor).cpu()

        save_file({"format": FORMAT, "tree": _encoded(_mapped(self.tree, stored))}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Cache:
        """Reads what :meth:`save` wrote into memory.

        NamedTuples come back as their class where the program has it, else as one of the same names.

        Raises:
            ValueError: If the file is none of these, or damaged.
        """
        content = load_file(path)
        form = content.get("format") if isinstance(content, dict) else None
        if form != FORMAT:
            raise ValueError(f"{path} must be a file of the format {FORMAT!r}, got {form!r}")
        tree = _decoded(content.pop("tree"))
        return cls(tree) if device is None else cls(tree).to(device)

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


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields what is in the tree and no container, with where it is."""
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) for key in tree):
            raise ValueError(f"keys of the cache must be strings, got {list(tree)} at {path!r}")
        for key, value in tree.items():
            yield from _leaves(value, _below(path, key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _leaves(value, _below(path, i))
    else:
        yield path, tree


def _encoded(tree: Any) -> Any:
    """The tree in plain classes only, which can be read without running code from the file."""
    if isinstance(tree, Mapping):
        return {"dict": {str(key): _encoded(value) for key, value in tree.items()}}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind = type(tree)
        return {
            "namedtuple": [_encoded(value) for value in tree],
            "fields": list(kind._fields),
            "class": [kind.__module__, kind.__qualname__],
        }
    if isinstance(tree, (list, tuple)):
        return {"list" if isinstance(tree, list) else "tuple": [_encoded(value) for value in tree]}
    for plain in (bool, int, float, str):
        if isinstance(tree, plain):
            # Numbers of NumPy and enumerations are subclasses, which a file could only name.
            return {"value": plain(tree)}
    return {"value": tree}


def _decoded(node: Any) -> Any:
    """The tree that was encoded, each layer packed. Decoded parts are removed from the node: if the file is larger than
    half of the memory, no more than one layer may exist twice."""
    kind = next(iter(node))
    content = node.pop(kind)
    if kind == "dict":
        tree = {key: _decoded(content.pop(key)) for key in list(content)}
        return _packed(tree) if _is_layer(tree) else tree
    if kind in ("list", "tuple", "namedtuple"):
        content.reverse()
        values = [_decoded(content.pop()) for _ in range(len(content))]
        if kind == "namedtuple":
            module, name = node["class"]
            return _named_tuple(module, name, node["fields"])(*values)
        return values if kind == "list" else tuple(values)
    return content


def _named_tuple(module: str, name: str, fields: list[str]) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == tuple(fields):
        return found
    return collections.namedtuple(name.rpartition(".")[2], fields)


def _rebuilt(tree: Any, values: list[Any]) -> Any:
    """A container like the given one, with other values."""
    if isinstance(tree, Mapping):
        items = dict(zip(tree, values, strict=True))
        if type(tree) is dict or not isinstance(tree, collections.abc.MutableMapping):
            return items
        # What a subclass has in addition to its items (an order, a default) is kept.
        other = copy.copy(tree)
        other.update(items)
        return other
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (Mapping, list, tuple)):
        values = tree.values() if isinstance(tree, Mapping) else tree
        return _rebuilt(tree, [_mapped(value, function) for value in values])
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


def _fits_together(entries: list[Mapping[str, Tensor]]) -> bool:
    """Whether the groups of a layer can be one tensor of keys and one of values without changing any."""
    for kind in ("k", "v"):
        parts = [entry[kind] for entry in entries]
        if any(part.dim() != 4 or part.layout != torch.strided for part in parts):
            return False
        if len({(part.dtype, part.device, part.shape[:2], part.shape[3:], part.is_conj()) for part in parts}) > 1:
            return False
    return True


def _packed(tree: Any) -> Any:
    """Lays the groups of each layer one after the other in memory, as the call that made them did.

    Then a call that reads several of them needs no copy; see ``modules.kv_cache``.
    """
    if _is_layer(tree) and _fits_together(list(tree.values())):
        packed: dict[str, dict[str, Tensor]] = {name: dict(entry) for name, entry in tree.items()}
        for kind in ("k", "v"):
            joined = join_tokens([entry[kind].transpose(1, 2) for entry in tree.values()])
            parts = torch.split(joined, [entry[kind].shape[2] for entry in tree.values()], dim=1)
            for name, part in zip(tree, parts, strict=True):
                packed[name][kind] = part.transpose(1, 2)
        return _rebuilt(tree, [_rebuilt(tree[name], list(entry.values())) for name, entry in packed.items()])
    if isinstance(tree, (Mapping, list, tuple)):
        values = tree.values() if isinstance(tree, Mapping) else tree
        return _rebuilt(tree, [_packed(value) for value in values])
    return tree
