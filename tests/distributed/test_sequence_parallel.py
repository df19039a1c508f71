"""Modules whose tokens are spread over processes: results, gradients and steps are those of one process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from anchor_attention import (
    AttentionPattern,
    CrossAnchorAttention,
    JointAnchorAttention,
    MixedAttention,
    MultiBranchAnchorAttention,
    SelfAnchorAttention,
    TokenSpec,
)
from anchor_attention.distributed import SequenceParallelAttention
from anchor_attention.integrations.noether import accelerate
from anchor_attention.streaming import record, replay
from tests.distributed.processes import Processes, bytes_sent
from tests.integrations import noether_lookalikes as lookalikes
from tests.module_cases import DIM, HEAD_DIM, HEADS, make

# Float32 results and gradients of order one, behind two layers: other orders of summation.
TOLERANCE = 2e-5
NAMES = ("surface_anchors", "surface_queries", "volume_anchors", "volume_queries")
BATCH = 2
Sizes = Sequence[Sequence[int]]


class Mixed(nn.Module):
    """Mixed attention in a pattern of its own: one group of keys has no queries of its own branch."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.mixed_attention = MixedAttention(dim=DIM, num_heads=HEADS, init_weights="torch", **fields)

    def forward(self, x: torch.Tensor, token_specs: Sequence[TokenSpec], freqs: Any = None, **keywords: Any) -> Any:
        patterns = [
            AttentionPattern(["surface_anchors", "volume_queries"], ["surface_anchors", "volume_anchors"]),
            AttentionPattern(["surface_queries"], ["volume_anchors", "volume_anchors"]),
            AttentionPattern(["volume_anchors"], []),
        ]
        return self.mixed_attention(x, token_specs, patterns, freqs=freqs, **keywords)


class OwnPatterns(MultiBranchAnchorAttention):
    """A subclass as users write them."""

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> Sequence[AttentionPattern]:
        return [AttentionPattern([spec.name for spec in token_specs], ["volume_queries", "surface_anchors"])]


KINDS: dict[str, Callable[..., nn.Module]] = {
    "self": lambda **fields: make(SelfAnchorAttention, **fields),
    "cross": lambda **fields: make(CrossAnchorAttention, **fields),
    "joint": lambda **fields: make(JointAnchorAttention, **fields),
    "own": lambda **fields: make(OwnPatterns, **fields),
    "mixed": lambda **fields: Mixed(**fields),
}


class Block(nn.Module):
    """A residual block of attention alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, token_specs: Sequence[TokenSpec], freqs: Any, mask: Any) -> torch.Tensor:
        return x + self.attention(x, token_specs, freqs, key_padding_mask=mask)


class Blocks(nn.Module):
    """A residual network, as the models have them."""

    def __init__(self, kinds: Sequence[str], **fields: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(KINDS[kind](**fields)) for kind in kinds)

    def forward(self, x: torch.Tensor, token_specs: Sequence[TokenSpec], freqs: Any, mask: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, token_specs, freqs, mask)
        return x


def network(kinds: Sequence[str], **fields: Any) -> Blocks:
    torch.manual_seed(0)
    return Blocks(kinds, use_rope=True, **fields)


def rows_of_processes(sizes: Sizes) -> list[torch.Tensor]:
    """For every process, its tokens on the axis that one process has: by group, in a group process by process."""
    rows: list[list[torch.Tensor]] = [[] for _ in sizes]
    begin = 0
    for group in range(len(NAMES)):
        for rank, own in enumerate(sizes):
            rows[rank].append(torch.arange(begin, begin + own[group]))
            begin += own[group]
    return [torch.cat(own) for own in rows]


def specs_of(sizes: Sequence[int]) -> list[TokenSpec]:
    return [TokenSpec(name, size) for name, size in zip(NAMES, sizes, strict=True)]


class Batch:
    """Tokens of all processes, and what a loss weighs them with."""

    def __init__(self, sizes: Sizes, seed: int, masked: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = sum(map(sum, sizes))
        self.x = torch.randn(BATCH, n, DIM, generator=generator)
        angle = torch.rand(BATCH, n, HEAD_DIM // 2, generator=generator) * 6
        self.freqs = torch.polar(torch.ones_like(angle), angle)
        self.mask = torch.rand(BATCH, n, generator=generator) < 0.7 if masked else None
        self.weight = torch.randn(BATCH, n, DIM, generator=generator)

    def loss(self, model: nn.Module, token_specs: Sequence[TokenSpec], rows: Any) -> Any:
        x = self.x[:, rows].requires_grad_()
        mask = None if self.mask is None else self.mask[:, rows]
        out = model(x, token_specs, self.freqs[:, rows], mask)
        return (out * self.weight[:, rows]).sum() / self.weight.shape[1], x, out


def two_steps(
    model: nn.Module, sizes: Sizes, rank: int | None, seed: int, masked: bool, group: Any = None
) -> dict[str, Any]:
    """Outputs and gradients of the first step, and the parameters after two."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    rows = slice(None) if rank is None else rows_of_processes(sizes)[rank]
    own = specs_of([sum(column) for column in zip(*sizes, strict=True)] if rank is None else sizes[rank])
    found: dict[str, Any] = {}
    for step in range(2):
        optimiser.zero_grad()
        loss, x, out = Batch(sizes, seed + step, masked).loss(model, own, rows)
        loss.backward()
        for parameter in model.parameters():
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)
        if step == 0:
            found["out"], found["grad_x"] = out.detach(), x.grad
            found |= {f"grad_{name}": p.grad.clone() for name, p in model.named_parameters()}
        optimiser.step()
    return found | {name: parameter.detach() for name, parameter in model.named_parameters()}


def in_processes(mesh: Any, kinds: Sequence[str], sizes: Sizes, seed: int, masked: bool, options: Any) -> Any:
    model = network(kinds)
    parallelize_module(model, mesh, {"blocks.*.attention": SequenceParallelAttention(**options)})
    return two_steps(model, sizes, mesh.get_local_rank(), seed, masked, mesh.get_group())


def check(
    pool: Processes, kinds: Sequence[str], sizes: Sizes, seed: int, masked: bool, options: dict[str, Any]
) -> None:
    parts = pool.run(in_processes, len(sizes), kinds, sizes, seed, masked, options)
    expected = two_steps(network(kinds), sizes, None, seed, masked)
    for rank, (part, rows) in enumerate(zip(parts, rows_of_processes(sizes), strict=True)):
        for name, tensor in expected.items():
            whole = tensor[:, rows] if name in ("out", "grad_x") else tensor
            torch.testing.assert_close(
                part[name], whole, rtol=0, atol=TOLERANCE, msg=lambda text, at=(rank, name): f"{at}: {text}"
            )


SIZES = [[5, 9, 6, 20], [8, 0, 0, 3], [0, 0, 0, 0], [1, 30, 7, 0]]


@pytest.mark.parametrize("case", ["gathered", "ring"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_two_steps_are_those_of_one_process(four: Processes, kind: str, case: str) -> None:
    check(four, [kind, kind], SIZES, 3, True, {"case": case})


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(*[st.integers(0, 12)] * len(NAMES)), min_size=1, max_size=4).filter(
        # One token at least that is read, and one real key for it: else there is nothing to compare.
        lambda sizes: all(sum(column) > 0 for column in zip(*sizes, strict=True))
    ),
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3),
    case=st.sampled_from(["gathered", "ring"]),
    agree=st.sampled_from(["pass", "call", "once"]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_cuts(
    four: Processes, sizes: Any, kinds: list[str], case: str, agree: str, masked: bool, seed: int
) -> None:
    check(four, kinds, [list(own) for own in sizes], seed, masked, {"case": case, "agree": agree})


def cached_call(mesh: Any, kind: str, seed: int) -> Any:
    """Queries that come later, against the cache of one pass over the anchors of all processes; and bytes sent."""
    rank = mesh.get_local_rank()
    model = KINDS[kind](use_rope=True).eval()
    load(model)
    parallelize_module(model, mesh, SequenceParallelAttention())
    rows = rows_of_processes(SIZES)[rank]
    batch = Batch(SIZES, seed, True)
    with torch.no_grad():
        out, cache = model(
            batch.x[:, rows], specs_of(SIZES[rank]), batch.freqs[:, rows],
            key_padding_mask=batch.mask[:, rows], return_kv_cache=True,
        )  # fmt: skip
        alone, mine = own_queries(SIZES[rank], rows)
        begin = bytes_sent()
        # As often as this process likes: nobody else is needed.
        for _ in range(rank + 1):
            later = model(batch.x[:, mine], alone, batch.freqs[:, mine], kv_cache=cache)
    return out, cache, later, bytes_sent() - begin


def load(model: nn.Module) -> None:
    torch.manual_seed(7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)


def own_queries(sizes: Sequence[int], rows: torch.Tensor) -> tuple[list[TokenSpec], torch.Tensor]:
    """The groups with anchors from a cache, and the rows of the others."""
    alone, kept, begin = [], [], 0
    for name, size in zip(NAMES, sizes, strict=True):
        alone.append(TokenSpec(name, None if name.endswith("_anchors") else size))
        if not name.endswith("_anchors"):
            kept.append(rows[begin : begin + size])
        begin += size
    return alone, torch.cat(kept)


@pytest.mark.parametrize("kind", ["self", "cross", "joint"])
def test_a_cache_holds_the_keys_of_all_and_serves_calls_of_one(four: Processes, kind: str) -> None:
    model = KINDS[kind](use_rope=True).eval()
    load(model)
    batch = Batch(SIZES, 5, True)
    sizes = [sum(column) for column in zip(*SIZES, strict=True)]
    with torch.no_grad():
        out, cache = model(
            batch.x, specs_of(sizes), batch.freqs, key_padding_mask=batch.mask, return_kv_cache=True
        )  # fmt: skip
    parts = four.run(cached_call, 4, kind, 5)
    for rank, (rows, (own_out, own_cache, later, n_bytes)) in enumerate(
        zip(rows_of_processes(SIZES), parts, strict=True)
    ):
        torch.testing.assert_close(own_out, out[:, rows], rtol=0, atol=TOLERANCE)
        assert list(own_cache) == list(cache)
        for name, entry in cache.items():
            for kind_of, tensor in entry.items():
                torch.testing.assert_close(own_cache[name][kind_of], tensor, rtol=0, atol=TOLERANCE)
        _, mine = own_queries(SIZES[rank], rows)
        torch.testing.assert_close(later, out[:, mine], rtol=0, atol=TOLERANCE)
        assert n_bytes == 0


def some_cached(mesh: Any, case: str) -> Any:
    """One branch comes from a cache of all processes, the other's anchors travel."""
    model = make(JointAnchorAttention)
    load(model)
    rank = mesh.get_local_rank()
    x = torch.randn(BATCH, 40, DIM, generator=torch.Generator().manual_seed(1))
    first = [TokenSpec("surface_anchors", 12)]
    _, cache = model(x[:, :12], first, return_kv_cache=True)
    groups = [TokenSpec("surface_anchors", None), TokenSpec("volume_anchors", 16), TokenSpec("volume_queries", 12)]
    expected = model(x[:, 12:], groups, kv_cache=cache)
    parallelize_module(model, mesh, SequenceParallelAttention(case=case))
    own = [slice(12, 15), slice(15, 28)][rank], [slice(28, 38), slice(38, 40)][rank]
    groups = [groups[0], *(TokenSpec(g.name, s.stop - s.start) for g, s in zip(groups[1:], own, strict=True))]
    found = model(torch.cat([x[:, part] for part in own], dim=1), groups, kv_cache=cache)
    return found.detach(), torch.cat([expected[:, part.start - 12 : part.stop - 12].detach() for part in own], dim=1)


@pytest.mark.parametrize("case", ["gathered", "ring"])
def test_some_keys_travel_and_some_are_cached(four: Processes, case: str) -> None:
    for found, expected in four.run(some_cached, 2, case):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def noether_model(generation: str) -> nn.Module:
    torch.manual_seed(0)
    kind = {"packed": lookalikes.JointAnchorAttention, "split": lookalikes.SplitJointAnchorAttention}[generation]
    return kind(branches=("surface", "volume"))


def accelerated_in_processes(mesh: Any, generation: str) -> Any:
    model = noether_model(generation)
    accelerate(model, packages=("tests",), verify=False)
    parallelize_module(model, mesh, SequenceParallelAttention())
    rank = mesh.get_local_rank()
    rows = rows_of_processes(SIZES)[rank]
    x, freqs, weight = noether_inputs()
    x = x[:, rows].requires_grad_()
    out = model(x, specs_of(SIZES[rank]), freqs=freqs[:, rows])
    out = out[0] if isinstance(out, tuple) else out
    (out * weight[:, rows]).sum().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=mesh.get_group())
    return out.detach(), x.grad, {name: p.grad for name, p in model.named_parameters()}


def noether_inputs() -> tuple[torch.Tensor, ...]:
    n = sum(map(sum, SIZES))
    generator = torch.Generator().manual_seed(2)
    angle = torch.rand(1, n, lookalikes.DIM // lookalikes.HEADS // 2, generator=generator)
    x, weight = (torch.randn(1, n, lookalikes.DIM, generator=generator) for _ in range(2))
    return x, torch.polar(torch.ones_like(angle), angle), weight / n


@pytest.mark.parametrize("generation", ["packed", "split"])
def test_accelerated_models_of_noether(four: Processes, generation: str) -> None:
    model = noether_model(generation)
    x, freqs, weight = noether_inputs()
    x.requires_grad_()
    out = model(x, specs_of([sum(column) for column in zip(*SIZES, strict=True)]), freqs=freqs)
    out = out[0] if isinstance(out, tuple) else out
    (out * weight).sum().backward()
    parts = four.run(accelerated_in_processes, 4, generation)
    for rows, (own, grad_x, grads) in zip(rows_of_processes(SIZES), parts, strict=True):
        torch.testing.assert_close(own, out[:, rows], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(grad_x, x.grad[:, rows], rtol=0, atol=TOLERANCE)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=TOLERANCE)


def agreements(mesh: Any, agree: str) -> list[int]:
    """Number of agreements after each of three passes of four layers, the last with other sizes."""
    model = network(["self", "cross", "self", "joint"])
    style = SequenceParallelAttention(agree=agree)
    parallelize_module(model, mesh, {"blocks.*.attention": style})
    rank, counts = mesh.get_local_rank(), []
    for sizes in (SIZES, SIZES, SIZES[::-1]):
        batch, rows = Batch(sizes, 0, False), rows_of_processes(sizes)[rank]
        batch.loss(model, specs_of(sizes[rank]), rows)
        (layouts,) = style._layouts.values()
        counts.append(layouts.agreements)
    return counts


@pytest.mark.parametrize(("agree", "counts"), [("pass", [1, 2, 3]), ("call", [4, 8, 12]), ("once", [1, 1, 2])])
def test_sizes_are_agreed_on_once(four: Processes, agree: str, counts: list[int]) -> None:
    # Self, cross and joint attention read the same groups: one agreement serves the four layers.
    assert four.run(agreements, 4, agree) == [counts] * 4


def anchors_alone(sizes: Sequence[int]) -> list[TokenSpec]:
    return [TokenSpec(name, size) for name, size in zip(NAMES, sizes, strict=True) if name.endswith("_anchors")]


def rows_by_kind(sizes: Sequence[int], rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the anchors and those of the queries, of a process."""
    parts = rows.split(list(sizes))
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


class Unmasked(nn.Module):
    """A model whose caches are recorded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        kinds = (SelfAnchorAttention, CrossAnchorAttention, JointAnchorAttention)
        self.blocks = nn.ModuleList(make(kind, use_rope=True) for kind in kinds)

    def forward(self, x: torch.Tensor, token_specs: Sequence[TokenSpec], freqs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x, token_specs, freqs)
        return x


def recorded(mesh: Any) -> torch.Tensor:
    model = parallelize_module(Unmasked(), mesh, SequenceParallelAttention())
    rank = mesh.get_local_rank()
    sizes, batch = SIZES[rank], Batch(SIZES, 4, False)
    anchors, queries = rows_by_kind(sizes, rows_of_processes(SIZES)[rank])
    with torch.no_grad():
        with record(model) as caches:
            model(batch.x[:, anchors], anchors_alone(sizes), batch.freqs[:, anchors])
        with replay(model, caches):
            specs = [TokenSpec(name, size) for name, size in zip(NAMES[1::2], sizes[1::2], strict=True)]
            return model(batch.x[:, queries], specs, batch.freqs[:, queries])


def test_caches_are_recorded_and_replayed(four: Processes) -> None:
    batch = Batch(SIZES, 4, False)
    with torch.no_grad():
        whole = Unmasked()(batch.x, specs_of([sum(column) for column in zip(*SIZES, strict=True)]), batch.freqs)
    for sizes, rows, found in zip(SIZES, rows_of_processes(SIZES), four.run(recorded, 4), strict=True):
        torch.testing.assert_close(found, whole[:, rows_by_kind(sizes, rows)[1]], rtol=0, atol=TOLERANCE)


def copied(mesh: Any) -> Any:
    """A copy shares its keys as well; a state dict is what it was; there are no pickles, as a group has none."""
    model, plain = parallelize_module(Unmasked(), mesh, SequenceParallelAttention()), Unmasked()
    copy_of_it = copy.deepcopy(model)
    rank = mesh.get_local_rank()
    batch, rows = Batch(SIZES[:2], 4, False), rows_of_processes(SIZES[:2])[rank]
    results = [each(batch.x[:, rows], specs_of(SIZES[rank]), batch.freqs[:, rows]) for each in (model, copy_of_it)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(model.blocks[0], SelfAnchorAttention)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)


def test_copies_state_dicts_and_pickles(four: Processes) -> None:
    four.run(copied, 2)
