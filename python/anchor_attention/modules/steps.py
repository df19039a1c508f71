"""The steps of a call, from tokens to what the output projection takes: shared by the modules and the integrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..functional import anchor_attention, rope
from ..key_range_table import KeyRangeTable
from ..patterns import AttentionPattern, TokenSpec
from .checks import Freqs, check_groups, check_patterns, group_size
from .kv_cache import CacheEntry, KVCache, append_cached, cached_size, check_cache, make_cache
from .plan import AttentionPlan, GroupSize, Pattern, attention_plan
from .projection import is_plain_linear, linear, project
from .rope import rotate_half_rope


def plan_call(
    x: Tensor,
    token_specs: Sequence[TokenSpec],
    attention_patterns: Sequence[AttentionPattern],
    kv_cache: Mapping[str, CacheEntry] | None,
    num_heads: int,
    head_dim: int,
    *,
    keep_unread: bool,
    keep_names: Sequence[str] = (),
) -> AttentionPlan:
    """Makes, or remembers, the plan of a call.

    Args:
        x: (B, N, dim), and the other arguments as for :meth:`MixedAttention.forward`.
        token_specs: The token groups.
        attention_patterns: The patterns.
        kv_cache: The cache.
        num_heads: Number of heads.
        head_dim: Width of a head.
        keep_unread: Whether groups that are read only by groups outside x count as read too.
        keep_names: Groups that count as read in any case.

    Raises:
        ValueError: If the arguments contradict each other.
    """
    groups, patterns = named_call(x, token_specs, attention_patterns, kv_cache, num_heads, head_dim)
    plan = attention_plan(groups, patterns, keep_unread, tuple(keep_names))
    if plan.n_tokens != x.shape[1]:
        raise ValueError(
            f"Token specs total size {plan.n_tokens} must equal the number of tokens of x, {x.shape[1]}; "
            f"token_specs are {[(group.name, group.in_x) for group in groups]}"
        )
    return plan


def named_call(
    x: Tensor,
    token_specs: Sequence[TokenSpec],
    attention_patterns: Sequence[AttentionPattern],
    kv_cache: Mapping[str, CacheEntry] | None,
    num_heads: int,
    head_dim: int,
) -> tuple[tuple[GroupSize, ...], tuple[Pattern, ...]]:
    """Reads the groups and patterns of a call, in a form that can be looked up. Arguments as for :func:`plan_call`.

    Raises:
        ValueError: If one is of another kind, or the cache does not fit.
    """
    if kv_cache is not None:
        check_cache(kv_cache)
    groups = []
    for spec in check_groups(token_specs):
        name, size, in_cache = spec.name, spec.size, None
        if size is not None:
            size = group_size(name, size)
        elif kv_cache is not None and name in kv_cache:
            in_cache = cached_size(name, kv_cache[name], x.shape[0], num_heads, head_dim)
        groups.append(GroupSize(name, size, in_cache))
    patterns = tuple((tuple(p.query_tokens), tuple(p.key_value_tokens)) for p in check_patterns(attention_patterns))
    return tuple(groups), patterns


def project_packed(qkv: nn.Module, x: Tensor, plan: AttentionPlan, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projects x (B, N, dim) by one linear layer of 3 dim outputs: queries, keys and values.

    Returns:
        q (B, N, H, D) and k, v (B, tokens read, H, D): views of one or two packed projections.
    """
    if plan.reads_all:
        q, k, v = split_heads(project(qkv, x), 3, num_heads, x.shape[2] // num_heads).unbind(2)
        return q, k, v
    k, v, project_queries = project_keys(qkv, x, plan, num_heads)
    return project_queries(), k, v


def project_keys(
    qkv: nn.Module, x: Tensor, plan: AttentionPlan, num_heads: int
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """As :func:`project_packed`, but only k and v, and a function that projects the queries later."""
    dim = x.shape[2]
    heads = (num_heads, dim // num_heads)
    if not is_plain_linear(qkv):
        q, k, v = split_heads(project(qkv, x), 3, *heads).unbind(2)
        return read_tokens(k, plan), read_tokens(v, plan), lambda: q
    layer = cast(nn.Linear, qkv)
    rows = [dim, 2 * dim]
    q_weight, kv_weight = layer.weight.split_with_sizes(rows)
    q_bias, kv_bias = (None, None) if layer.bias is None else layer.bias.split_with_sizes(rows)

    def project_queries() -> Tensor:
        return split_heads(linear(x, q_weight, q_bias), *heads)

    if not plan.read_slices:
        q = project_queries()
        return q[:, :0], q[:, :0], lambda: q
    kv = linear(read_tokens(x, plan), kv_weight, kv_bias)
    k, v = split_heads(kv, 2, *heads).unbind(2)
    return k, v, project_queries


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    key_padding_mask: Tensor | None,
    freqs: Freqs | None,
    kv_cache: Mapping[str, CacheEntry] | None,
    return_kv_cache: bool,
    dropout: float,
) -> tuple[Tensor, KVCache | None]:
    """From projections to what the output projection takes.

    Args:
        q: (B, N, H, D), of all tokens of x.
        k: (B, tokens read, H, D), of the tokens that the plan reads.
        v: Like k.
        plan: The plan of the call.
        key_padding_mask: As for :meth:`MixedAttention.forward`, and so are freqs, kv_cache and return_kv_cache.
        freqs: Rotary factors.
        kv_cache: The cache.
        return_kv_cache: Whether to return one.
        dropout: Probability with which weights are dropped in this call.

    Returns:
        (B, N, H D), and the cache where it is asked for.

    Raises:
        ValueError: If dtype or device of the cache do not fit the queries.
    """
    q_freqs, k_freqs = None, None
    if isinstance(freqs, Tensor):
        freqs = readable(freqs)
        q_freqs, k_freqs = freqs, read_tokens(freqs, plan)
    elif freqs is not None:
        q = rotate_half_rope(q, freqs)
        k = rotate_half_rope(k, tuple(read_tokens(angle, plan) for angle in freqs))
    key_mask = None if key_padding_mask is None else readable(read_tokens(key_padding_mask, plan))

    if k_freqs is not None and (return_kv_cache or plan.cached_names or dropout > 0):
        # The cache holds rotated keys, and so do the keys that are joined with it.
        k, k_freqs = rope(k, k_freqs), None
    if kv_cache is not None and plan.cached_names:
        fresh = (k, v) if plan.read_slices else None
        entries = {name: kv_cache[name] for name in plan.cached_names}
        k, v, key_mask = append_cached(fresh, key_mask, entries, q)
    cache = None
    if return_kv_cache:
        # Views of the packed projection would keep all of it alive for as long as the cache.
        k, v = k.contiguous(), v.contiguous()
        cache = make_cache(k, v, key_mask, plan.key_slices)

    if dropout > 0:
        q = q if q_freqs is None else rope(q, q_freqs)
        attended = attention_with_dropout(q, k, v, plan.table, key_mask, dropout)
    else:
        attended = anchor_attention(q, k, v, plan.table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask)
    return attended.flatten(2), cache


def read_tokens(tensor: Tensor, plan: AttentionPlan) -> Tensor:
    """Selects the tokens that are read, on axis 1: a view where they are one run."""
    if plan.reads_all:
        return tensor
    parts = [tensor[:, begin:end] for begin, end in plan.read_slices or ((0, 0),)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def split_heads(projected: Tensor, *sizes: int) -> Tensor:
    """(B, N, width) -> (B, N, *sizes).

    Raises:
        ValueError: If the width is another, as that of a projection that tensor parallelism cuts.
    """
    if projected.shape[-1] != math.prod(sizes):
        raise ValueError(
            f"the projection must be {math.prod(sizes)} wide, got {projected.shape[-1]}: "
            "where it is sharded, gather what it returns (ColwiseParallel(output_layouts=Replicate()))"
        )
    return readable(projected).view(*projected.shape[:2], *sizes)


def readable(tensor: Tensor) -> Tensor:
    """The tensor as the operation takes it: with a contiguous last axis."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, table: KeyRangeTable, key_mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention of rotated q and k with dropped weights, one call for each entry of the table. Shapes as there."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for (q_begin, q_end), key_ranges in table.entries():
        if sum(end - begin for begin, end in key_ranges) == 0:
            continue
        keys = torch.cat([k[:, begin:end] for begin, end in key_ranges], dim=1)
        values = torch.cat([v[:, begin:end] for begin, end in key_ranges], dim=1)
        mask = has_key = None
        if key_mask is not None:
            mask = torch.cat([key_mask[:, begin:end] for begin, end in key_ranges], dim=1)[:, None, None, :]
            has_key = mask.any(dim=-1, keepdim=True)
            # Not every kernel behind it answers a row without keys by zeros: let it see all keys, zero the outcome.
            mask = mask | ~has_key
        attended = nn.functional.scaled_dot_product_attention(
            q[:, q_begin:q_end].transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout,
        )
        if has_key is not None:
            attended = attended.masked_fill(~has_key, 0.0)
        out[:, q_begin:q_end] = attended.transpose(1, 2)
    return out
