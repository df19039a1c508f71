"""Forward passes that stand in for those of attention modules of other packages, on the modules' own projections."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import anchor_attention, rope
from ..key_range_table import KeyRangeTable
from ..modules.kv_cache import CacheEntry, KVCache
from ..modules.mixed import Freqs, attend, check_inputs, plan_call, project_packed, read_tokens
from ..modules.plan import AttentionPlan, bounded_cache
from ..patterns import AttentionPattern, TokenSpec


class FusedForward(nn.Module):
    """Base of the stand-ins. Each is put before the class that it stands in for, whose attributes it uses.

    Attributes:
        original_class: The class that it stands in for.
    """

    original_class: ClassVar[type[nn.Module]]

    num_heads: int
    head_dim: int
    use_rope: bool
    dropout: float
    q: nn.Module
    k: nn.Module
    v: nn.Module
    proj: nn.Module
    proj_dropout: nn.Module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the two that it was made of.
        return _empty_module, (type(self).__mro__[1], self.original_class), self.__dict__

    def _dropout_now(self) -> float:
        return self.dropout if self.training else 0.0

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim)

    def _normalises(self) -> bool:
        return bool(getattr(self, "qk_norm", False))


@bounded_cache
def fused_class(forward: type[FusedForward], original: type[nn.Module]) -> type[FusedForward]:
    """Makes the subclass of ``original`` that goes forward as ``forward`` does. No check that it may."""

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(original_class=original, __module__=__name__, __doc__=original.__doc__)

    fused: type[FusedForward] = types.new_class(f"Accelerated{original.__name__}", (forward, original), exec_body=fill)
    return fused


def _empty_module(forward: type[FusedForward], original: type[nn.Module]) -> nn.Module:
    fused = fused_class(forward, original)
    module: nn.Module = fused.__new__(fused)
    return module


class Segment(NamedTuple):
    """Tokens [begin, end) of one domain: the number of its projections in their banks."""

    domain: int
    begin: int
    end: int


def domain_segments(token_specs: Sequence[TokenSpec]) -> list[Segment]:
    """Returns the tokens of each domain in the input. A domain is what a group's name holds before its first ``_``.

    Domains are numbered as they appear, those without a token in the input included: their projections are there.
    """
    numbers: dict[str, int] = {}
    segments: list[Segment] = []
    begin = 0
    for spec in token_specs:
        domain = numbers.setdefault(spec.name.split("_")[0], len(numbers))
        if spec.size is None:
            continue
        end = begin + spec.size
        if segments and segments[-1].domain == domain:
            segments[-1] = Segment(domain, segments[-1].begin, end)
        else:
            segments.append(Segment(domain, begin, end))
        begin = end
    return segments


def read_segments(segments: Sequence[Segment], plan: AttentionPlan) -> list[Segment]:
    """Returns the segments on the axis of the tokens that are read."""
    read: list[Segment] = []
    offset = 0
    for read_begin, read_end in plan.read_slices:
        for domain, begin, end in segments:
            first, last = max(begin, read_begin), min(end, read_end)
            if last > first:
                read.append(Segment(domain, offset + first - read_begin, offset + last - read_begin))
        offset += read_end - read_begin
    return read


def project(linear: nn.Module, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Applies a shared linear layer, or one whose weights and biases are banks with an entry for each domain.

    Raises:
        ValueError: If there are more domains than entries.
    """
    weights, biases = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if not isinstance(weights, nn.ParameterList):
        out: Tensor = linear(x)
        return out
    if not segments:
        return x.new_empty(*x.shape[:-1], weights[0].shape[0])
    n_domains = max(segment.domain for segment in segments) + 1
    if n_domains > len(weights):
        raise ValueError(f"token_specs hold {n_domains} domains, but there are projections of {len(weights)}")
    parts = [
        nn.functional.linear(
            x[:, begin:end], weights[domain], biases[domain] if isinstance(biases, nn.ParameterList) else None
        )
        for domain, begin, end in segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _AnyMixedForward(FusedForward):
    def _mixed(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None,
        freqs: Freqs | None,
        kv_cache: Mapping[str, CacheEntry] | None,
        return_kv_cache: bool,
    ) -> tuple[Tensor, KVCache | None]:
        check_inputs(x, self.num_heads * self.head_dim, self.use_rope, key_padding_mask, freqs)
        plan = plan_call(
            x, token_specs, attention_patterns, kv_cache, self.num_heads, self.head_dim, keep_unread=return_kv_cache
        )
        segments: list[Segment] = []
        qkv = getattr(self, "qkv", None)
        if isinstance(qkv, nn.Module):
            q, k, v = project_packed(qkv, x, plan, self.num_heads)
        else:
            if isinstance(getattr(self.q, "weight", None), nn.ParameterList):
                segments = domain_segments(token_specs)
            read, segments_read = read_tokens(x, plan), read_segments(segments, plan)
            q = self._heads(project(self.q, x, segments))
            k = self._heads(project(self.k, read, segments_read))
            v = self._heads(project(self.v, read, segments_read))
        attended, cache = attend(
            q,
            k,
            v,
            plan,
            key_padding_mask=key_padding_mask,
            freqs=freqs,
            kv_cache=kv_cache,
            return_kv_cache=return_kv_cache,
            dropout=self._dropout_now(),
            qk_norm=self._normalises(),
        )
        return project(self.proj, attended, segments), cache


class PlainMixedForward(_AnyMixedForward):
    """Mixed attention that returns a Tensor and takes no mask."""

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        attention_mask: Tensor | None = None,
        freqs: Freqs | None = None,
    ) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        if attention_mask is not None:
            raise NotImplementedError("attention_mask is not supported, got a tensor: None is expected")
        return self._mixed(x, token_specs, attention_patterns, None, freqs, None, False)[0]


class MaskedMixedForward(_AnyMixedForward):
    """Mixed attention that returns a Tensor and takes a key mask."""

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
    ) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self._mixed(x, token_specs, attention_patterns, key_padding_mask, freqs, None, False)[0]


class MixedForward(_AnyMixedForward):
    """Mixed attention that returns the output and the cache."""

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, CacheEntry] | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """(B, N, dim) -> (B, N, dim) and the cache, ``None`` if a group came from a cache."""
        cached = any(spec.size is None for spec in token_specs)
        return self._mixed(
            x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache if cached else None, not cached
        )


class UntiedMixedForward(_AnyMixedForward):
    """Mixed attention with projections for each domain, by itself: it returns a Tensor and reads no cache."""

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, CacheEntry] | None = None,
    ) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self._mixed(x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, False)[0]


class DotProductForward(FusedForward):
    """Attention of all tokens to all tokens."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, freqs: Freqs | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        key_mask = _key_mask(attn_mask, x.shape[0], x.shape[1])
        fits = self.use_rope == (freqs is not None) and self._dropout_now() == 0
        if not fits or isinstance(freqs, tuple) or (attn_mask is not None and key_mask is None):
            unfused: Tensor = super().forward(x, attn_mask=attn_mask, freqs=freqs)
            return unfused
        qkv = getattr(self, "qkv", None)
        if isinstance(qkv, nn.Module):
            q, k, v = qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).unbind(2)
        else:
            q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        if self._normalises():
            q, k = _normalised(q), _normalised(k)
        attended = anchor_attention(
            q, k, v, _dense_table(x.shape[1], x.shape[1]), q_freqs=freqs, k_freqs=freqs, key_mask=key_mask
        )
        out: Tensor = self.proj_dropout(self.proj(attended.flatten(2)))
        return out


class _AnyPerceiverForward(FusedForward):
    def _perceive(
        self,
        q: Tensor,
        kv: Tensor | None,
        attn_mask: Tensor | None,
        q_freqs: Tensor | None,
        k_freqs: Tensor | None,
        kv_cache: CacheEntry | None,
        segments: Sequence[Segment],
    ) -> tuple[Tensor, dict[str, Tensor] | None] | None:
        """Returns what the forward pass returns, or ``None`` where the fused operation can't compute it."""
        if kv_cache is None and kv is None:
            raise ValueError("Either kv or kv_cache must be provided, got None twice")
        n_keys = kv_cache["k"].shape[2] if kv_cache is not None else kv.shape[1] if kv is not None else 0
        key_mask = _key_mask(attn_mask, q.shape[0], n_keys)
        needed = [q_freqs] if kv_cache is not None else [q_freqs, k_freqs]
        fits = all(self.use_rope == (freqs is not None) and not isinstance(freqs, tuple) for freqs in needed)
        if not fits or self._dropout_now() > 0 or (attn_mask is not None and key_mask is None):
            return None
        queries = self._heads(project(self.q, q, segments))
        if self._normalises():
            queries = _normalised(queries)
        new_cache = None
        if kv_cache is not None:
            k, v = kv_cache["k"].transpose(1, 2), kv_cache["v"].transpose(1, 2)
        else:
            packed = getattr(self, "kv", None)
            if isinstance(packed, nn.Module):
                k, v = packed(kv).view(q.shape[0], n_keys, 2, self.num_heads, self.head_dim).unbind(2)
            else:
                k, v = self._heads(self.k(kv)), self._heads(self.v(kv))
            if self._normalises():
                k = _normalised(k)
            if k_freqs is not None:
                k = rope(k, k_freqs)
            new_cache = {"k": k.transpose(1, 2), "v": v.transpose(1, 2)}
        table = _dense_table(q.shape[1], n_keys)
        attended = anchor_attention(queries, k, v, table, q_freqs=q_freqs, key_mask=key_mask).flatten(2)
        return self.proj_dropout(project(self.proj, attended, segments)), new_cache


class PlainPerceiverForward(_AnyPerceiverForward):
    """Perceiver attention that returns a Tensor."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        attn_mask: Tensor | None = None,
        q_freqs: Tensor | None = None,
        k_freqs: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, Nq, dim) and (B, Nk, kv dim) -> (B, Nq, dim)."""
        fused = self._perceive(q, kv, attn_mask, q_freqs, k_freqs, None, ())
        if fused is None:
            unfused: Tensor = super().forward(q, kv, attn_mask=attn_mask, q_freqs=q_freqs, k_freqs=k_freqs)
            return unfused
        return fused[0]


class PerceiverForward(_AnyPerceiverForward):
    """Perceiver attention that returns the output and the cache."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
        q_freqs: Tensor | None = None,
        k_freqs: Tensor | None = None,
        kv_cache: CacheEntry | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Queries (B, Nq, dim) and (B, Nk, kv dim) -> (B, Nq, dim) and the cache, ``None`` if it was given."""
        fused = self._perceive(q, kv, attn_mask, q_freqs, k_freqs, kv_cache, ())
        if fused is None:
            unfused: tuple[Tensor, dict[str, Tensor] | None] = super().forward(
                q, kv, attn_mask=attn_mask, q_freqs=q_freqs, k_freqs=k_freqs, kv_cache=kv_cache
            )
            return unfused
        return fused


class UntiedPerceiverForward(_AnyPerceiverForward):
    """Perceiver attention with query and output projections for each domain."""

    def forward(
        self,
        q: Tensor,
        token_specs: Sequence[TokenSpec],
        kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
        q_freqs: Tensor | None = None,
        k_freqs: Tensor | None = None,
        kv_cache: CacheEntry | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Queries (B, Nq, dim) and (B, Nk, kv dim) -> (B, Nq, dim) and the cache, ``None`` if it was given."""
        fused = self._perceive(q, kv, attn_mask, q_freqs, k_freqs, kv_cache, domain_segments(token_specs))
        if fused is None:
            unfused: tuple[Tensor, dict[str, Tensor] | None] = super().forward(
                q, token_specs, kv, attn_mask=attn_mask, q_freqs=q_freqs, k_freqs=k_freqs, kv_cache=kv_cache
            )
            return unfused
        return fused


@bounded_cache
def _dense_table(n_queries: int, n_keys: int) -> KeyRangeTable:
    return KeyRangeTable((0, n_queries), (0, 1), (0, n_keys))


def _normalised(heads: Tensor) -> Tensor:
    return nn.functional.rms_norm(heads, (heads.shape[-1],))


def _key_mask(attn_mask: Tensor | None, batch: int, n_keys: int) -> Tensor | None:
    """Returns (B, Nk) bool of an attention mask that is the same for all heads and queries, ``None`` for any other."""
    if attn_mask is None or attn_mask.dtype != torch.bool or attn_mask.dim() != 4:
        return None
    if attn_mask.shape[1:3] != (1, 1) or attn_mask.shape[3] != n_keys:
        return None
    return attn_mask[:, 0, 0].expand(batch, n_keys)
