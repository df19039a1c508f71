"""Mixed attention: token groups that attend to the groups that a pattern names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.kv_cache import CacheEntry, KVCache
from ..modules.plan import AttentionPlan
from ..modules.projection import project
from ..modules.steps import attend, plan_call, project_packed, read_tokens
from .fused_forward import Arguments, FusedForward, angles_fit, arguments_of, same_batch

# What the original keeps of a call: the groups with this in their name.
ANCHOR_MARK = "_anchor"

_ARGUMENTS = ("x", "token_specs", "attention_patterns", "key_padding_mask", "freqs")


class MixedForward(FusedForward):
    """Mixed attention with shared projections, one packed or three."""

    def fused(self, arguments: Arguments) -> Any:
        """(B, N, dim) -> (B, N, dim), and the cache where the original returns one."""
        x, token_specs, patterns, mask, freqs = arguments_of(arguments, *_ARGUMENTS)
        cached = any(spec.size is None for spec in token_specs or ())
        if token_specs is None or patterns is None or not self._fits(arguments, x, mask, freqs):
            return None
        packed = getattr(self, "qkv", None)
        if packed is None and not cached and not self._are_plain("q", "k", "v"):
            return None
        returns_cache = self._returns_cache() and not cached
        if cached and mask is not None:
            return None
        # Cached groups are read by the blocks of a model that has the cache; others ignore what they are given.
        kv_cache = arguments.get("kv_cache") if cached else None
        if isinstance(kv_cache, Mapping):
            kv_cache = {name: _without_mask(entry) for name, entry in kv_cache.items()}
        anchors = [spec.name for spec in token_specs if ANCHOR_MARK in spec.name] if returns_cache else []
        try:
            plan = plan_call(
                x,
                token_specs,
                patterns,
                kv_cache,
                self.num_heads,
                self.head_dim,
                keep_unread=False,
                keep_names=anchors,
            )
        except ValueError:
            return None
        if kv_cache is not None and not all(_fits_queries(kv_cache[name], x) for name in plan.cached_names):
            return None
        attended, cache = self._attend_fused(
            x,
            token_specs,
            patterns,
            plan,
            key_padding_mask=_of_batch(mask, x),
            freqs=freqs,
            kv_cache=kv_cache,
            return_kv_cache=returns_cache,
        )
        out = project(self.proj, attended)
        if not self._returns_cache():
            return out
        return out, None if cache is None else {name: _without_mask(cache[name]) for name in anchors}

    def _attend_fused(
        self, x: Tensor, token_specs: Any, patterns: Any, plan: AttentionPlan, **options: Any
    ) -> tuple[Tensor, KVCache | None]:
        """Projects and attends. ``options`` are those of :func:`attend`."""
        k, v, project_queries = self._project(x, plan)
        return attend(project_queries(), k, v, plan, dropout=0.0, **options)

    def _project(self, x: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """k and v of the tokens that are read, and what projects the queries: normalised, in heads."""
        packed = getattr(self, "qkv", None)
        if isinstance(packed, nn.Module):
            q, k, v = project_packed(packed, x, plan, self.num_heads)
            return self._normalised("k_norm", k), v, lambda: self._normalised("q_norm", q)
        read = read_tokens(x, plan)
        k, v = self._heads(project(self.k, read)), self._heads(project(self.v, read))
        return self._normalised("k_norm", k), v, lambda: self._normalised("q_norm", self._heads(project(self.q, x)))

    def _fits(self, arguments: Arguments, x: Any, mask: Any, freqs: Any) -> bool:
        if arguments.get("attention_mask") is not None or not self._is_usual(arguments):
            return False
        if not self._takes(x, self.num_heads * self.head_dim):
            return False
        if not self._rotates(x, freqs) and not (self.use_rope and angles_fit(x, freqs)):
            return False
        if mask is None:
            return True
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or mask.device != x.device:
            return False
        return mask.shape[1] == x.shape[1] and same_batch(mask, x)


class UntiedMixedForward(MixedForward):
    """Mixed attention with projections for each domain.

    They are called with what the original calls them with, all tokens: which matrix they multiply by depends on the
    sizes of the groups. There is no cache, as in the original: a call with other groups would project otherwise.
    """

    def fused(self, arguments: Arguments) -> Any:
        """(B, N, dim) -> (B, N, dim)."""
        x, token_specs, patterns, mask, freqs = arguments_of(arguments, *_ARGUMENTS)
        if token_specs is None or patterns is None or not self._fits(arguments, x, mask, freqs):
            return None
        if arguments.get("kv_cache") is not None or any(spec.size is None for spec in token_specs):
            return None
        try:
            plan = plan_call(x, token_specs, patterns, None, self.num_heads, self.head_dim, keep_unread=False)
        except ValueError:
            return None
        q, k, v = (self._heads(layer(x, token_specs)) for layer in (self.q, self.k, self.v))
        attended, _ = attend(
            self._normalised("q_norm", q),
            self._normalised("k_norm", read_tokens(k, plan)),
            read_tokens(v, plan),
            plan,
            key_padding_mask=_of_batch(mask, x),
            freqs=freqs,
            kv_cache=None,
            return_kv_cache=False,
            dropout=0.0,
        )
        return self.proj(attended, token_specs)


def _without_mask(entry: Any) -> Any:
    """An entry of a cache as the original makes and reads it: cached tokens count as real."""
    return {kind: entry[kind] for kind in ("k", "v")} if isinstance(entry, Mapping) and "mask" in entry else entry


def _of_batch(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == x.shape[0] else mask.expand(x.shape[0], -1)


def _fits_queries(entry: CacheEntry, x: Tensor) -> bool:
    """Whether cached keys and values can be joined with what x is projected to, as the original would join them."""
    of_type = entry["k"].dtype == entry["v"].dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return of_type and entry["k"].device == entry["v"].device == x.device
