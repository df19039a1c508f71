"""The steps of a module's call whose tokens are spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import _autocast, anchor_attention, merge_attention, rope
from ..modules.checks import Freqs
from ..modules.kv_cache import CacheEntry, KVCache, append_cached, make_cache
from ..modules.plan import AttentionPlan, GroupSize, Pattern
from ..modules.rope import rotate_half_rope
from ..modules.steps import attention_with_dropout, read_tokens, readable
from .attention import sharded_attention
from .gathered import Gathering, gather_mask
from .layouts import Layouts
from .sharded_plan import ShardedPlan, read_groups, sharded_plan
from .sharded_table import GATHER_LIMIT, KeyShape, key_shape


class Sharding:
    """How a module shares its keys: the layouts that its processes have agreed on, and the options of the style.

    Args:
        layouts: The layouts, of all modules of a style.
        case: As for :meth:`ShardedTable.agree`.
        gather_limit: As there.
    """

    def __init__(self, layouts: Layouts, case: str | None = None, gather_limit: int = GATHER_LIMIT) -> None:
        self.layouts = layouts
        self.case = case
        self.gather_limit = gather_limit

    def guarded(self, module: nn.Module, kv_cache: Any, call: Callable[[], Any]) -> Any:
        """Calls, and tells the other processes if that fails before they have agreed on this call."""
        agreements = self.layouts.agreements
        try:
            return call()
        except Exception as error:
            # With a cache there may be nothing to agree on, and nobody waiting.
            if kv_cache is None and self.layouts.agreements == agreements:
                self.layouts.fail(module, error)
            raise

    def plan(
        self,
        module: nn.Module,
        groups: tuple[GroupSize, ...],
        patterns: tuple[Pattern, ...],
        plan: AttentionPlan,
        shape: KeyShape,
        masked: bool,
        whole: bool,
    ) -> ShardedPlan:
        """Agrees with the other processes, unless that is done, and makes the plan of a call.

        Args:
            module: The module that is called.
            groups: The token groups of this process.
            patterns: The patterns.
            plan: What they mean on this process alone.
            shape: What the keys of all processes have in common.
            masked: Whether this process has a mask.
            whole: Whether the call needs all keys at once: for a cache, or dropout.
        """
        fresh = read_groups(groups, plan.key_slices)
        case = "gathered" if whole else self.case
        places = [(name, "in x" if size is not None else "cached") for name, size, _ in groups]
        options = f"case={case!r}, gather_limit={self.gather_limit}"
        description = f"{shape}, groups {places}, of which {fresh} are read, {options}"
        sizes = {name: size or 0 for name, size, _ in groups}
        rows = self.layouts.rows(module, description, [int(masked), *(sizes[name] for name in fresh)])
        n_fresh = sum(sizes[name] for name in fresh)
        cached = tuple(
            (name, (plan.key_slices[name][0] - n_fresh, plan.key_slices[name][1] - n_fresh))
            for name in plan.cached_names
        )
        return sharded_plan(
            groups, patterns, rows, fresh, cached, self.layouts.processes, shape, case, self.gather_limit
        )


def attend_sharded(
    module: nn.Module,
    sharding: Sharding,
    k: Tensor,
    v: Tensor,
    project_queries: Callable[[], Tensor],
    groups: tuple[GroupSize, ...],
    patterns: tuple[Pattern, ...],
    plan: AttentionPlan,
    *,
    key_padding_mask: Tensor | None,
    freqs: Freqs | None,
    kv_cache: Mapping[str, CacheEntry] | None,
    return_kv_cache: bool,
    dropout: float,
) -> tuple[Tensor, KVCache | None]:
    """As :func:`anchor_attention.modules.steps.attend`, with the keys of all processes.

    Args:
        module: The module that is called.
        sharding: How it shares its keys.
        k: (B, tokens read, H, D) of this process, normalised.
        v: Like k.
        project_queries: Makes q (B, N, H, D), normalised, while keys and values travel.
        groups: The token groups of this process.
        patterns: The patterns.
        plan: What they mean on this process alone.
        key_padding_mask: As for :meth:`MixedAttention.forward`, of the tokens of this process, and so are the others.
        freqs: Rotary factors.
        kv_cache: The cache, of all processes.
        return_kv_cache: Whether to return one, of all processes.
        dropout: Probability with which weights are dropped in this call.

    Raises:
        ValueError: If the processes make different calls, or weights are to be dropped in a ring.
        ProcessError: If a process fails, has ended or does not answer in time.
    """
    if dropout > 0 and sharding.case == "ring":
        raise ValueError(f"dropout must be 0 in a ring, got {dropout}: choose case='gathered'")
    k, v = _autocast(k, v)
    mask = None if key_padding_mask is None else readable(read_tokens(key_padding_mask, plan))
    q_freqs: Tensor | None = None
    if isinstance(freqs, Tensor):
        q_freqs = readable(freqs)
        k = rope(k, read_tokens(q_freqs, plan))
    elif freqs is not None:
        k = rotate_half_rope(k, tuple(read_tokens(angle, plan) for angle in freqs))
    whole = return_kv_cache or dropout > 0
    sharded = sharding.plan(module, groups, patterns, plan, key_shape(k, v), mask is not None, whole)
    table = sharded.table
    table.check(k, v, mask)

    def queries() -> Tensor:
        q = project_queries()
        return rotate_half_rope(q, freqs) if isinstance(freqs, tuple) else q

    entries = {name: kv_cache[name] for name in plan.cached_names} if kv_cache is not None else {}
    if table.case == "ring":
        q = queries()
        attended, lse = sharded_attention(q, k, v, table, q_freqs=q_freqs, key_mask=mask, return_lse=True)
        return _with_cached(q, q_freqs, attended, lse, entries, sharded).flatten(2), None
    gathering = Gathering(k, v, table)
    q = queries()
    mask = gather_mask(mask, k, table)
    k, v = gathering.finish()
    cache = _cache(k, v, mask, sharded, entries) if return_kv_cache else None
    if dropout > 0:
        if entries:
            raise ValueError(f"dropout must be 0 where some keys come from a cache and others travel, got {dropout}")
        q = q if q_freqs is None else rope(q, q_freqs)
        return attention_with_dropout(q, k, v, table.gathered, mask, dropout).flatten(2), cache
    attended, lse = anchor_attention(q, k, v, table.gathered, q_freqs=q_freqs, key_mask=mask, return_lse=True)
    return _with_cached(q, q_freqs, attended, lse, entries, sharded).flatten(2), cache


def _with_cached(
    q: Tensor,
    q_freqs: Tensor | None,
    attended: Tensor,
    lse: Tensor,
    entries: Mapping[str, CacheEntry],
    sharded: ShardedPlan,
) -> Tensor:
    """Merges the attention to what is in the cache, which every process has whole."""
    if not entries:
        return attended
    k, v, mask = append_cached(None, None, entries, attended)
    part, part_lse = anchor_attention(q, k, v, sharded.cached, q_freqs=q_freqs, key_mask=mask, return_lse=True)
    return merge_attention([attended, part], [lse, part_lse])[0]


def _cache(
    k: Tensor, v: Tensor, mask: Tensor | None, sharded: ShardedPlan, entries: Mapping[str, CacheEntry]
) -> KVCache:
    """The cache of all processes, the tokens of a group process by process.

    Without the padding: this copy is read in every later call, on this process alone.
    """
    pieces = [piece for places in sharded.pieces.values() for piece in places]
    k, v = (torch.cat([rows[:, begin:end] for begin, end in pieces], dim=1) for rows in (k, v))
    if mask is not None:
        mask = torch.cat([mask[:, begin:end] for begin, end in pieces], dim=1)
    slices: dict[str, tuple[int, int]] = {}
    begin = 0
    for name, places in sharded.pieces.items():
        size = sum(last - first for first, last in places)
        slices[name] = (begin, begin + size)
        begin += size
    cache = make_cache(k, v, mask, slices)
    return cache | {name: dict(entry) for name, entry in entries.items()}
