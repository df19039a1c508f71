"""An anchored-branch transformer for the flow around a body: two branches, one set of shared blocks.

The *surface* branch predicts at points of the body, the *volume* branch at points around it. Both read the geometry,
given as points of the body, and then their own and each other's *anchors*. Query points read anchors only, so that any
number of them can be decoded, in chunks, against the cached keys and values of one encoding. Method: AB-UPT,
https://arxiv.org/abs/2502.09692.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from anchor_attention import AttentionPattern, TokenSpec
from anchor_attention.modules import (
    CrossAnchorAttention,
    JointAnchorAttention,
    MixedAttention,
    RopeFrequency,
    SelfAnchorAttention,
)

BRANCHES = ("surface", "volume")
GEOMETRY = "geometry_anchors"

KVCache = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ModelConfig:
    """Size of a model.

    Args:
        dim: Width of the tokens.
        num_heads: Number of heads.
        blocks: The shared blocks in order: ``s`` (self), ``c`` (cross), ``j`` (joint).
        geometry_blocks: Blocks of the geometry encoder.
        decoder_blocks: Blocks that each branch has for itself.
        mlp_ratio: Hidden width of the feed-forward networks in units of ``dim``.
        condition_dim: Width of the embedded condition.
    """

    dim: int = 96
    num_heads: int = 3
    blocks: str = "scsj"
    geometry_blocks: int = 1
    decoder_blocks: int = 1
    mlp_ratio: int = 2
    condition_dim: int = 32

    def __post_init__(self) -> None:
        if not self.blocks or set(self.blocks) - set("scj"):
            raise ValueError(f"blocks must be a string of the letters s, c and j, got {self.blocks!r}")


@dataclass(frozen=True)
class Problem:
    """What a model reads and predicts.

    Args:
        n_coordinates: Coordinates of a point: its first features.
        n_embedded: First features that :class:`FourierEmbedding` embeds: the coordinates, and what is alike.
        n_conditions: Numbers that hold for a whole case, as the angle of the wind.
        surface_features: Features of a point of the body, for geometry and surface branch.
        volume_features: Features of a point around it.
        surface_outputs: Values predicted at a point of the body.
        volume_outputs: Values predicted at a point around it.
        surface_frequencies, volume_frequencies: Frequencies of each embedded feature, :class:`FourierEmbedding`.
        rope_wavelength: Ratio of the fastest to the slowest frequency of the rotary embedding.
        rope_scale: Radians per unit of length of the fastest one.
    """

    n_coordinates: int
    n_embedded: int
    n_conditions: int
    surface_features: int
    volume_features: int
    surface_outputs: int
    volume_outputs: int
    surface_frequencies: int
    volume_frequencies: int
    rope_wavelength: float
    rope_scale: float


class FourierEmbedding(nn.Module):
    """Embeds coordinates by sines and cosines of geometrically spaced frequencies, beside other features.

    Args:
        n_features: Number of features.
        dim: Width of the tokens.
        n_embedded: How many of the features, the first ones, are embedded.
        n_frequencies: Frequencies of each; each is twice the one before, the slowest is pi / 2 per unit.
    """

    frequencies: Tensor

    def __init__(self, n_features: int, dim: int, n_embedded: int, n_frequencies: int) -> None:
        super().__init__()
        self.n_embedded = n_embedded
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(n_frequencies), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(n_features + 2 * n_embedded * n_frequencies, dim), nn.GELU(), nn.Linear(dim, dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, n_features) float32 -> (B, N, dim)."""
        angles = (features[..., : self.n_embedded, None] * self.frequencies).flatten(-2)
        embedded: Tensor = self.mlp(torch.cat((features, angles.sin(), angles.cos()), dim=-1))
        return embedded


class Block(nn.Module):
    """Pre-norm transformer block; the condition scales and shifts what the normalisations pass on.

    Args:
        attention: Any attention module of ``anchor_attention.modules``.
        config: Size of the model.
    """

    def __init__(self, attention: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.attention = attention
        self.attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(config.condition_dim, 4 * dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_ratio * dim), nn.GELU(), nn.Linear(config.mlp_ratio * dim, dim)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        freqs: Tensor,
        specs: list[TokenSpec],
        *,
        patterns: list[AttentionPattern] | None = None,
        cache: KVCache | None = None,
        return_cache: bool = False,
        keep: slice = slice(None),
    ) -> tuple[Tensor, KVCache]:
        """Applies the block.

        Args:
            x: (B, N, dim) tokens in the order of ``specs``.
            condition: (B, 1, condition_dim).
            freqs: (B, N, head_dim / 2) complex64.
            specs: Token groups; a group without a size is read from ``cache``.
            patterns: Who reads whom, for :class:`MixedAttention`.
            cache: Keys and values of the groups that are not in x.
            return_cache: Whether to return the keys and values that were read.
            keep: The tokens that leave the block.

        Returns:
            (B, N kept, dim), and the keys and values that were read, empty unless they were asked for.
        """
        scale, shift, mlp_scale, mlp_shift = self.modulation(condition).chunk(4, dim=-1)
        normed = torch.addcmul(shift, self.attention_norm(x), 1 + scale)
        arguments = (specs,) if patterns is None else (specs, patterns)
        attended = self.attention(normed, *arguments, freqs=freqs, kv_cache=cache, return_kv_cache=return_cache)
        attended, kept = attended if return_cache else (attended, {})
        x = x[:, keep] + attended[:, keep]
        return x + self.mlp(torch.addcmul(mlp_shift, self.mlp_norm(x), 1 + mlp_scale)), kept


class BranchedModel(nn.Module):
    """The transformer. A subclass says what is read and predicted.

    Args:
        config: Size of the model.
        problem: What it reads and predicts.

    Inputs are dictionaries by branch of (B, N, features) float32, the coordinates first. Outputs are dictionaries by
    branch of (B, N, outputs).
    """

    def __init__(self, config: ModelConfig, problem: Problem) -> None:
        super().__init__()
        self.config = config
        self.problem = problem
        dim, num_heads, n = config.dim, config.num_heads, problem.n_embedded
        self.rope = RopeFrequency(dim // num_heads, problem.n_coordinates, max_wavelength=problem.rope_wavelength)
        self.condition = nn.Sequential(nn.Linear(problem.n_conditions, config.condition_dim), nn.GELU())
        self.embedding = nn.ModuleDict(
            {
                "geometry": FourierEmbedding(problem.surface_features, dim, n, problem.surface_frequencies),
                "surface": FourierEmbedding(problem.surface_features, dim, n, problem.surface_frequencies),
                "volume": FourierEmbedding(problem.volume_features, dim, n, problem.volume_frequencies),
            }
        )
        common = {"dim": dim, "num_heads": num_heads, "use_rope": True}
        self.geometry_blocks = nn.ModuleList(
            Block(SelfAnchorAttention(branches=("geometry",), **common), config) for _ in range(config.geometry_blocks)
        )
        self.read_geometry = Block(MixedAttention(**common), config)
        attentions = {"s": SelfAnchorAttention, "c": CrossAnchorAttention, "j": JointAnchorAttention}
        self.blocks = nn.ModuleList(
            Block(attentions[letter](branches=BRANCHES, **common), config) for letter in config.blocks
        )
        self.decoders = nn.ModuleDict(
            {
                branch: nn.ModuleList(
                    Block(SelfAnchorAttention(branches=(branch,), **common), config)
                    for _ in range(config.decoder_blocks)
                )
                for branch in BRANCHES
            }
        )
        self.norm = nn.ModuleDict({branch: nn.LayerNorm(dim) for branch in BRANCHES})
        heads = {
            "surface": nn.Linear(dim, problem.surface_outputs),
            "volume": nn.Linear(dim, problem.volume_outputs),
        }
        for head in heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.head = nn.ModuleDict(heads)

    def forward(
        self, geometry: Tensor, anchors: Mapping[str, Tensor], queries: Mapping[str, Tensor], condition: Tensor
    ) -> dict[str, Tensor]:
        """Predicts at anchors and queries in one pass.

        Args:
            geometry: (B, N, surface_features) points of the body.
            anchors: Anchor points of both branches.
            queries: Query points by branch; a branch may be missing.
            condition: (B, n_conditions) what holds for a whole case.

        Returns:
            The predictions by branch, at the anchors first and then at the queries.
        """
        return self._run(_anchor_groups(geometry, anchors, queries), condition, caches=None, return_caches=False)[0]

    def predict_and_encode(
        self, geometry: Tensor, anchors: Mapping[str, Tensor], queries: Mapping[str, Tensor], condition: Tensor
    ) -> tuple[dict[str, Tensor], list[KVCache]]:
        """What :meth:`forward` returns, and the keys and values of every block, for :meth:`decode`; one pass."""
        return self._run(_anchor_groups(geometry, anchors, queries), condition, caches=None, return_caches=True)

    def encode(self, geometry: Tensor, anchors: Mapping[str, Tensor], condition: Tensor) -> list[KVCache]:
        """Runs geometry and anchors once and returns the keys and values of every block, for :meth:`decode`.

        Arguments as for :meth:`forward`.
        """
        return BranchedModel.predict_and_encode(self, geometry, anchors, {}, condition)[1]

    def decode(self, queries: Mapping[str, Tensor], condition: Tensor, caches: list[KVCache]) -> dict[str, Tensor]:
        """Predicts at query points against the anchors of an encoding: what the one pass would give.

        Args:
            queries: Query points by branch; a branch may be missing.
            condition: (B, n_conditions), the one of the encoding.
            caches: What :meth:`encode` returned.

        Returns:
            The predictions by branch, for the branches in ``queries``.
        """
        groups = {f"{branch}_queries": queries[branch] for branch in BRANCHES if branch in queries}
        return self._run(groups, condition, caches=caches, return_caches=False)[0]

    def _run(
        self, groups: dict[str, Tensor], given: Tensor, *, caches: list[KVCache] | None, return_caches: bool
    ) -> tuple[dict[str, Tensor], list[KVCache]]:
        condition = self.condition(given)[:, None]
        x = torch.cat([self.embedding[name.split("_")[0]](points) for name, points in groups.items()], dim=1)
        coordinates = torch.cat([points[..., : self.problem.n_coordinates] for points in groups.values()], dim=1)
        freqs = self.rope(coordinates * self.problem.rope_scale)
        sizes: dict[str, int | None] = {name: points.shape[1] for name, points in groups.items()}
        if caches is not None:
            # The anchors come first, as in the encoding.
            sizes = {**dict.fromkeys((GEOMETRY, *(f"{branch}_anchors" for branch in BRANCHES))), **sizes}
        cached = iter(caches) if caches is not None else None
        kept: list[KVCache] = []

        n_geometry = sizes[GEOMETRY] or 0
        if n_geometry:
            specs = [TokenSpec(GEOMETRY, n_geometry)]
            encoded = x[:, :n_geometry]
            for block in self.geometry_blocks:
                encoded, _ = block(encoded, condition, freqs[:, :n_geometry], specs)
            x = torch.cat((encoded, x[:, n_geometry:]), dim=1)
        patterns = [AttentionPattern(tuple(sizes), (GEOMETRY,))]
        x, cache = self.read_geometry(
            x,
            condition,
            freqs,
            _specs(sizes),
            patterns=patterns,
            cache=_next(cached),
            return_cache=return_caches,
            keep=slice(n_geometry, None),
        )
        kept.append(cache)

        freqs = freqs[:, n_geometry:]
        del sizes[GEOMETRY]
        specs = _specs(sizes)
        for block in self.blocks:
            x, cache = block(x, condition, freqs, specs, cache=_next(cached), return_cache=return_caches)
            kept.append(cache)

        outputs: dict[str, Tensor] = {}
        begin = 0
        for branch in BRANCHES:
            own = [spec for spec in specs if spec.name.startswith(branch)]
            end = begin + sum(spec.size or 0 for spec in own)
            tokens = x[:, begin:end]
            for block in cast(nn.ModuleList, self.decoders[branch]):
                # An exhausted branch has no tokens, and its cache is passed over.
                cache = _next(cached)
                if end > begin:
                    tokens, cache = block(
                        tokens, condition, freqs[:, begin:end], own, cache=cache, return_cache=return_caches
                    )
                    kept.append(cache)
            if end > begin:
                outputs[branch] = self.head[branch](self.norm[branch](tokens))
            begin = end
        return self.finish(outputs, given), kept

    def finish(self, outputs: dict[str, Tensor], condition: Tensor) -> dict[str, Tensor]:
        """Makes predictions of what the last layers returned, for example by adding the undisturbed flow.

        Args:
            outputs: By branch (B, N, outputs); a branch may be missing.
            condition: (B, n_conditions).
        """
        return outputs


def _anchor_groups(geometry: Tensor, anchors: Mapping[str, Tensor], queries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups = {GEOMETRY: geometry}
    for branch in BRANCHES:
        groups[f"{branch}_anchors"] = anchors[branch]
        if branch in queries:
            groups[f"{branch}_queries"] = queries[branch]
    return groups


def _next(caches: Iterator[KVCache] | None) -> KVCache | None:
    return None if caches is None else next(caches)


def _specs(sizes: Mapping[str, int | None]) -> list[TokenSpec]:
    return [TokenSpec(name, size) for name, size in sizes.items()]
