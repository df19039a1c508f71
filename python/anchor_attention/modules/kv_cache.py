"""Keys and values that outlive a call: {group: {"k", "v"[, "mask"]}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tracing import is_traced

KVCache = dict[str, dict[str, Tensor]]
CacheEntry = Mapping[str, Tensor]


def check_cache(kv_cache: Any) -> None:
    """Checks that this is a cache, and not an empty one.

    Raises:
        ValueError: If it is not a mapping, or is empty.
    """
    if not isinstance(kv_cache, Mapping):
        raise ValueError(f"kv_cache must be {{group: {{'k', 'v'}}}} or None, got {type(kv_cache).__name__}")
    if not kv_cache:
        raise ValueError("kv_cache is empty: pass None where nothing is cached")


def cached_size(name: str, entry: CacheEntry, batch: int, heads: int, head_dim: int) -> int:
    """Returns how many tokens an entry of a cache holds.

    Raises:
        ValueError: If the entry lacks its keys or values, or a shape or the mask's dtype does not fit.
    """
    if not isinstance(entry, Mapping) or "k" not in entry or "v" not in entry:
        got = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"kv_cache[{name!r}] must hold 'k' and 'v', got {got}")
    k, v, mask = entry["k"], entry["v"], entry.get("mask")
    for kind, tensor in (("k", k), ("v", v), ("mask", mask)):
        if not isinstance(tensor, Tensor) and not (kind == "mask" and tensor is None):
            raise ValueError(f"kv_cache[{name!r}][{kind!r}] must be a Tensor, got {type(tensor).__name__}")
    # By ==, as a compiler's symbolic sizes are not found in a tuple.
    of_batch = k.dim() == 4 and (k.shape[0] == batch or (k.shape[0] == 1 and v.shape[:1] == k.shape[:1]))
    if not of_batch or (k.shape[1], k.shape[3]) != (heads, head_dim):
        raise ValueError(
            f"kv_cache[{name!r}]['k'] must be (batch={batch}, heads={heads}, tokens, head_dim={head_dim}), "
            f"got shape {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"kv_cache[{name!r}]['v'] must have the shape of 'k', {tuple(k.shape)}, got {tuple(v.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"kv_cache[{name!r}]['mask'] must be bool of shape {(k.shape[0], k.shape[2])}, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return k.shape[2]


def append_cached(
    fresh: tuple[Tensor, Tensor] | None, fresh_mask: Tensor | None, entries: Mapping[str, CacheEntry], q: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Appends cached keys and values to the fresh ones.

    Args:
        fresh: k and v, (B, tokens, H, D), or ``None`` if everything comes from the cache.
        fresh_mask: (B, tokens) bool of the fresh keys, ``None`` where all are real.
        entries: Entries of the cache by name, at least one. A batch of one serves all samples.
        q: The queries (B, N, H, D) that will read them, to whose dtype cached keys and values are converted.

    Returns:
        k and v (B, Nk, H, D), and their mask (B, Nk), ``None`` if no part has one.

    Raises:
        ValueError: If an entry lies on another device than the queries.
    """
    keys = [] if fresh is None else [fresh[0]]
    values = [] if fresh is None else [fresh[1]]
    masks = [] if fresh is None else [fresh_mask]
    for name, entry in entries.items():
        keys.append(_as_queries(f"kv_cache[{name!r}]['k']", entry["k"], q).transpose(1, 2))
        values.append(_as_queries(f"kv_cache[{name!r}]['v']", entry["v"], q).transpose(1, 2))
        mask = entry.get("mask")
        masks.append(None if mask is None else mask.expand(q.shape[0], -1))
    key_mask = None
    if any(mask is not None for mask in masks):
        key_mask = torch.cat(
            [
                k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
                for k, mask in zip(keys, masks, strict=True)
            ],
            dim=1,
        )
    return join_tokens(keys), join_tokens(values), key_mask


def _as_queries(name: str, cached: Tensor, q: Tensor) -> Tensor:
    """(B, H, S, D) for the batch of the queries, of their dtype."""
    if cached.device != q.device:
        raise ValueError(f"{name} must be on the device of x, {q.device}, got {cached.device}")
    cached = cached.to(q.dtype)
    # Not by expand where it would change nothing: the tracer would record it.
    return cached if cached.shape[0] == q.shape[0] else cached.expand(q.shape[0], -1, -1, -1)


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates (B, tokens, H, D) on axis 1, without a copy where the parts lie one after the other in memory.

    The entries that one call made are such parts: read in every later call, they are never copied again.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    # A tracer knows no addresses, and the gradient of a view that reaches beyond its part would be lost.
    if is_traced() or any(part.requires_grad for part in parts):
        return torch.cat(tuple(parts), dim=1)
    memory, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if (part.untyped_storage().data_ptr(), part.storage_offset()) != (memory, offset) or (
            part.dtype,
            part.stride(),
        ) != (first.dtype, first.stride()):
            return torch.cat(tuple(parts), dim=1)
        offset += part.shape[1] * part.stride(1)
    return first.as_strided((first.shape[0], sum(part.shape[1] for part in parts), *first.shape[2:]), first.stride())


def make_cache(k: Tensor, v: Tensor, key_mask: Tensor | None, key_slices: Mapping[str, tuple[int, int]]) -> KVCache:
    """Cuts rotated keys and values (B, Nk, H, D), and their mask (B, Nk), into the entries of a cache."""
    cache: KVCache = {}
    for name, (begin, end) in key_slices.items():
        cache[name] = {"k": k[:, begin:end].transpose(1, 2), "v": v[:, begin:end].transpose(1, 2)}
        if key_mask is not None:
            # The mask belongs to the caller, who may reuse its memory.
            cache[name]["mask"] = key_mask[:, begin:end].clone()
    return cache
