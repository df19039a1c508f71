"""Attention between token groups in arbitrary patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._context import interceptable
from ..functional import anchor_attention, rope
from ..key_range_table import KeyRangeTable
from ..patterns import AttentionPattern, TokenSpec
from .config import MixedAttentionConfig, resolve_config
from .kv_cache import CacheEntry, KVCache, append_cached, cached_size, make_cache
from .plan import AttentionPlan, GroupSize, attention_plan
from .rope import rotate_half_rope

Freqs = Tensor | tuple[Tensor, ...]


class MixedAttention(nn.Module):
    """Multi-head attention in which every token group attends, densely, to the groups that a pattern names.

    All groups share the projections. Only tokens that some group reads are projected to keys and values.

    Args:
        config: A :class:`MixedAttentionConfig` or any object with its fields; or ``None`` and the fields as keywords.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: If a field is out of its range.
    """

    def __init__(self, config: Any = None, **fields: Any) -> None:
        super().__init__()
        resolved = resolve_config(MixedAttentionConfig, config, fields)
        self.hidden_dim = resolved.hidden_dim
        self.num_heads = resolved.num_heads
        self.head_dim = resolved.head_dim
        self.use_rope = resolved.use_rope
        self.dropout = resolved.dropout
        self.init_weights = resolved.init_weights
        self.qk_norm = resolved.qk_norm
        self.qkv = nn.Linear(resolved.hidden_dim, 3 * resolved.hidden_dim, bias=resolved.bias)
        self.proj = nn.Linear(resolved.hidden_dim, resolved.hidden_dim, bias=resolved.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections as ``init_weights`` says."""
        for linear in (self.qkv, self.proj):
            if self.init_weights == "torch":
                linear.reset_parameters()
                continue
            if self.init_weights == "zeros" or (self.init_weights == "truncnormal002-identity" and linear is self.proj):
                nn.init.zeros_(linear.weight)
            else:
                nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @interceptable
    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, CacheEntry] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Applies the attention.

        Args:
            x: (B, N, hidden_dim), the groups one after the other in the order of ``token_specs``.
            token_specs: Name and size of each group. A group without a size is not in x: its keys and values come from
                ``kv_cache``. A group with a size gets fresh ones, cached or not.
            attention_patterns: Every group in x is a query in exactly one pattern.
            key_padding_mask: (B, N) bool, True where a token of x is real. Only groups that are read matter.
            freqs: Rotary factors of the tokens of x, required with ``use_rope``: (B or 1, N, head_dim / 2) complex64,
                or the legacy tuple of angles per axis, (B or 1, N, block) in radians.
            kv_cache: What an earlier call returned: for each group ``"k"`` (rotated) and ``"v"``, both
                (B, heads, tokens, head_dim), and ``"mask"``, (B, tokens) bool, where there was a mask.
            return_kv_cache: Whether to return the keys and values of every group that some pattern reads.

        Returns:
            (B, N, hidden_dim), and the cache where it is asked for.

        Raises:
            ValueError: If the arguments contradict each other or the configuration.
        """
        check_inputs(x, self.hidden_dim, self.use_rope, key_padding_mask, freqs)
        plan = plan_call(
            x, token_specs, attention_patterns, kv_cache, self.num_heads, self.head_dim, keep_unread=return_kv_cache
        )
        attended, cache = attend(
            *project_packed(self.qkv, x, plan, self.num_heads),
            plan,
            key_padding_mask=key_padding_mask,
            freqs=freqs,
            kv_cache=kv_cache,
            return_kv_cache=return_kv_cache,
            dropout=self.dropout if self.training else 0.0,
            qk_norm=self.qk_norm,
        )
        out = self.proj(attended)
        return out if cache is None else (out, cache)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            separate = [f"{prefix}{name}.{kind}" for name in ("q", "k", "v")]
            if all(key in state_dict for key in separate):
                state_dict[f"{prefix}qkv.{kind}"] = torch.cat([state_dict.pop(key) for key in separate])
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_inputs(
    x: Tensor, hidden_dim: int, use_rope: bool, key_padding_mask: Tensor | None, freqs: Freqs | None
) -> None:
    """Checks the inputs of a call against each other and the module.

    Raises:
        ValueError: If a shape or dtype does not fit, or freqs are missing or not used.
    """
    if x.dim() != 3 or x.shape[2] != hidden_dim:
        raise ValueError(f"x must be (batch, tokens, {hidden_dim}), got shape {tuple(x.shape)}")
    if use_rope != (freqs is not None):
        given = "None" if freqs is None else type(freqs).__name__
        raise ValueError(f"RoPE usage mismatch: use_rope={use_rope}, but freqs={given}")
    if key_padding_mask is None:
        return
    if key_padding_mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask must have dtype torch.bool, got {key_padding_mask.dtype}")
    if key_padding_mask.dim() != 2:
        raise ValueError(f"key_padding_mask must be 2-D (batch, tokens), got shape {tuple(key_padding_mask.shape)}")
    if key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must have the batch size and length of x, {tuple(x.shape[:2])}, "
            f"got {tuple(key_padding_mask.shape)}"
        )


def plan_call(
    x: Tensor,
    token_specs: Sequence[TokenSpec],
    attention_patterns: Sequence[AttentionPattern],
    kv_cache: Mapping[str, CacheEntry] | None,
    num_heads: int,
    head_dim: int,
    *,
    keep_unread: bool,
) -> AttentionPlan:
    """Makes, or remembers, the plan of a call.

    Raises:
        ValueError: If the arguments contradict each other.
    """
    if kv_cache is not None and not kv_cache:
        raise ValueError("kv_cache is empty: pass None where nothing is cached")
    groups = []
    for spec in token_specs:
        in_cache = None
        if spec.size is None and kv_cache is not None and spec.name in kv_cache:
            in_cache = cached_size(spec.name, kv_cache[spec.name], x.shape[0], num_heads, head_dim)
        groups.append(GroupSize(spec.name, spec.size, in_cache))
    patterns = tuple((tuple(p.query_tokens), tuple(p.key_value_tokens)) for p in attention_patterns)
    plan = attention_plan(tuple(groups), patterns, keep_unread)
    if plan.n_tokens != x.shape[1]:
        raise ValueError(
            f"Token specs total size {plan.n_tokens} must equal the number of tokens of x, {x.shape[1]}; "
            f"token_specs are {[(group.name, group.in_x) for group in groups]}"
        )
    return plan


def project_packed(qkv: nn.Module, x: Tensor, plan: AttentionPlan, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projects x (B, N, dim) by one linear layer of 3 dim outputs: queries, keys and values.

    Returns:
        q (B, N, H, D) and k, v (B, tokens read, H, D): views of one or two packed projections.
    """
    batch, _, dim = x.shape
    heads = (num_heads, dim // num_heads)
    # What stands in for the projection (an adapter, a quantised layer) may have more to it than a weight to cut.
    if plan.reads_all or type(qkv) is not nn.Linear:
        q, k, v = qkv(x).view(batch, plan.n_tokens, 3, *heads).unbind(2)
        return q, read_tokens(k, plan), read_tokens(v, plan)
    rows = [dim, 2 * dim]
    q_weight, kv_weight = qkv.weight.split_with_sizes(rows)
    q_bias, kv_bias = (None, None) if qkv.bias is None else qkv.bias.split_with_sizes(rows)
    q = nn.functional.linear(x, q_weight, q_bias).view(batch, plan.n_tokens, *heads)
    if not plan.read_slices:
        k = v = q[:, :0]
        return q, k, v
    kv = nn.functional.linear(read_tokens(x, plan), kv_weight, kv_bias)
    k, v = kv.view(batch, kv.shape[1], 2, *heads).unbind(2)
    return q, k, v


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
    qk_norm: bool,
) -> tuple[Tensor, KVCache | None]:
    """From projections to what the output projection takes.

    Args:
        q: (B, N, H, D), of all tokens of x.
        k: (B, tokens read, H, D), of the tokens that the plan reads.
        v: Like k.
        plan: The plan of the call.
        key_padding_mask: As for :meth:`MixedAttention.forward`, and so are freqs, kv_cache and return_kv_cache.
        dropout: Probability with which weights are dropped in this call.
        qk_norm: Whether queries and keys are normalised.

    Returns:
        (B, N, H D), and the cache where it is asked for.
    """
    if qk_norm:
        # Before the rotation, which keeps the norm: cached keys are normalised as well as rotated.
        q, k = (nn.functional.rms_norm(heads, (heads.shape[-1],)) for heads in (q, k))
    q_freqs, k_freqs = None, None
    if isinstance(freqs, Tensor):
        q_freqs, k_freqs = freqs, read_tokens(freqs, plan)
    elif freqs is not None:
        q = rotate_half_rope(q, freqs)
        k = rotate_half_rope(k, tuple(read_tokens(angle, plan) for angle in freqs))
    key_mask = None if key_padding_mask is None else read_tokens(key_padding_mask, plan)

    if k_freqs is not None and (return_kv_cache or plan.cached_names or dropout > 0):
        # The cache holds rotated keys, and so do the keys that are joined with it.
        k, k_freqs = rope(k, k_freqs), None
    if kv_cache is not None and plan.cached_names:
        fresh = (k, v) if plan.read_slices else None
        k, v, key_mask = append_cached(fresh, key_mask, [kv_cache[name] for name in plan.cached_names], q.dtype)
    cache = None
    if return_kv_cache:
        # Views of the packed projection would keep all of it alive for as long as the cache.
        k, v = k.contiguous(), v.contiguous()
        cache = make_cache(k, v, key_mask, plan.key_slices)

    if dropout > 0:
        q = q if q_freqs is None else rope(q, q_freqs)
        attended = _attention_with_dropout(q, k, v, plan.table, key_mask, dropout)
    else:
        attended = anchor_attention(q, k, v, plan.table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask)
    return attended.flatten(2), cache


def read_tokens(tensor: Tensor, plan: AttentionPlan) -> Tensor:
    """Selects the tokens that are read, on axis 1: a view where they are one run."""
    if plan.reads_all:
        return tensor
    parts = [tensor[:, begin:end] for begin, end in plan.read_slices or ((0, 0),)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attention_with_dropout(
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
