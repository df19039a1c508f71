"""torch.compile with the inductor back-end on the CPU: equal results, and how often it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from anchor_attention import (
    CrossAnchorAttention,
    JointAnchorAttention,
    KeyRangeTable,
    SelfAnchorAttention,
    anchor_attention,
    rope,
    use_backend,
)
from tests import generators
from tests.module_cases import BRANCH_MODULES, DIM, FLOAT32_TOLERANCE, make, specs, total, unit_freqs

CLOSE = {"rtol": FLOAT32_TOLERANCE, "atol": FLOAT32_TOLERANCE}
# Twelve token counts; every group changes its size.
SIZES = [(4 + i, 7 + 2 * i, 5 + 3 * i, 40 - i) for i in range(12)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y.square().mean(), inputs)


def assert_equal_calls(compiled: Callable[..., Any], eager: Callable[..., Any], inputs: Any, *args: Any) -> None:
    """Same outputs, and same gradients of the inputs and of a module's parameters."""
    differentiated = [*inputs, *(eager.parameters() if isinstance(eager, nn.Module) else ())]
    y, expected = compiled(*inputs, *args), eager(*inputs, *args)
    torch.testing.assert_close(y, expected, **CLOSE)
    for grad, wanted in zip(gradients(y, *differentiated), gradients(expected, *differentiated), strict=True):
        torch.testing.assert_close(grad, wanted, **CLOSE)


@pytest.mark.parametrize(("dynamic", "at_most"), [(None, 2), (True, 1)])
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_modules_serve_twelve_token_counts(module_class: type, dynamic: bool | None, at_most: int) -> None:
    module = make(module_class, use_rope=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for sizes in SIZES:
        names = ("surface_anchors", "surface_queries", "volume_anchors", "volume_queries")
        token_specs = specs(**dict(zip(names, sizes, strict=True)))
        n = total(token_specs)
        x = torch.randn(2, n, DIM, requires_grad=True)
        assert_equal_calls(compiled, module, (x,), token_specs, unit_freqs(2, n))
    assert compilations() <= at_most


def functional(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    q_freqs: torch.Tensor | None = None,
    k_freqs: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    out, lse = anchor_attention(
        q, k, v, table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask, scale=0.3, return_lse=True
    )
    return out + torch.where(lse.isfinite(), lse, 0.0).transpose(1, 2)[..., None]


def functional_inputs(n_queries: int, n_keys: int) -> list[torch.Tensor]:
    return [torch.randn(2, n, 2, 16, requires_grad=True) for n in (n_queries, n_keys, n_keys)]


@pytest.mark.parametrize(("dynamic", "at_most"), [(None, 2), (True, 1)])
def test_functional_call_serves_twelve_token_counts(dynamic: bool | None, at_most: int) -> None:
    compiled = torch.compile(functional, fullgraph=True, dynamic=dynamic)
    for first, second, anchors, others in SIZES:
        n, m = first + second, anchors + others
        table = KeyRangeTable.from_ranges([[0, first], [first, n]], [[0, anchors], [anchors, m]])
        freqs = (generators.unit_freqs(1, n, 16), generators.unit_freqs(2, m, 16))
        assert_equal_calls(compiled, functional, functional_inputs(n, m), table, *freqs, torch.rand(2, m) < 0.8)
    assert compilations() <= at_most


def test_static_sizes_compile_once() -> None:
    compiled = torch.compile(functional, fullgraph=True, dynamic=False)
    table = KeyRangeTable.from_ranges([[0, 9], [9, 20]], [[0, 7], [3, 12]])
    for _ in range(3):
        assert_equal_calls(compiled, functional, functional_inputs(20, 12), table)
    assert compilations() == 1


@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (True, 1)])
def test_other_ranges_of_the_same_tensors_add_no_compilation(dynamic: bool | None, expected: int) -> None:
    """The values of the ranges are symbols once a second table was seen, with ``dynamic=True`` from the start."""
    compiled = torch.compile(functional, fullgraph=True, dynamic=dynamic)
    for i in range(10):
        table = KeyRangeTable.from_ranges([[2, 9 + i], [9 + i, 30]], [[2 + i, 13 + i], [15 - i, 25]])
        assert_equal_calls(compiled, functional, functional_inputs(30, 25), table)
    assert compilations() == expected


def test_what_is_static_in_a_table() -> None:
    """The number of ranges, rounded up, nothing else: not even bounds of 0 and 1, which as sizes would be constants."""
    compiled = torch.compile(functional, fullgraph=True, dynamic=True)

    def call(q_ranges: list[list[int]], k_ranges: list[list[int]]) -> int:
        assert_equal_calls(
            compiled, functional, functional_inputs(30, 25), KeyRangeTable.from_ranges(q_ranges, k_ranges)
        )
        return compilations()

    assert call([[3, 30]], [[4, 20]]) == 1
    assert call([[5, 29]], [[6, 25]]) == 1
    assert call([[0, 1]], [[0, 1]]) == 1
    assert call([[1, 30]], [[0, 25]]) == 1
    assert call([[3, 10], [10, 30]], [[4, 20], [5, 25]]) == 2
    assert call([[0, 9], [11, 12]], [[0, 4], [1, 25]]) == 2


def test_packed_batches_of_every_number_of_samples_share_few_graphs() -> None:
    """As many lengths of tables as torch compiles at most, eight, reach to 256 samples."""
    compiled = torch.compile(anchor_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (1, 2, 3, 5, 8, 9, 12, 7, 4, 16, 17, 30):
        bounds = range(0, 5 * n + 1, 5)
        table = KeyRangeTable.from_cu_seqlens(bounds, bounds)
        q, k, v = functional_inputs(5 * n, 5 * n)
        torch.testing.assert_close(compiled(q, k, v, table), anchor_attention(q, k, v, table), **CLOSE)
    assert compilations() == 6
    padded = {tuple(map(len, KeyRangeTable([0, 9 * n], [0, n], [0, 9] * n).padded_ranges)) for n in range(257)}
    assert len(padded) <= 9


def test_ranges_out_of_bounds_are_refused_by_the_graph() -> None:
    """No guard looks at them: the operation does."""
    compiled = torch.compile(functional, fullgraph=True, dynamic=True)
    q, k, v = functional_inputs(30, 25)
    compiled(q, k, v, KeyRangeTable.from_ranges([[3, 30]], [[4, 20]]))
    with pytest.raises(RuntimeError, match=r"k_ranges\[0\] = \[4, 26\) is out of bounds for n_keys = 25"):
        compiled(q, k, v, KeyRangeTable.from_ranges([[3, 30]], [[4, 26]]))


@pytest.mark.parametrize("module_class", [SelfAnchorAttention, JointAnchorAttention])
def test_mask_and_cache_inside_the_graph(module_class: type) -> None:
    """The anchors' keys and values are made, masked and read again without leaving one graph."""
    module = make(module_class, use_rope=True)

    def two_calls(
        x: torch.Tensor, queries: torch.Tensor, sizes: tuple[int, int, int], *rest: torch.Tensor
    ) -> torch.Tensor:
        freqs, query_freqs, mask = rest
        surface, volume, n_queries = sizes
        anchors = specs(surface_anchors=surface, volume_anchors=volume)
        y, cache = module(x, anchors, freqs, key_padding_mask=mask, return_kv_cache=True)
        alone = specs(surface_anchors=None, volume_anchors=None, volume_queries=n_queries)
        return torch.cat([y, module(queries, alone, query_freqs, kv_cache=cache)], dim=1)

    compiled = torch.compile(two_calls, fullgraph=True, dynamic=True)
    for surface, volume, n_queries in ((5, 9, 20), (7, 4, 11), (16, 33, 64)):
        n = surface + volume
        x, queries = (torch.randn(2, tokens, DIM, requires_grad=True) for tokens in (n, n_queries))
        rest = (unit_freqs(2, n), unit_freqs(2, n_queries), torch.rand(2, n) < 0.8)
        assert_equal_calls(compiled, two_calls, (x, queries), (surface, volume, n_queries), *rest)
    assert compilations() == 1


def test_a_cache_made_outside_is_an_input_of_the_graph() -> None:
    module = make(CrossAnchorAttention)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for surface, volume, n_queries in ((5, 9, 20), (7, 4, 11), (16, 33, 64)):
        n = surface + volume
        with torch.no_grad():
            anchors = specs(surface_anchors=surface, volume_anchors=volume)
            mask = torch.rand(2, n) < 0.8
            _, cache = module(torch.randn(2, n, DIM), anchors, key_padding_mask=mask, return_kv_cache=True)
        alone = specs(surface_anchors=None, volume_anchors=None, volume_queries=n_queries)
        queries = torch.randn(2, n_queries, DIM, requires_grad=True)
        y, expected = (call(queries, alone, kv_cache=cache) for call in (compiled, module))
        torch.testing.assert_close(y, expected, **CLOSE)
        torch.testing.assert_close(gradients(y, queries), gradients(expected, queries), **CLOSE)
    assert compilations() == 1


def one_module_call(**fields: Any) -> tuple[nn.Module, torch.Tensor, Any]:
    module = make(CrossAnchorAttention, **fields)
    token_specs = specs(surface_anchors=9, surface_queries=20, volume_anchors=12)
    return module, torch.randn(2, 41, DIM, requires_grad=True), token_specs


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_accepted(mode: str) -> None:
    module, x, token_specs = one_module_call()
    assert_equal_calls(torch.compile(module, fullgraph=True, mode=mode), module, (x,), token_specs)


@pytest.mark.parametrize("fields", [{"qk_norm": True}, {"dropout": 1e-12}, {"bias": False}], ids=str)
def test_options_of_modules_compile(fields: dict[str, Any]) -> None:
    module, x, token_specs = one_module_call(**fields)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal_calls(compiled, module, (x,), token_specs)


def test_legacy_rope_compiles() -> None:
    module, x, token_specs = one_module_call(use_rope=True)
    angles = tuple(torch.rand(1, 41, 4) for _ in range(3))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal_calls(compiled, module, (x,), token_specs, angles)


def test_precision_of_matmul_is_an_argument_that_is_guarded() -> None:
    """allow_tf32 is a constant of the graph; what it follows is among the things that torch.compile guards."""
    seen: list[bool] = []

    def record(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        (node,) = [node for node in graph.graph.nodes if "attention" in str(node.target)]
        seen.append(node.args[9])
        return graph.forward

    q, k, v = functional_inputs(20, 12)
    table = KeyRangeTable.from_ranges([[0, 20]], [[0, 12]])
    compiled = torch.compile(functional, fullgraph=True, backend=record)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium", "highest", "high"):
            torch.set_float32_matmul_precision(precision)
            compiled(q, k, v, table)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [False, True]


def test_the_back_end_is_guarded() -> None:
    inputs = functional_inputs(20, 12)
    table = KeyRangeTable.from_ranges([[0, 20]], [[0, 12]])
    operations: list[str] = []

    def record(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        operations.append(str([node.target for node in graph.graph.nodes]))
        return graph.forward

    compiled = torch.compile(functional, fullgraph=True, backend=record)
    fused = compiled(*inputs, table)
    with use_backend("reference"):
        reference = compiled(*inputs, table)
    assert torch.equal(compiled(*inputs, table), fused)
    assert ["anchor_attention.attention" in graph for graph in operations] == [True, False]
    torch.testing.assert_close(fused, reference, **CLOSE)


def test_vmap_inside_a_graph() -> None:
    q, k, v = (torch.randn(3, 1, n, 2, 16) for n in (20, 12, 12))
    table = KeyRangeTable.from_ranges([[0, 20]], [[0, 12]])
    mapped = torch.vmap(lambda q, k, v: anchor_attention(rope(q, freqs), k, v, table))
    freqs = generators.unit_freqs(1, 20, 16)
    torch.testing.assert_close(torch.compile(mapped, fullgraph=True)(q, k, v), mapped(q, k, v), **CLOSE)


def test_torch_func_inside_a_graph_is_refused_with_the_way_out() -> None:
    q, k, v = (tensor.detach() for tensor in functional_inputs(20, 12))
    table = KeyRangeTable.from_ranges([[0, 20]], [[0, 12]])
    gradient = torch.func.grad(lambda q: anchor_attention(q, k, v, table).sum())
    with pytest.raises(
        RuntimeError, match=r"call the function of the package anchor_attention, outside torch\.compile"
    ):
        torch.compile(gradient, fullgraph=True, backend="eager")(q)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(use_reentrant: bool, compiled: bool) -> None:
    module, x, token_specs = one_module_call(use_rope=True)
    freqs = unit_freqs(2, 41)
    expected = gradients(module(x, token_specs, freqs), x, *module.parameters())

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(module, x, token_specs, freqs, use_reentrant=use_reentrant)

    y = torch.compile(call, fullgraph=not use_reentrant)(x) if compiled else call(x)
    module.zero_grad()
    x.grad = None
    y.square().mean().backward()
    for tensor, grad in zip((x, *module.parameters()), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad, **CLOSE)


def test_selective_checkpointing_keeps_the_attention() -> None:
    """What the operation returned is kept where the policy says so, and it is not computed again."""
    module, x, token_specs = one_module_call()
    operation = torch.ops.anchor_attention.attention.default
    keep = partial(create_selective_checkpoint_contexts, [operation])
    expected = gradients(module(x, token_specs), x, *module.parameters())
    calls: list[object] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    for context_fn, n_calls in ((noop_context_fn, 2), (keep, 1)):
        calls.clear()
        with Calls():
            y = checkpoint(module, x, token_specs, use_reentrant=False, context_fn=context_fn)
            actual = gradients(y, x, *module.parameters())
        assert calls.count(operation) == n_calls
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_and_grad_scaler(dtype: torch.dtype, compiled: bool) -> None:
    """Scaled gradients under autocast are float32, and those of float64 within the rounding."""
    module, x, token_specs = one_module_call()
    plain = make(CrossAnchorAttention)
    plain.load_state_dict(module.state_dict())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    function = torch.compile(module, fullgraph=True) if compiled else module
    with torch.autocast("cpu", dtype):
        y = function(x, token_specs)
    assert y.dtype == dtype
    scaler.scale(y.float().square().mean()).backward()
    scaler.unscale_(optimiser)

    reference = plain.to(torch.float64)(x.detach().double(), token_specs)
    reference.square().mean().backward()
    # Four products and an attention, each rounded once to the low precision, relative to the largest gradient.
    for parameter, wanted in zip(module.parameters(), plain.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        bound = 8 * torch.finfo(dtype).eps * wanted.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=0, atol=bound)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert all(not torch.equal(parameter, old) for parameter, old in zip(module.parameters(), before, strict=True))


def test_grad_scaler_skips_a_step_of_infinite_gradients() -> None:
    module, x, token_specs = one_module_call()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        y = module(x * 1e30, token_specs)
    scaler.scale(y.float().square().mean()).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(parameter, old) for parameter, old in zip(module.parameters(), before, strict=True))
