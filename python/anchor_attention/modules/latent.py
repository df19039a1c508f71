"""Attention by way of latents: they read tokens, and tokens read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..functional import anchor_attention
from ..key_range_table import KeyRangeTable
from ..patterns import TokenSpec
from .checks import check_groups, check_inputs, group_size
from .config import LatentAttentionConfig, default, given, resolve_config
from .multi_branch import check_complete, tokens_by_branch
from .plan import bounded_cache
from .projection import initialise, make_norm, project
from .steps import readable, split_heads

Ranges = tuple[tuple[int, int], ...]


class LatentAttention(nn.Module):
    """Multi-head attention of every token to every other one through a few latents, in time linear in the tokens.

    The latents attend to the tokens and gather their values; the tokens, with the same keys, attend to the latents and
    read what they gathered::

        z = softmax(scale · latents kᵀ) v        y = softmax(scale · k latentsᵀ) z        out = proj(y)

    With ``branches``, the latents read only anchors: tokens that only read can come later, against the latents of an
    earlier call. Latents per branch keep the branches apart, shared latents join them.

    Method: FLARE, https://arxiv.org/abs/2508.12594.

    Args:
        config: A :class:`LatentAttentionConfig` or any object with its fields; or ``None`` and the fields as keywords.
        hidden_dim: Width of the tokens, a multiple of ``num_heads``.
        num_heads: Number of heads.
        num_latents: Number of latents of a set.
        branches: Names of the branches; without any, one set of latents reads all tokens.
        anchor_suffix: The anchors of a branch are the group ``branch + anchor_suffix``.
        per_branch: Whether each branch has a set of latents of its own.
        scale: Factor of the scores.
        init_weights: How the projections are initialised, see :class:`AttentionConfig`.
        bias: Whether the projections have a bias.
        qk_norm: Whether latents and keys are normalised: ``False``, ``True``, or ``"rms"`` with learnt weights.
        dim: Another name for ``hidden_dim``.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: If a field is out of its range.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        hidden_dim: int | None = None,
        num_heads: int | None = None,
        num_latents: int = default(64),
        branches: Sequence[str] = default(()),
        anchor_suffix: str = default("_anchors"),
        per_branch: bool = default(False),
        scale: float = default(1.0),
        init_weights: str = default("truncnormal002"),
        bias: bool = default(True),
        qk_norm: bool | str = default(False),
        dim: int | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        resolved = resolve_config(LatentAttentionConfig, config, given(locals()), unknown)
        self.hidden_dim = resolved.hidden_dim
        self.num_heads = resolved.num_heads
        self.head_dim = resolved.head_dim
        self.num_latents = resolved.num_latents
        self.branches = resolved.branches
        self.anchor_suffix = resolved.anchor_suffix
        self.per_branch = resolved.per_branch
        self.scale = resolved.scale
        self.init_weights = resolved.init_weights
        n_latents = resolved.num_latents * (len(resolved.branches) if resolved.per_branch else 1)
        self.latents = nn.Parameter(torch.empty(n_latents, self.num_heads, self.head_dim))
        self.k = nn.Linear(self.hidden_dim, self.hidden_dim, bias=resolved.bias)
        self.v = nn.Linear(self.hidden_dim, self.hidden_dim, bias=resolved.bias)
        self.q_norm = make_norm(self.head_dim, resolved.qk_norm)
        self.k_norm = make_norm(self.head_dim, resolved.qk_norm)
        self.proj = nn.Linear(self.hidden_dim, self.hidden_dim, bias=resolved.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections as ``init_weights`` says, the norms by 1, the latents by a standard deviation of
        0.1, with which scores of a ``scale`` of 1 begin small."""
        initialise(self, self.init_weights, self.proj)
        nn.init.normal_(self.latents, std=0.1)

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec] | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        latents: Tensor | None = None,
        latent_cache: Tensor | None = None,
        return_latent_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Applies the attention.

        Args:
            x: (B, N, hidden_dim), with ``branches`` the groups one after the other in the order of ``token_specs``.
            token_specs: Name and size of each group, where there are branches.
            key_padding_mask: (B, N) bool, True where a token of x is real. Only tokens that the latents read matter.
            latents: (B or 1, latents, num_heads, head_dim) in the place of the learnt ones.
            latent_cache: What an earlier call returned: the tokens of x read these latents, which read none of them.
            return_latent_cache: Whether to return what the latents gathered.

        Returns:
            (B, N, hidden_dim), and the cache (B, latents, num_heads, head_dim) where it is asked for.

        Raises:
            ValueError: If the arguments contradict each other or the configuration.
        """
        check_inputs(x, self.num_heads, self.head_dim, False, key_padding_mask, None, layer=self.k)
        plan = self._plan(x, token_specs, latent_cache is None)
        queries = self._latent_queries(x, latents)
        keys = split_heads(project(self.k, x), self.num_heads, self.head_dim)
        keys = self.k_norm(keys).to(keys.dtype)
        if latent_cache is None:
            values = split_heads(project(self.v, _select(x, plan.encoded)), self.num_heads, self.head_dim)
            mask = None if key_padding_mask is None else readable(_select(key_padding_mask, plan.encoded))
            latent_cache = anchor_attention(
                queries, _select(keys, plan.encoded), values, plan.encode, key_mask=mask, scale=self.scale
            )
        elif latent_cache.shape != (x.shape[0], *self.latents.shape):
            raise ValueError(
                f"latent_cache must have shape {(x.shape[0], *self.latents.shape)}, got {tuple(latent_cache.shape)}"
            )
        attended = anchor_attention(keys, queries, latent_cache, plan.decode, scale=self.scale)
        out: Tensor = project(self.proj, attended.flatten(2))
        return (out, latent_cache) if return_latent_cache else out

    def _latent_queries(self, x: Tensor, latents: Tensor | None) -> Tensor:
        if latents is None:
            latents = self.latents.unsqueeze(0)
        elif latents.dim() != 4 or latents.shape[0] not in (1, x.shape[0]) or latents.shape[1:] != self.latents.shape:
            raise ValueError(
                f"latents must have shape {(x.shape[0], *self.latents.shape)} or {(1, *self.latents.shape)}, "
                f"got {tuple(latents.shape)}"
            )
        queries: Tensor = self.q_norm(latents).to(x.dtype)
        return queries.expand(x.shape[0], -1, -1, -1)

    def _plan(self, x: Tensor, token_specs: Sequence[TokenSpec] | None, encodes: bool) -> _LatentPlan:
        if not self.branches:
            if token_specs is not None:
                raise ValueError("token_specs are given, but the module has no branches to sort them by")
            return _make_plan((("", x.shape[1]),), (), "", False, self.num_latents, encodes)
        if token_specs is None:
            raise ValueError(f"token_specs must be given to a module with branches, {self.branches}")
        groups = []
        for spec in check_groups(token_specs):
            if spec.size is not None:
                groups.append((spec.name, group_size(spec.name, spec.size)))
        total = sum(size for _, size in groups)
        if total != x.shape[1]:
            raise ValueError(
                f"Token specs total size {total} must equal the number of tokens of x, {x.shape[1]}; "
                f"token_specs are {groups}"
            )
        names = tuple(name for name, _ in groups)
        if len(set(names)) != len(names):
            raise ValueError(f"token_specs must have different names, got {names}")
        if encodes:
            check_complete(names, self.branches, self.anchor_suffix)
        return _make_plan(tuple(groups), self.branches, self.anchor_suffix, self.per_branch, self.num_latents, encodes)

    def extra_repr(self) -> str:
        return (
            f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, num_latents={self.num_latents}, "
            f"branches={self.branches}, per_branch={self.per_branch}, scale={self.scale}"
        )


class _LatentPlan(NamedTuple):
    encoded: Ranges  # the tokens of x that the latents read, one after the other
    encode: KeyRangeTable  # latents to those tokens
    decode: KeyRangeTable  # tokens of x to latents


@bounded_cache
def _make_plan(
    groups: tuple[tuple[str, int], ...],
    branches: tuple[str, ...],
    anchor_suffix: str,
    per_branch: bool,
    num_latents: int,
    encodes: bool,
) -> _LatentPlan:
    ranges, begin = {}, 0
    for name, size in groups:
        ranges[name] = (begin, begin + size)
        begin += size
    if not branches:
        whole = ((0, begin),)
        return _LatentPlan(whole, _table([((0, num_latents), whole)]), _table([(whole[0], ((0, num_latents),))]))
    tokens = tokens_by_branch(tuple(ranges), branches)
    anchors = [branch + anchor_suffix for branch in branches] if encodes else []
    encoded: Ranges = tuple(ranges[name] for name in anchors)
    places, end = [], 0
    for first, last in encoded:
        places.append((end, end + last - first))
        end += last - first
    encode: list[tuple[tuple[int, int], Ranges]] = []
    decode: list[tuple[tuple[int, int], Ranges]] = []
    for index, branch in enumerate(branches):
        first = index * num_latents if per_branch else 0
        own = (first, first + num_latents)
        decode += [(ranges[name], (own,)) for name in tokens[branch]]
        if encodes and per_branch:
            encode.append((own, (places[index],)))
    if encodes and not per_branch:
        encode.append(((0, num_latents), tuple(places)))
    return _LatentPlan(encoded, _table(encode), _table(sorted(decode)))


def _table(entries: Sequence[tuple[tuple[int, int], Ranges]]) -> KeyRangeTable:
    rows = [(queries, keys) for queries, ranges in entries for keys in ranges]
    return KeyRangeTable.from_ranges([queries for queries, _ in rows], [keys for _, keys in rows])


def _select(tensor: Tensor, ranges: Ranges) -> Tensor:
    """Tokens on axis 1: a view where they are one run."""
    parts = [tensor[:, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
