"""Modules, groups and a dense evaluation, written down separately, that the tests of the modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from anchor_attention import TokenSpec
from anchor_attention.modules import (
    CrossAnchorAttention,
    JointAnchorAttention,
    MixedAttention,
    SelfAnchorAttention,
)

DIM, HEADS = 32, 2
HEAD_DIM = DIM // HEADS
BRANCH_MODULES = [SelfAnchorAttention, CrossAnchorAttention, JointAnchorAttention]

# Float64 sums of some hundred terms of order one.
FLOAT64_TOLERANCE = 1e-12
# Float32 results of order one that went through four matrix products of 32 terms.
FLOAT32_TOLERANCE = 1e-5

Names = Sequence[str]
NamedPatterns = Sequence[tuple[Names, Names]]


def specs(**sizes: int | None) -> list[TokenSpec]:
    return [TokenSpec(name, size) for name, size in sizes.items()]


def total(token_specs: Sequence[TokenSpec]) -> int:
    return sum(spec.size or 0 for spec in token_specs)


def unit_freqs(batch: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    angle = torch.rand(batch, n, HEAD_DIM // 2, dtype=dtype) * 6
    return torch.polar(torch.ones_like(angle), angle)


def make(module_class: type, **fields: Any) -> Any:
    """A module of two branches whose attention is far from uniform."""
    return module_class(
        **{"dim": DIM, "num_heads": HEADS, "branches": ("surface", "volume"), "init_weights": "torch", **fields}
    )


def rows_of(token_specs: Sequence[TokenSpec], names: Names) -> torch.Tensor:
    """Row numbers of the groups on the token axis, group by group."""
    begins, begin = {}, 0
    for spec in token_specs:
        begins[spec.name] = begin
        begin += spec.size or 0
    sizes = {spec.name: spec.size or 0 for spec in token_specs}
    rows = [torch.arange(begins[name], begins[name] + sizes[name]) for name in names]
    return torch.cat(rows) if rows else torch.arange(0)


def dense(
    module: MixedAttention,
    x: torch.Tensor,
    token_specs: Sequence[TokenSpec],
    patterns: NamedPatterns,
    freqs: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Projects everything, gathers the rows of each pattern, and takes the softmax in one piece."""
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    if freqs is not None:
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * freqs[:, :, None]
            ).flatten(-2)
            for y in (q, k)
        )
    out = torch.zeros_like(q)
    for queries, keys in patterns:
        query_rows, key_rows = rows_of(token_specs, queries), rows_of(token_specs, keys)
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, query_rows], k[:, key_rows]) / HEAD_DIM**0.5
        weights = scores.exp()
        if mask is not None:
            weights = weights * mask[:, None, None, key_rows]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        out = out.index_copy(1, query_rows, torch.einsum("bhqk,bkhd->bqhd", weights, v[:, key_rows]))
    return module.proj(out.flatten(2))


def named_patterns(module_class: type, branches: Names, token_specs: Sequence[TokenSpec], suffix: str) -> NamedPatterns:
    """What the branch modules promise; branch names here are no prefixes of each other."""
    tokens = {b: [spec.name for spec in token_specs if spec.name.startswith(b)] for b in branches}
    present = [b + suffix for b in branches if b + suffix in tokens[b]]
    if module_class is SelfAnchorAttention:
        return [(tokens[b], [b + suffix]) for b in branches]
    if module_class is CrossAnchorAttention:
        return [(tokens[b], [a for a in present if a != b + suffix]) for b in branches]
    return [([spec.name for spec in token_specs], present)]


def queries_alone(token_specs: Sequence[TokenSpec]) -> tuple[list[TokenSpec], torch.Tensor]:
    anchors = [spec.name for spec in token_specs if spec.name.endswith("_anchors")]
    alone = [TokenSpec(spec.name, None if spec.name in anchors else spec.size) for spec in token_specs]
    return alone, rows_of(token_specs, [spec.name for spec in token_specs if spec.name not in anchors])
