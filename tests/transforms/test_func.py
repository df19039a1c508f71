"""torch.func: vmap by a rule, grad, vjp, functional_call, per-sample gradients; each against a loop."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from anchor_attention import KeyRangeTable, SelfAnchorAttention, TokenSpec, anchor_attention, rope, use_backend
from tests.generators import unit_freqs

SAMPLES, BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 3, 2, 9, 7, 2, 8
TABLE = KeyRangeTable([0, 4, 5, 9], [0, 1, 3], [0, 3, 0, 2, 4, 7])
# Two calls with other batch sizes cut the work into other blocks: a few roundings of float64 apart.
TOLERANCE = {"rtol": 0, "atol": 1e-13}


@pytest.fixture(autouse=True)
def _fallback_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


class OperationCounter(TorchDispatchMode):
    """Counts the calls of this library's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "anchor_attention":
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def freqs_of(tokens: int, batch: int) -> torch.Tensor:
    return unit_freqs(batch, tokens, HEAD_DIM, torch.float64)


def stack(make: Callable[[], torch.Tensor], dim: int | None) -> torch.Tensor:
    """One tensor for all samples, or one for each, along ``dim``."""
    return make() if dim is None else torch.stack([make() for _ in range(SAMPLES)], dim)


def loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """What ``vmap(function, in_dims)(*args)`` is to return."""
    results = []
    for i in range(SAMPLES):
        chosen = [
            arg if dim is None else arg.select(dim, i).contiguous() for arg, dim in zip(args, in_dims, strict=True)
        ]
        results.append(function(*chosen))
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_freqs: torch.Tensor,
    k_freqs: torch.Tensor,
    key_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return anchor_attention(
        q, k, v, TABLE, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask, scale=0.4, return_lse=True
    )


def arguments(in_dims: tuple[int | None, ...], freqs_batch: int = 1) -> tuple[torch.Tensor, ...]:
    makers = (
        lambda: random(BATCH, QUERIES, HEADS, HEAD_DIM),
        lambda: random(BATCH, KEYS, HEADS, HEAD_DIM),
        lambda: random(BATCH, KEYS, HEADS, HEAD_DIM),
        lambda: freqs_of(QUERIES, freqs_batch),
        lambda: freqs_of(KEYS, freqs_batch),
        lambda: torch.rand(BATCH, KEYS) < 0.8,
    )
    return tuple(stack(make, dim) for make, dim in zip(makers, in_dims, strict=True))


# Every argument mapped or shared, in every combination; mapped axes at the front, inside, at the end (where the last
# axis of one sample is not contiguous), and counted from the end.
IN_DIMS = [
    tuple(dim if mapped else None for dim, mapped in zip(dims, chosen, strict=True))
    for dims, chosen in zip(
        itertools.cycle([(0, 0, 0, 0, 0, 0), (1, 2, 3, 1, 2, 1), (4, 0, 4, 3, 0, 2), (-1, -2, -3, -1, -2, -1)]),
        itertools.product([True, False], repeat=6),
    )
    if any(chosen)
]


@pytest.mark.parametrize("freqs_batch", [1, BATCH])
def test_vmap_of_every_combination_of_mapped_arguments(freqs_batch: int) -> None:
    for in_dims in IN_DIMS:
        args = arguments(in_dims, freqs_batch)
        for mapped, expected in zip(vmap(attend, in_dims)(*args), loop(attend, in_dims, args), strict=True):
            torch.testing.assert_close(mapped, expected, **TOLERANCE)


def test_vmap_is_one_call_of_the_operation() -> None:
    q, k, v = (random(SAMPLES, 1, n, HEADS, HEAD_DIM) for n in (QUERIES, KEYS, KEYS))
    with OperationCounter() as counter:
        vmap(lambda q, k, v: anchor_attention(q, k, v, TABLE))(q, k, v)
    assert counter.calls == ["attention"]
    with OperationCounter() as counter:
        vmap(grad(lambda q, k, v: anchor_attention(q, k, v, TABLE).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert counter.calls == ["attention", "attention_backward"]


def test_autograd_outside_of_vmap() -> None:
    q, k, v = (random(*shape, HEADS, HEAD_DIM) for shape in ((SAMPLES, BATCH, QUERIES), (BATCH, KEYS), (BATCH, KEYS)))
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return anchor_attention(q, k, v, TABLE)

    dims = (0, None, None)
    actual = torch.autograd.grad(vmap(call, dims)(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(loop(call, dims, tuple(tensors)).square().sum(), tensors)
    for mapped, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mapped, wanted, **TOLERANCE)


def test_shared_keys_of_one_sample_are_not_copied() -> None:
    q, k = random(SAMPLES, 1, QUERIES, HEADS, HEAD_DIM), random(1, KEYS, HEADS, HEAD_DIM)
    seen: list[torch.Tensor] = []

    class Keys(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "anchor_attention":
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    with Keys():
        vmap(lambda q: anchor_attention(q, k, k, TABLE))(q)
    assert seen[0].shape[0] == SAMPLES and seen[0].data_ptr() == k.data_ptr() and seen[0].stride(0) == 0


def test_vmap_of_vmap() -> None:
    q = random(2, SAMPLES, BATCH, QUERIES, HEADS, HEAD_DIM)
    k, v = random(SAMPLES, BATCH, KEYS, HEADS, HEAD_DIM), random(2, BATCH, KEYS, HEADS, HEAD_DIM)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return anchor_attention(q, k, v, TABLE)

    mapped = vmap(vmap(call, (0, 0, None)), (0, None, 0))(q, k, v)
    expected = torch.stack([torch.stack([call(q[i, j], k[j], v[i]) for j in range(SAMPLES)]) for i in range(2)])
    torch.testing.assert_close(mapped, expected, **TOLERANCE)


@pytest.mark.parametrize("freqs_batch", [1, BATCH])
@pytest.mark.parametrize("in_dims", [IN_DIMS[0], IN_DIMS[21], IN_DIMS[30], (0, None, None, None, None, None)])
def test_per_sample_gradients(in_dims: tuple[int | None, ...], freqs_batch: int) -> None:
    """Of what is mapped and of what the samples share, the rotary factors included, as a loop computes them."""
    args = arguments(in_dims, freqs_batch)
    weight = random(BATCH, QUERIES, HEADS, HEAD_DIM)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        out, lse = attend(*tensors)
        return (out * weight).sum() + lse.nan_to_num(neginf=0.0).square().sum()

    per_sample = grad(loss, argnums=(0, 1, 2, 3, 4))
    for mapped, expected in zip(vmap(per_sample, in_dims)(*args), loop(per_sample, in_dims, args), strict=True):
        torch.testing.assert_close(mapped, expected, **TOLERANCE)


def test_grad_and_vjp_are_those_of_autograd() -> None:
    args = arguments((None,) * 6)
    tensors = [tensor.requires_grad_() for tensor in args[:5]]
    outputs = attend(*tensors, args[5])
    cotangents = tuple(torch.randn_like(output) for output in outputs)
    expected = torch.autograd.grad(outputs, tensors, cotangents)

    detached = [tensor.detach() for tensor in tensors]
    transformed, pull_back = vjp(lambda *inputs: attend(*inputs, args[5]), *detached)
    for actual, wanted in zip((*transformed, *pull_back(cotangents)), (*outputs, *expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return sum((out * cotangent).sum() for out, cotangent in zip(attend(*inputs, args[5]), cotangents, strict=True))

    for actual, wanted in zip(grad(loss, argnums=(0, 1, 2, 3, 4))(*detached), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_gradient_of_the_outer_transform_passes_the_inner_one() -> None:
    """A call that the inner grad has nothing to do with is still recorded by the outer one."""
    q, k, v = (random(1, n, HEADS, HEAD_DIM) for n in (QUERIES, KEYS, KEYS))

    def outer(q: torch.Tensor) -> torch.Tensor:
        def inner(scale: torch.Tensor) -> torch.Tensor:
            return scale**2 * anchor_attention(q, k, v, TABLE).sum()

        return grad(inner)(torch.tensor(3.0, dtype=torch.float64))

    expected = 6 * grad(lambda q: anchor_attention(q, k, v, TABLE).sum())(q)
    torch.testing.assert_close(grad(outer)(q), expected, **TOLERANCE)


def test_jacobian() -> None:
    q, k, v = (random(1, n, 1, 4) for n in (5, 3, 3))
    table = KeyRangeTable([0, 3], [0, 1], [0, 3])
    jacobian = jacrev(lambda q: anchor_attention(q, k, v, table))(q)
    expected = torch.autograd.functional.jacobian(lambda q: anchor_attention(q, k, v, table), q)
    torch.testing.assert_close(jacobian, expected, **TOLERANCE)


def test_vmap_of_rope_with_gradients() -> None:
    for dims, freqs_batch in itertools.product([(0, None), (2, 1), (None, 0)], [1, BATCH]):
        x = stack(lambda: random(BATCH, QUERIES, HEADS, HEAD_DIM), dims[0])
        freqs = stack(lambda batch=freqs_batch: freqs_of(QUERIES, batch), dims[1])
        weight = random(BATCH, QUERIES, HEADS, HEAD_DIM)
        torch.testing.assert_close(vmap(rope, dims)(x, freqs), loop(rope, dims, (x, freqs)), **TOLERANCE)
        for argnums in (0, 1):
            function = grad(lambda x, freqs, weight=weight: (rope(x, freqs) * weight).sum(), argnums=argnums)
            mapped, expected = vmap(function, dims)(x, freqs), loop(function, dims, (x, freqs))
            torch.testing.assert_close(mapped, expected, **TOLERANCE)


SPECS = [TokenSpec("surface_anchors", 4), TokenSpec("surface_queries", 6), TokenSpec("volume_anchors", 5)]


def branch_module(**fields: Any) -> SelfAnchorAttention:
    torch.manual_seed(0)
    fields = {"init_weights": "torch", **fields}
    return SelfAnchorAttention(dim=16, num_heads=2, branches=("surface", "volume"), **fields).double()


def test_per_sample_gradients_of_a_module() -> None:
    """The parameters' gradients of every sample, as differential privacy and influence functions need them."""
    module = branch_module(use_rope=True)
    x, freqs = random(SAMPLES, 15, 16), unit_freqs(SAMPLES, 15, 8, torch.float64)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        return functional_call(module, parameters, (x[None], SPECS, freqs[None])).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, freqs)
    for i in range(SAMPLES):
        module.zero_grad()
        module(x[i : i + 1], SPECS, freqs[i : i + 1]).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad, rtol=1e-12, atol=1e-12)


def test_ensemble_of_modules() -> None:
    modules = [branch_module() for _ in range(SAMPLES)]
    for i, module in enumerate(modules):
        with torch.no_grad():
            module.mixed_attention.qkv.weight.mul_(1 + i)
    parameters, buffers = torch.func.stack_module_state(modules)
    x = random(BATCH, 15, 16)
    stacked = vmap(lambda p, b: functional_call(modules[0], (p, b), (x, SPECS)))(parameters, buffers)
    torch.testing.assert_close(stacked, torch.stack([module(x, SPECS) for module in modules]), **TOLERANCE)


def test_vmap_of_queries_against_a_cache() -> None:
    module = branch_module()
    anchors = [TokenSpec("surface_anchors", 4), TokenSpec("volume_anchors", 5)]
    alone = [TokenSpec("surface_anchors", None), TokenSpec("surface_queries", 6), TokenSpec("volume_anchors", None)]
    x, queries = random(1, 9, 16), random(SAMPLES, 1, 6, 16)
    with torch.no_grad():
        _, cache = module(x, anchors, return_kv_cache=True)
        mapped = vmap(lambda queries: module(queries, alone, kv_cache=cache))(queries)
        expected = torch.stack([module(sample, alone, kv_cache=cache) for sample in queries])
        torch.testing.assert_close(mapped, expected, **TOLERANCE)

        def both(x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            _, cache = module(x, anchors, return_kv_cache=True)
            return module(queries, alone, kv_cache=cache)

        every_x = random(SAMPLES, 1, 9, 16)
        torch.testing.assert_close(vmap(both)(every_x, queries), loop(both, (0, 0), (every_x, queries)), **TOLERANCE)


def test_the_reference_has_derivatives_of_every_order_in_every_mode() -> None:
    """Held against each other, and without NaN where a row has no key: no group, no keys, all masked."""
    q, k, v = (random(2, n, 2, 4) for n in (11, 7, 7))
    table = KeyRangeTable([0, 4, 5, 9, 9, 10], [0, 1, 3, 3], [0, 3, 0, 2, 4, 7])
    mask = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])

    def total(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = anchor_attention(q, k, v, table, key_mask=mask, return_lse=True)
        return out.sin().sum() + torch.where(lse.isfinite(), lse, 0.0).square().sum()

    def tangent(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, v: torch.func.jvp(function, (q, v), (q.cos(), v.sin()))[1]

    def slope(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def along(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            of_q, of_v = grad(function, argnums=(0, 1))(q, v)
            return (of_q * q.cos()).sum() + (of_v * v.sin()).sum()

        return along

    with use_backend("reference"):
        for outer, middle, inner in itertools.product((tangent, slope), repeat=3):
            third = outer(middle(inner(total)))(q, v)
            assert third.isfinite() and third != 0
            torch.testing.assert_close(third, tangent(tangent(tangent(total)))(q, v), rtol=1e-11, atol=1e-11)
        assert torch.autograd.gradgradcheck(
            total, (q.requires_grad_(), v.requires_grad_()), check_fwd_over_rev=True, fast_mode=True
        )
        mapped = vmap(lambda along: torch.func.jvp(lambda q: total(q, v), (q,), (along,))[1])(
            torch.stack([q, v.new_ones(q.shape)])
        )
    assert mapped.shape == (2,) and mapped.isfinite().all()


def test_the_operation_itself_says_what_to_call_instead() -> None:
    q, k, v = (random(1, n, 1, 4) for n in (5, 3, 3))
    operation = torch.ops.anchor_attention.attention
    with pytest.raises(
        RuntimeError, match=r"torch.func can't differentiate torch.ops.anchor_attention.attention: call"
    ):
        grad(lambda q: operation(q, k, v, [0, 3], [0, 1], [0, 3])[0].sum())(q)
    mapped, _ = vmap(lambda q: operation(q, k, v, [0, 3], [0, 1], [0, 3]))(q[None])
    torch.testing.assert_close(mapped[0], operation(q, k, v, [0, 3], [0, 1], [0, 3])[0], rtol=0, atol=0)
