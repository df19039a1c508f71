"""The workloads: training steps and queries of neural surrogates, in sizes for a GPU and for two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from anchor_attention import (
    AttentionPattern,
    CrossAnchorAttention,
    JointAnchorAttention,
    KeyRangeTable,
    MultiBranchAnchorAttention,
    SelfAnchorAttention,
    TokenSpec,
)
from anchor_attention.benchmark import PASSES

MODULES: dict[str, type[MultiBranchAnchorAttention]] = {
    "self": SelfAnchorAttention,
    "cross": CrossAnchorAttention,
    "joint": JointAnchorAttention,
}
PATTERNS = tuple(MODULES)
ANCHORS, QUERIES = "_anchors", "_queries"


@dataclass(frozen=True)
class Branch:
    """One domain: its name, its anchors and how many further tokens only read."""

    name: str
    anchors: int
    queries: int = 0


@dataclass(frozen=True)
class Workload:
    """One row of the suite.

    Attributes:
        name: Its identifier.
        dim: Width of the tokens.
        heads: Number of heads.
        branches: The domains.
        typical: The pattern of a default run, in which every pattern occurs.
        passes: What is timed.
        batch: Samples per call.
        cached: Whether the anchors come from a cache instead of the input.
        min_real: Smallest share of real tokens in a sample, the rest being padding; ``None`` without padding.
        packed: Whether the branches are samples on one axis, which have nothing to do with each other.
    """

    name: str
    dim: int
    heads: int
    branches: tuple[Branch, ...]
    typical: str = "joint"
    passes: tuple[str, ...] = PASSES
    batch: int = 1
    cached: bool = False
    min_real: float | None = None
    packed: bool = False

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that its branches allow."""
        return PATTERNS if len(self.branches) > 1 and not self.packed else PATTERNS[:1]

    @cached_property
    def token_specs(self) -> tuple[TokenSpec, ...]:
        """The groups of the token axis, the cached ones without a size."""
        specs = []
        for branch in self.branches:
            specs.append(TokenSpec(branch.name + ANCHORS, None if self.cached else branch.anchors))
            if branch.queries:
                specs.append(TokenSpec(branch.name + QUERIES, branch.queries))
        return tuple(specs)

    @property
    def anchor_specs(self) -> tuple[TokenSpec, ...]:
        """The anchors alone: the input of the call that fills the cache."""
        return tuple(TokenSpec(branch.name + ANCHORS, branch.anchors) for branch in self.branches)

    @property
    def n_tokens(self) -> int:
        """Tokens of the input."""
        return sum(spec.size or 0 for spec in self.token_specs)

    def attention_patterns(self, pattern: str) -> tuple[AttentionPattern, ...]:
        """Who reads whom, written down apart from the modules; cached groups are no queries.

        Raises:
            ValueError: If there is no such pattern.
        """
        if pattern not in self.patterns:
            raise ValueError(f"pattern must be one of {self.patterns}, got {pattern!r}")
        return _attention_patterns(self, pattern)

    def key_axis(self, pattern: str) -> tuple[tuple[str, ...], KeyRangeTable]:
        """The groups that are read, in token order, and the table with these alone on its key axis."""
        return _key_axis(self, pattern)


# Made once, as by a careful caller: none of this is what a peer is timed for.
@cache
def _attention_patterns(workload: Workload, pattern: str) -> tuple[AttentionPattern, ...]:
    present = [spec.name for spec in workload.token_specs if spec.size is not None]
    anchors = [branch.name + ANCHORS for branch in workload.branches]
    if pattern == "joint":
        return (AttentionPattern(present, anchors),)
    patterns = []
    for branch in workload.branches:
        own = [name for name in present if name.rpartition("_")[0] == branch.name]
        keys = [name for name in anchors if (name == branch.name + ANCHORS) == (pattern == "self")]
        patterns.append(AttentionPattern(own, keys))
    return tuple(patterns)


@cache
def _key_axis(workload: Workload, pattern: str) -> tuple[tuple[str, ...], KeyRangeTable]:
    patterns = workload.attention_patterns(pattern)
    read = {name for attention_pattern in patterns for name in attention_pattern.key_value_tokens}
    names = tuple(spec.name for spec in workload.anchor_specs if spec.name in read)
    table = KeyRangeTable.from_slices(
        _slices({spec.name: spec.size for spec in workload.token_specs if spec.size is not None}),
        _slices({spec.name: spec.size or 0 for spec in workload.anchor_specs if spec.name in read}),
        patterns,
    )
    return names, table


def _slices(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    slices, begin = {}, 0
    for name, size in sizes.items():
        slices[name] = (begin, begin + size)
        begin += size
    return slices


def _two(anchors: int, queries: int = 0) -> tuple[Branch, ...]:
    return Branch("surface", anchors, queries), Branch("volume", anchors, queries)


def _three(*sizes: int) -> tuple[Branch, ...]:
    return tuple(Branch(name, size, size) for name, size in zip(("surface", "volume", "wheels"), sizes, strict=True))


def _reads(queries: int, keys: int) -> tuple[Branch, ...]:
    """Queries that read cached keys; no key is a query."""
    return (Branch("latent", keys, queries),)


def _samples(number: int, tokens: int) -> tuple[Branch, ...]:
    return tuple(Branch(f"sample{i:04}", tokens) for i in range(number))


CPU = (
    Workload("drivaer_train", 192, 3, _two(2048), "self"),
    Workload("scaled_train", 384, 6, (Branch("surface", 1000), Branch("volume", 2000)), "cross"),
    Workload("shapenet_train", 192, 3, (Branch("surface", 896), Branch("volume", 1024))),
    Workload("showcase_query", 192, 3, _two(512, 8192), "self"),
    Workload("cached_query", 192, 3, _two(2048, 16384), "self", passes=PASSES[:1], cached=True),
    Workload("ragged_batch", 192, 3, _two(512), "cross", batch=4, min_real=0.3),
    Workload("three_domains", 192, 3, _three(1024, 512, 256)),
    Workload("wells", 576, 12, _two(512, 1024), "self"),
    Workload("wide_heads", 1024, 4, (Branch("surface", 512, 2048),), "self", passes=PASSES[:1]),
    Workload("divfree_train", 192, 3, _two(512, 3072), passes=PASSES[1:]),
    Workload("latent_encode", 192, 3, _reads(64, 16384), "self", cached=True),
    Workload("latent_encode_512", 192, 3, _reads(512, 16384), "self", cached=True),
    Workload("latent_decode", 192, 3, _reads(16384, 64), "self", cached=True),
    Workload("latent_decode_512", 192, 3, _reads(16384, 512), "self", cached=True),
    Workload("packed_small", 192, 3, _samples(256, 64), "self", packed=True),
    Workload("one_range_hd256", 1024, 4, _reads(2048, 512), "self", cached=True),
)
GPU_BRANCHES: dict[str, tuple[Branch, ...]] = {
    "drivaer_train": _two(16384),
    "scaled_train": (Branch("surface", 16000), Branch("volume", 32000)),
    "shapenet_train": (Branch("surface", 3586), Branch("volume", 4096)),
    "showcase_query": _two(512, 65536),
    "cached_query": _two(16384, 524288),
    "ragged_batch": _two(4096),
    "three_domains": _three(8192, 4096, 2048),
    "wells": _two(4096, 8192),
    "wide_heads": (Branch("surface", 512, 8192),),
    "divfree_train": _two(4096, 24576),
    "latent_encode": _reads(64, 1_000_000),
    "latent_encode_512": _reads(512, 1_000_000),
    "latent_decode": _reads(1_000_000, 64),
    "latent_decode_512": _reads(1_000_000, 512),
    "packed_small": _samples(4096, 64),
    "one_range_hd256": _reads(16384, 4096),
}
GPU = tuple(
    replace(workload, branches=GPU_BRANCHES[workload.name], batch=8 if workload.name == "ragged_batch" else 1)
    for workload in CPU
)
# Head sizes that models have and no workload above: the GPU's tiles differ from size to size.
GPU += tuple(replace(GPU[0], name=f"drivaer_train_hd{head_dim}", dim=3 * head_dim) for head_dim in (32, 96, 128))


def shrink(workload: Workload, factor: int) -> Workload:
    """The same workload with a ``factor``-th of its tokens, at least one in every group that has any."""
    branches = (
        replace(
            branch,
            anchors=max(1, branch.anchors // factor),
            queries=max(1, branch.queries // factor) if branch.queries else 0,
        )
        for branch in workload.branches
    )
    return replace(workload, branches=tuple(branches))


def by_name(workloads: Sequence[Workload], names: Sequence[str]) -> tuple[Workload, ...]:
    """The named workloads, in the suite's order; all of them without names.

    Raises:
        ValueError: If a name is unknown.
    """
    known = [workload.name for workload in workloads]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"workloads must be among {known}, got {unknown}")
    return tuple(workload for workload in workloads if not names or workload.name in names)
