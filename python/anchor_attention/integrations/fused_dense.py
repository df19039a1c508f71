"""Plain and perceiver attention: every query reads every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import anchor_attention, rope
from ..key_range_table import KeyRangeTable
from ..modules.plan import bounded_cache
from ..modules.projection import project
from ..modules.steps import readable, split_heads
from .fused_forward import Arguments, FusedForward, arguments_of, same_batch


class DotProductForward(FusedForward):
    """Attention of all tokens to all tokens."""

    def fused(self, arguments: Arguments) -> Any:
        """(B, N, dim) -> (B, N, dim)."""
        x, mask, freqs = arguments_of(arguments, "x", "attn_mask", "freqs")
        if not self._takes(x, self.num_heads * self.head_dim) or not self._is_usual(arguments):
            return None
        if not self._rotates(x, freqs) or not _masks_keys(mask, x, x.shape[1]):
            return None
        qkv = getattr(self, "qkv", None)
        if isinstance(qkv, nn.Module):
            q, k, v = split_heads(project(qkv, x), 3, self.num_heads, self.head_dim).unbind(2)
        elif self._are_plain("q", "k", "v"):
            q, k, v = (self._heads(project(layer, x)) for layer in (self.q, self.k, self.v))
        else:
            return None
        freqs = None if freqs is None else readable(freqs)
        attended = anchor_attention(
            self._normalised("q_norm", q),
            self._normalised("k_norm", k),
            v,
            dense_table(x.shape[1], x.shape[1]),
            q_freqs=freqs,
            k_freqs=freqs,
            key_mask=_key_mask(mask, x.shape[0]),
        )
        out: Tensor = self.proj_dropout(project(self.proj, attended.flatten(2)))
        return out


class PerceiverForward(FusedForward):
    """Attention of queries to the tokens of another sequence, or to its cached keys and values."""

    def fused(self, arguments: Arguments) -> Any:
        """Queries (B, Nq, dim) and (B, Nk, kv dim) -> (B, Nq, dim), and the cache where the original returns one."""
        return self._perceive(arguments, ())

    def _perceive(self, arguments: Arguments, token_specs: tuple[Any, ...]) -> Any:
        """What ``fused`` returns. Query and output projections get the groups besides the tokens, if there are any."""
        x, kv, mask, cached = arguments_of(arguments, "q", "kv", "attn_mask", "kv_cache")
        q_freqs, k_freqs = arguments_of(arguments, "q_freqs", "k_freqs")
        if not self._takes(x, self.num_heads * self.head_dim) or not self._is_usual(arguments):
            return None
        if not self._rotates(x, q_freqs):
            return None
        new_cache = None
        if cached is not None:
            if not self._fits_cache(cached, x) or not _masks_keys(mask, x, cached["k"].shape[2]):
                return None
            k, v = (_of_batch(cached[kind], x).transpose(1, 2) for kind in ("k", "v"))
        else:
            if not self._takes(kv) or kv.dtype != x.dtype or kv.device != x.device or not same_batch(kv, x):
                return None
            if not self._rotates(kv, k_freqs) or not _masks_keys(mask, x, kv.shape[1]):
                return None
            if k_freqs is not None and not same_batch(k_freqs, kv):
                return None
            packed = getattr(self, "kv", None)
            if isinstance(packed, nn.Module):
                k, v = split_heads(project(packed, kv), 2, self.num_heads, self.head_dim).unbind(2)
            elif self._are_plain("k", "v"):
                k, v = self._heads(project(self.k, kv)), self._heads(project(self.v, kv))
            else:
                return None
            k = self._normalised("k_norm", k)
            if k_freqs is not None:
                k = rope(k, readable(k_freqs))
            new_cache = {"k": k.transpose(1, 2), "v": v.transpose(1, 2)}
            k, v = _of_batch(k, x), _of_batch(v, x)
        attended = anchor_attention(
            self._normalised("q_norm", self._heads(self.q(x, *token_specs))),
            k,
            v,
            dense_table(x.shape[1], k.shape[1]),
            q_freqs=None if q_freqs is None else readable(q_freqs),
            key_mask=_key_mask(mask, x.shape[0]),
        )
        out = self.proj_dropout(self.proj(attended.flatten(2), *token_specs))
        return (out, new_cache) if self._returns_cache() else out

    def _fits_cache(self, cached: Any, x: Tensor) -> bool:
        if not isinstance(cached, Mapping) or not all(isinstance(cached.get(kind), Tensor) for kind in ("k", "v")):
            return False
        k, v = cached["k"], cached["v"]
        if k.dim() != 4 or v.shape != k.shape or not same_batch(k, x):
            return False
        if (k.shape[1], k.shape[3]) != (self.num_heads, self.head_dim) or not k.device == v.device == x.device:
            return False
        return k.dtype == v.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


class UntiedPerceiverForward(PerceiverForward):
    """Perceiver attention with query and output projections for each domain, called as the original calls them."""

    def fused(self, arguments: Arguments) -> Any:
        """As for :class:`PerceiverForward`."""
        token_specs = arguments.get("token_specs")
        return None if token_specs is None else self._perceive(arguments, (token_specs,))


@bounded_cache
def dense_table(n_queries: int, n_keys: int) -> KeyRangeTable:
    return KeyRangeTable((0, n_queries), (0, 1), (0, n_keys))


def _of_batch(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor if tensor.shape[0] == x.shape[0] else tensor.expand(x.shape[0], -1, -1, -1)


def _masks_keys(mask: Any, x: Tensor, n_keys: int) -> bool:
    """Whether a mask is missing, or says for each sample or for all which keys every query of every head reads."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4 or mask.device != x.device:
        return False
    return same_batch(mask, x) and mask.shape[1:3] == (1, 1) and mask.shape[3] == n_keys


def _key_mask(mask: Tensor | None, batch: int) -> Tensor | None:
    """(B, Nk) bool."""
    return None if mask is None else readable(mask[:, 0, 0].expand(batch, -1))
