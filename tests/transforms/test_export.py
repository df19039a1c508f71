"""Exported programs: one program serves every number of tokens, and gives what the module gives.

Programs are saved and loaded before they run, so that nothing of the traced module is left in them.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from anchor_attention import (
    AttentionPattern,
    CrossAnchorAttention,
    JointAnchorAttention,
    KeyRangeTable,
    MixedAttention,
    SelfAnchorAttention,
    TokenSpec,
    anchor_attention,
)

DIM, HEADS = 32, 2
HEAD_DIM = DIM // HEADS
GROUPS = ("surface_anchors", "surface_queries", "volume_anchors", "volume_queries")
# Not those that the programs are exported with; a single token and none are what tracers like to specialise on.
SIZES = [(5, 9, 3, 4), (1, 1, 1, 1), (64, 200, 33, 7), (3, 0, 2, 0), (2, 50, 17, 1)]
SHARED = {"dim": DIM, "num_heads": HEADS, "use_rope": True}
BRANCHES = {"branches": ("surface", "volume")}
MODULES = {
    "self": lambda: SelfAnchorAttention(**SHARED, **BRANCHES),
    "cross": lambda: CrossAnchorAttention(**SHARED, **BRANCHES),
    "joint": lambda: JointAnchorAttention(**SHARED, **BRANCHES),
    "mixed": lambda: MixedAttention(**SHARED),
}
PATTERNS = [
    AttentionPattern(("surface_anchors", "volume_queries"), ("volume_anchors", "surface_anchors")),
    AttentionPattern(("surface_queries",), ("volume_anchors",)),
    AttentionPattern(("volume_anchors",), ("surface_queries", "surface_anchors")),
]


def unit_freqs(tokens: Tensor) -> Tensor:
    """(B, N, head_dim / 2) factors that depend on the tokens, without a random number in the graph."""
    angles = tokens[..., : HEAD_DIM // 2]
    return torch.polar(torch.ones_like(angles), angles)


class OfGroups(nn.Module):
    """A module whose groups come one tensor each: their sizes are those of the inputs."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, groups: tuple[Tensor, ...], masks: tuple[Tensor, ...]) -> Any:
        specs = [TokenSpec(name, tokens.shape[1]) for name, tokens in zip(GROUPS, groups, strict=True)]
        x, mask = torch.cat(groups, dim=1), torch.cat(masks, dim=1)
        patterns = {"attention_patterns": PATTERNS} if isinstance(self.attention, MixedAttention) else {}
        return self.attention(x, specs, freqs=unit_freqs(x), key_padding_mask=mask, return_kv_cache=True, **patterns)


class OfQueries(nn.Module):
    """A module whose anchors come as the cache that an earlier call returned, mask included."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, queries: Tensor, cache: dict[str, dict[str, Tensor]]) -> Tensor:
        specs = [
            TokenSpec("surface_anchors", None),
            TokenSpec("surface_queries", queries.shape[1]),
            TokenSpec("volume_anchors", None),
        ]
        return self.attention(queries, specs, unit_freqs(queries), kv_cache=cache)


class Functional(nn.Module):
    """The functional call, with a table that depends on the numbers of tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
        half, n_queries, n_keys = k.shape[1] // 2, q.shape[1], k.shape[1]
        table = KeyRangeTable([0, n_queries], [0, 2], [half, n_keys, 0, half])
        freqs = [unit_freqs(tensor[:, :, 0].float()) for tensor in (q, k)]
        return anchor_attention(
            q, k, v, table, q_freqs=freqs[0], k_freqs=freqs[1], key_mask=key_mask, scale=0.3, return_lse=True
        )


def group_inputs(sizes: tuple[int, ...], batch: int) -> tuple[Any, ...]:
    groups = tuple(torch.randn(batch, size, DIM) for size in sizes)
    return groups, tuple(torch.rand(batch, size) < 0.8 for size in sizes)


def query_inputs(sizes: tuple[int, ...], batch: int) -> tuple[Any, ...]:
    cache = {
        name: {
            "k": torch.randn(batch, HEADS, size, HEAD_DIM),
            "v": torch.randn(batch, HEADS, size, HEAD_DIM),
            "mask": torch.rand(batch, size) < 0.8,
        }
        for name, size in (("surface_anchors", sizes[0]), ("volume_anchors", sizes[2]))
    }
    return torch.randn(batch, sizes[1], DIM), cache


def functional_inputs(sizes: tuple[int, ...], batch: int) -> tuple[Any, ...]:
    q, k, v = (torch.randn(batch, n, HEADS, HEAD_DIM) for n in (sizes[1], sizes[2], sizes[2]))
    return q, k, v, torch.rand(batch, sizes[2]) < 0.8


BATCH, SIZE = Dim("batch"), [Dim(name) for name in GROUPS]
GROUP_SHAPES = (tuple({0: BATCH, 1: size} for size in SIZE),) * 2
QUERY_SHAPES = (
    {0: BATCH, 1: SIZE[1]},
    {
        name: {"k": {0: BATCH, 2: size}, "v": {0: BATCH, 2: size}, "mask": {0: BATCH, 1: size}}
        for name, size in (("surface_anchors", SIZE[0]), ("volume_anchors", SIZE[2]))
    },
)
FUNCTIONAL_SHAPES = ({0: BATCH, 1: SIZE[1]}, *({0: BATCH, 1: SIZE[2]},) * 3)


def saved_and_loaded(
    module: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...], strict: bool = False
) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, example, dynamic_shapes=shapes, strict=strict), file)
    return torch.export.load(io.BytesIO(file.getvalue()))


def operations(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "anchor_attention" in str(node.target)]


def check(program: Any, module: nn.Module, inputs: Any, all_sizes: list[tuple[int, ...]] = SIZES) -> None:
    """Bit for bit: the program makes the same calls."""
    for sizes, batch in itertools.product(all_sizes, (1, 3)):
        arguments = inputs(sizes, batch)
        torch.testing.assert_close(program(*arguments), module(*arguments), rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_module_with_mask_that_returns_its_cache(name: str, strict: bool) -> None:
    module = OfGroups(MODULES[name]())
    program = saved_and_loaded(module, group_inputs((6, 7, 8, 10), 2), GROUP_SHAPES, strict)
    assert operations(program).count("anchor_attention.attention.default") == 1
    # Nobody reads the last group of `mixed`. Without strict, torch notes that this left a part of the mask and not all
    # of it: the program refuses an empty one.
    sizes = [sizes for sizes in SIZES if all(sizes)] if name == "mixed" else SIZES
    check(program.module(), module, group_inputs, sizes)


@pytest.mark.parametrize("name", ["self", "cross", "joint"])
@torch.no_grad()
def test_queries_against_a_cache(name: str) -> None:
    module = OfQueries(MODULES[name]())
    program = saved_and_loaded(module, query_inputs((6, 7, 8), 2), QUERY_SHAPES)
    check(program.module(), module, query_inputs)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_functional_call(strict: bool) -> None:
    program = saved_and_loaded(Functional(), functional_inputs((0, 7, 8), 2), FUNCTIONAL_SHAPES, strict)
    assert operations(program) == ["anchor_attention.rope.default", "anchor_attention.attention.default"]
    check(program.module(), Functional(), functional_inputs)


class FixedTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = KeyRangeTable.from_ranges([[0, 4], [4, 6]], [[0, 3], [2, 5]])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anchor_attention(q, k, v, self.table)


@torch.no_grad()
def test_ranges_are_checked_when_the_program_runs() -> None:
    """Ranges that are written into a program need not fit the tokens that it gets."""
    inputs = functional_inputs((0, 7, 8), 1)[:3]
    shapes = ({1: Dim("n_queries")}, {1: SIZE[2]}, {1: SIZE[2]})
    program = saved_and_loaded(FixedTable(), inputs, shapes).module()
    fits = functional_inputs((0, 6, 5), 1)[:3]
    torch.testing.assert_close(program(*fits), FixedTable()(*fits), rtol=0, atol=0)
    for sizes in ((0, 5, 5), (0, 6, 4)):
        with pytest.raises(RuntimeError, match=r"(q|k)_ranges"):
            program(*functional_inputs(sizes, 1)[:3])


class PairedRows(nn.Module):
    """Makes its table in the graph: ranges with symbolic bounds, of which one is there twice."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n_queries, n_keys = q.shape[1], k.shape[1]
        q_ranges = [[0, 2], [2, n_queries], [2, n_queries]]
        table = KeyRangeTable.from_ranges(q_ranges, [[1, n_keys], [0, n_keys // 2], [0, n_keys]])
        return anchor_attention(q, k, v, table)


@torch.no_grad()
def test_tables_of_paired_rows_are_made_in_the_graph() -> None:
    program = saved_and_loaded(PairedRows(), functional_inputs((0, 7, 8), 2)[:3], FUNCTIONAL_SHAPES[:3])
    check(
        program.module(), PairedRows(), lambda sizes, batch: functional_inputs((0, sizes[1] + 2, sizes[2]), batch)[:3]
    )


class Everything(nn.Module):
    """What the other tests export, in one program, because a compilation takes its time. Half precision, too."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = OfGroups(MODULES["joint"]())
        self.queries = OfQueries(MODULES["cross"]())
        self.functional = Functional()

    def forward(self, groups: Any, masks: Any, queries: Tensor, cache: Any, *functional: Tensor) -> Any:
        *tensors, key_mask = functional
        half = (tensor.to(torch.bfloat16) for tensor in tensors)
        return self.groups(groups, masks), self.queries(queries, cache), self.functional(*half, key_mask)


def every_input(sizes: tuple[int, ...], batch: int) -> tuple[Any, ...]:
    return *group_inputs(sizes, batch), *query_inputs(sizes, batch), *functional_inputs(sizes, batch)


@torch.no_grad()
def test_compiled_ahead_of_time(tmp_path: Any) -> None:
    """Projections are summed, and rotary factors computed, in other ways: equal but for the rounding of each dtype."""
    module = Everything()
    shapes = (*GROUP_SHAPES, *QUERY_SHAPES, FUNCTIONAL_SHAPES)
    program = saved_and_loaded(module, every_input((6, 7, 8, 10), 2), shapes)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "everything.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for sizes, batch in itertools.product(SIZES, (1, 3)):
        arguments = every_input(sizes, batch)
        actual, expected = compiled(*arguments), module(*arguments)
        torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=2e-6)
        # Of outputs up to |v|, each off by half a unit in the last place, and of scores from rotated operands likewise.
        v = arguments[-2]
        atol = 2 * torch.finfo(torch.bfloat16).eps * v.abs().max().item()
        torch.testing.assert_close(actual[2], expected[2], rtol=0, atol=atol)
