"""Small classes with the names, attributes and calling conventions of the package ``noether``, in plain PyTorch.

``Split*`` are of the generation with separate projections that returns the cache, the others of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from anchor_attention import AttentionPattern, TokenSpec, rope_reference

DIM, HEADS = 24, 2


def heads_of(x: Tensor) -> Tensor:
    """(B, N, dim) -> (B, H, N, D)."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def rotated(x: Tensor, freqs: Tensor | None) -> Tensor:
    return x if freqs is None else rope_reference(x.transpose(1, 2), freqs).transpose(1, 2)


def normalised(x: Tensor, wanted: bool) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],)) if wanted else x


class _Attention(nn.Module):
    def __init__(self, use_rope: bool = True, dropout: float = 0.0, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM // HEADS
        self.use_rope, self.dropout, self.qk_norm = use_rope, dropout, qk_norm
        self.proj = nn.Linear(DIM, DIM)
        self.proj_dropout = nn.Dropout(dropout)


class DotProductAttention(_Attention):
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(part) for part in self.qkv(x).chunk(3, dim=-1))
        return normalised(q, self.qk_norm), normalised(k, self.qk_norm), v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, freqs: Tensor | None = None) -> Tensor:
        q, k, v = self.projections(x)
        out = scaled_dot_product_attention(
            rotated(q, freqs),
            rotated(k, freqs),
            v,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.proj_dropout(self.proj(out.transpose(1, 2).flatten(2)))


class MixedAttention(DotProductAttention):
    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        attention_mask: Tensor | None = None,
        freqs: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.projections(x)
        return self.proj(self.attend(rotated(q, freqs), rotated(k, freqs), v, token_specs, attention_patterns)[0])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        token_specs: Sequence[TokenSpec],
        patterns: Sequence[AttentionPattern],
        mask: Tensor | None = None,
        kv_cache: Any = None,
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        present = [spec for spec in token_specs if spec.size is not None]
        sizes = [spec.size or 0 for spec in present]
        queries = dict(zip([spec.name for spec in present], q.split(sizes, dim=2), strict=True))
        fresh = len(present) == len(token_specs)
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
        cache = kv_cache or {
            spec.name: {"k": k_part, "v": v_part}
            for spec, k_part, v_part in zip(present, k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
        }
        masks = dict(zip([spec.name for spec in present], mask.split(sizes, dim=1), strict=True)) if fresh else {}
        outputs = {}
        for pattern in patterns:
            keys, values = (torch.cat([cache[n][kind] for n in pattern.key_value_tokens], dim=2) for kind in ("k", "v"))
            kept = torch.cat([masks[n] for n in pattern.key_value_tokens], dim=1)[:, None, None] if fresh else None
            for name in pattern.query_tokens:
                if name in queries:
                    outputs[name] = scaled_dot_product_attention(queries[name], keys, values, attn_mask=kept)
        out = torch.cat([outputs[spec.name] for spec in present], dim=2)
        return out.transpose(1, 2).flatten(2), {name: entry for name, entry in cache.items() if "_anchor" in name}


class MultiBranchAnchorAttention(nn.Module):
    mixed_class: type[nn.Module] = MixedAttention

    def __init__(self, branches: tuple[str, ...] = ("surface", "volume"), **fields: Any) -> None:
        super().__init__()
        self.mixed_attention = self.mixed_class(**fields)
        self.branches, self.anchor_suffix = branches, "_anchors"

    def forward(self, x: Tensor, token_specs: Sequence[TokenSpec], freqs: Tensor | None = None) -> Any:
        patterns = self._create_attention_patterns(token_specs)
        return self.mixed_attention(x, token_specs, patterns, freqs=freqs)

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> list[AttentionPattern]:
        return [
            AttentionPattern([spec.name for spec in token_specs if spec.name.startswith(branch)], self.keys(branch))
            for branch in self.branches
        ]

    def keys(self, branch: str) -> list[str]:
        raise NotImplementedError


class SelfAnchorAttention(MultiBranchAnchorAttention):
    def keys(self, branch: str) -> list[str]:
        return [branch + self.anchor_suffix]


class CrossAnchorAttention(MultiBranchAnchorAttention):
    def keys(self, branch: str) -> list[str]:
        return [other + self.anchor_suffix for other in self.branches if other != branch]


class JointAnchorAttention(MultiBranchAnchorAttention):
    def keys(self, branch: str) -> list[str]:
        return [other + self.anchor_suffix for other in self.branches]


class PerceiverAttention(_Attention):
    def __init__(self, kv_dim: int = DIM, **fields: Any) -> None:
        super().__init__(**fields)
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(kv_dim, 2 * DIM)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        attn_mask: Tensor | None = None,
        q_freqs: Tensor | None = None,
        k_freqs: Tensor | None = None,
    ) -> Tensor:
        k, v = (heads_of(part) for part in self.kv(kv).chunk(2, dim=-1))
        queries, k = normalised(heads_of(self.q(q)), self.qk_norm), normalised(k, self.qk_norm)
        out = scaled_dot_product_attention(rotated(queries, q_freqs), rotated(k, k_freqs), v, attn_mask=attn_mask)
        return self.proj_dropout(self.proj(out.transpose(1, 2).flatten(2)))


def split_projections(original: nn.Module, packed: str, names: Sequence[str]) -> None:
    """Puts linear layers of the names in the place of a packed one."""
    linear = getattr(original, packed)
    delattr(original, packed)
    for name in names:
        setattr(original, name, nn.Linear(linear.in_features, DIM))


class SplitDotProductAttention(DotProductAttention):
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        split_projections(self, "qkv", ("q", "k", "v"))

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        return normalised(q, self.qk_norm), normalised(k, self.qk_norm), v

    forward = DotProductAttention.forward


class SplitMixedAttention(MixedAttention):
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        split_projections(self, "qkv", ("q", "k", "v"))

    projections = SplitDotProductAttention.projections

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Tensor | None = None,
        kv_cache: Any = None,
    ) -> tuple[Tensor, Any]:
        cached = any(spec.size is None for spec in token_specs)
        q, k, v = self.projections(x)
        out, cache = self.attend(
            rotated(q, freqs),
            rotated(k, freqs),
            v,
            token_specs,
            attention_patterns,
            key_padding_mask,
            kv_cache if cached else None,
        )
        return self.proj(out), None if cached else cache


class UntiedLinear(nn.Module):
    """A linear layer for every domain: the part of a group's name before the first underscore.

    As the package's, it multiplies square weights by their transpose or not, as the balance of the domains decides.
    """

    def __init__(self, domains: int) -> None:
        super().__init__()
        self.weight = nn.ParameterList([nn.Parameter(torch.randn(DIM, DIM) / DIM**0.5) for _ in range(domains)])
        self.bias = nn.ParameterList([nn.Parameter(torch.randn(DIM)) for _ in range(domains)])

    def forward(self, x: Tensor, token_specs: Sequence[TokenSpec]) -> Tensor:
        sizes: dict[str, int] = {}
        for spec in token_specs:
            if spec.size:
                domain = spec.name.split("_")[0]
                sizes[domain] = sizes.get(domain, 0) + spec.size
        balanced = len(sizes) * max(sizes.values()) <= 1.1 * x.shape[1]
        parts = x.split(list(sizes.values()), dim=1)
        return torch.cat(
            [
                nn.functional.linear(part, self.weight[i].T if balanced else self.weight[i], self.bias[i])
                for i, part in enumerate(parts)
            ],
            dim=1,
        )


class UntiedMixedAttention(MixedAttention):
    def __init__(self, domains: int = 2, **fields: Any) -> None:
        super().__init__(**fields)
        del self.qkv
        self.q, self.k, self.v = UntiedLinear(domains), UntiedLinear(domains), UntiedLinear(domains)
        self.proj = UntiedLinear(domains)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Tensor | None = None,
        kv_cache: Any = None,
    ) -> Tensor:
        if kv_cache is not None:
            raise NotImplementedError("kv_cache")
        q, k, v = (heads_of(linear(x, token_specs)) for linear in (self.q, self.k, self.v))
        out, _ = self.attend(rotated(q, freqs), rotated(k, freqs), v, token_specs, attention_patterns, key_padding_mask)
        return self.proj(out, token_specs)


class SplitMultiBranchAnchorAttention(MultiBranchAnchorAttention):
    mixed_class = SplitMixedAttention

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        key_padding_mask: Tensor | None = None,
        freqs: Tensor | None = None,
        kv_cache: Any = None,
    ) -> Any:
        patterns = self._create_attention_patterns(token_specs)
        return self.mixed_attention(
            x, token_specs, patterns, key_padding_mask=key_padding_mask, freqs=freqs, kv_cache=kv_cache
        )


class SplitSelfAnchorAttention(SplitMultiBranchAnchorAttention, SelfAnchorAttention):
    pass


class SplitCrossAnchorAttention(SplitMultiBranchAnchorAttention, CrossAnchorAttention):
    pass


class SplitJointAnchorAttention(SplitMultiBranchAnchorAttention, JointAnchorAttention):
    pass


class UntiedCrossAnchorAttention(SplitMultiBranchAnchorAttention, CrossAnchorAttention):
    mixed_class = UntiedMixedAttention


class SplitPerceiverAttention(PerceiverAttention):
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        split_projections(self, "kv", ("k", "v"))

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
        q_freqs: Tensor | None = None,
        k_freqs: Tensor | None = None,
        kv_cache: Any = None,
    ) -> tuple[Tensor, Any]:
        fresh = kv_cache is None
        if fresh and kv is None:
            raise ValueError("Either kv or kv_cache must be provided.")
        if fresh:
            k = normalised(heads_of(self.k(kv)), self.qk_norm)
            kv_cache = {"k": rotated(k, k_freqs), "v": heads_of(self.v(kv))}
        queries = rotated(normalised(heads_of(self.q(q)), self.qk_norm), q_freqs)
        out = scaled_dot_product_attention(queries, kv_cache["k"], kv_cache["v"], attn_mask=attn_mask)
        return self.proj_dropout(self.proj(out.transpose(1, 2).flatten(2))), kv_cache if fresh else None


# The package gives both generations the same names.
for split in (SplitDotProductAttention, SplitMixedAttention, SplitPerceiverAttention):
    split.__name__ = split.__name__.removeprefix("Split")
