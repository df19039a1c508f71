"""What the modules do not do: needless projections, copies, table building, recompilation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import anchor_attention.modules.steps as steps_module
from anchor_attention import AttentionPattern, KeyRangeTable, TokenSpec
from anchor_attention.modules import (
    CrossAnchorAttention,
    JointAnchorAttention,
    SelfAnchorAttention,
)
from anchor_attention.modules.plan import CACHED_CALLS, bounded_cache
from tests.module_cases import (
    BRANCH_MODULES,
    DIM,
    FLOAT32_TOLERANCE,
    HEADS,
    make,
    queries_alone,
    specs,
    total,
    unit_freqs,
)


def projection_flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    products = ("mm", "addmm", "bmm", "baddbmm")
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if str(operation).removeprefix("aten.") in products)


def test_unread_tokens_are_not_projected_to_keys() -> None:
    module = make(SelfAnchorAttention)
    token_specs = specs(surface_anchors=8, surface_queries=100, volume_anchors=16, volume_queries=200)
    n, n_read, batch = 324, 24, 2
    x = torch.randn(batch, n, DIM)
    expected = 2 * batch * DIM**2 * (n + 2 * n_read + n)
    assert projection_flops(lambda: module(x, token_specs)) == expected

    _, cache = module(x, token_specs, return_kv_cache=True)
    alone, rows = queries_alone(token_specs)
    queries = x[:, rows]
    assert projection_flops(lambda: module(queries, alone, kv_cache=cache)) == 2 * batch * DIM**2 * 2 * 300

    anchors_only = specs(surface_anchors=124, volume_anchors=200)
    assert projection_flops(lambda: module(x, anchors_only)) == 2 * batch * DIM**2 * 4 * n


def test_activations_of_unread_tokens_are_not_kept() -> None:
    module = make(JointAnchorAttention)
    n_anchors, n_queries = 4, 1000
    x = torch.randn(1, n_anchors + n_queries, DIM, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x, specs(surface_anchors=n_anchors, surface_queries=n_queries))
    y.sum().backward()
    token_bytes = 4 * DIM
    # x, q, the attention's output and its log-sum-exp; the rest has the size of the anchors and of the weights.
    query_bytes = n_queries * (3 * token_bytes + 4 * HEADS)
    assert sum(kept.values()) <= query_bytes + 20 * n_anchors * token_bytes + 2 * 4 * DIM**2 * token_bytes // DIM


def test_views_of_one_projection_reach_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    operation = steps_module.anchor_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((q, k, v))
        return operation(q, k, v, *args, **kwargs)

    monkeypatch.setattr(steps_module, "anchor_attention", spy)
    module = make(CrossAnchorAttention)
    # An empty group that nobody reads splits nothing.
    module(torch.randn(2, 7, DIM), specs(surface_anchors=3, surface_queries=0, volume_anchors=4))
    module(torch.randn(2, 9, DIM), specs(surface_anchors=3, volume_anchors=4, volume_queries=2))
    (q, k, v), (_, k_read, v_read) = seen
    assert len({tensor.untyped_storage().data_ptr() for tensor in (q, k, v)}) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in (k_read, v_read)}) == 1
    assert (k_read.shape[1], k_read.stride(1)) == (7, 2 * DIM)


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_compiles_once_for_all_sizes(module_class: type) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    module = make(module_class, use_rope=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(surface: int, volume: int) -> None:
        token_specs = specs(
            surface_anchors=surface, surface_queries=3 * volume, volume_anchors=volume, volume_queries=2 * surface + 1
        )
        n = total(token_specs)
        x, freqs = torch.randn(2, n, DIM, requires_grad=True), unit_freqs(2, n)
        y = compiled(x, token_specs, freqs)
        expected = module(x, token_specs, freqs)
        torch.testing.assert_close(y, expected, rtol=0, atol=FLOAT32_TOLERANCE)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=10 * FLOAT32_TOLERANCE)

    check(5, 9)
    with torch.compiler.set_stance("fail_on_recompile"):
        for surface, volume in ((9, 4), (16, 16), (3, 50), (31, 2), (6, 7)):
            check(surface, volume)


def test_cached_and_masked_calls_compile_once() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    module = make(CrossAnchorAttention, use_rope=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(surface: int, volume: int, first: int, second: int) -> None:
        anchors = specs(surface_anchors=surface, volume_anchors=volume)
        n = surface + volume
        with torch.no_grad():
            _, cache = module(
                torch.randn(2, n, DIM),
                anchors,
                unit_freqs(2, n),
                key_padding_mask=torch.rand(2, n) < 0.8,
                return_kv_cache=True,
            )
            queries = specs(surface_anchors=None, surface_queries=first, volume_anchors=None, volume_queries=second)
            x, freqs = torch.randn(2, first + second, DIM), unit_freqs(2, first + second)
            expected = module(x, queries, freqs, kv_cache=cache)
            actual = compiled(x, queries, freqs, kv_cache=cache)
        torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT32_TOLERANCE)

    check(5, 9, 11, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in ((9, 4, 3, 20), (16, 16, 5, 5), (3, 50, 2, 100), (6, 7, 8, 9)):
            check(*sizes)


class GroupsOfTwoInputs(torch.nn.Module):
    """Takes the sizes of the groups from its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = make(CrossAnchorAttention)

    def forward(self, surface: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        token_specs = specs(surface_anchors=surface.shape[1], volume_anchors=volume.shape[1])
        return self.attention(torch.cat((surface, volume), dim=1), token_specs)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_symbolic_sizes(strict: bool) -> None:
    module = GroupsOfTwoInputs()
    sizes = ({1: torch.export.Dim("n_surface")}, {1: torch.export.Dim("n_volume")})
    example = (torch.randn(2, 5, DIM), torch.randn(2, 7, DIM))
    exported = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict).module()
    surface, volume = torch.randn(2, 9, DIM), torch.randn(2, 3, DIM)
    torch.testing.assert_close(exported(surface, volume), module(surface, volume), rtol=0, atol=FLOAT32_TOLERANCE)


def test_repeated_calls_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(CrossAnchorAttention)
    x = torch.randn(1, 12, DIM)

    def sizes(queries: int) -> list[TokenSpec]:
        return specs(surface_anchors=2, volume_anchors=3, volume_queries=queries)

    module(x, sizes(7))

    def refuse(*args: object) -> None:
        raise AssertionError("built in the hot path")

    monkeypatch.setattr(KeyRangeTable, "__init__", refuse)
    monkeypatch.setattr(AttentionPattern, "__init__", refuse)
    module(x, sizes(7))
    make(CrossAnchorAttention)(x, sizes(7))
    with pytest.raises(AssertionError, match="built in the hot path"):
        module(x[:, :11], sizes(6))


def test_remembered_results_are_bounded() -> None:
    class Result:
        pass

    alive: weakref.WeakSet[Result] = weakref.WeakSet()

    @bounded_cache
    def build(size: int) -> Result:
        result = Result()
        alive.add(result)
        return result

    assert build(3) is build(3)
    for size in range(20 * CACHED_CALLS):
        build(size)
    gc.collect()
    assert len(alive) == CACHED_CALLS
