"""Forward mode and second derivatives in every mode of torch, against the reference back-end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from anchor_attention import (
    KeyRangeTable,
    MixedAttention,
    RopeFrequency,
    SelfAnchorAttention,
    TokenSpec,
    anchor_attention,
    anchor_attention_jvp,
    rope,
    use_backend,
)
from tests.generators import unit_freqs
from tests.transforms.test_func import OperationCounter

TABLE = KeyRangeTable([0, 3, 4, 5], [0, 2, 3], [0, 3, 2, 5, 1, 6])
BATCH, QUERIES, KEYS, HEADS, HEAD_DIM = 2, 6, 6, 2, 4


@pytest.fixture(autouse=True)
def _fallback_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


Tensors = tuple[torch.Tensor, ...]


def arguments() -> Tensors:
    return (
        random(BATCH, QUERIES, HEADS, HEAD_DIM),
        random(BATCH, KEYS, HEADS, HEAD_DIM),
        random(BATCH, KEYS, HEADS, 3),
        unit_freqs(1, QUERIES, HEAD_DIM, torch.float64),
        unit_freqs(BATCH, KEYS, HEAD_DIM, torch.float64),
    )


MASK = torch.tensor([[True] * 5 + [False], [True, False, True, True, False, True]])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_freqs: torch.Tensor, k_freqs: torch.Tensor) -> Tensors:
    out, lse = anchor_attention(q, k, v, TABLE, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=MASK, return_lse=True)
    return out, torch.where(lse.isfinite(), lse, 0.0)


def total(*tensors: torch.Tensor) -> torch.Tensor:
    out, lse = attend(*tensors)
    return out.sin().sum() + lse.square().sum()


def dual(args: Tensors, along: Tensors) -> list[torch.Tensor]:
    with forward_ad.dual_level():
        moved = attend(*(forward_ad.make_dual(*pair) for pair in zip(args, along, strict=True)))
        return [forward_ad.unpack_dual(output).tangent for output in moved]


def dual_of_gradient(args: Tensors, along: Tensors) -> list[torch.Tensor]:
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(arg.clone().requires_grad_(), tangent)
            for arg, tangent in zip(args, along, strict=True)
        ]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(total(*duals), duals)]


def gradient_twice(args: Tensors, along: Tensors) -> Any:
    leaves = [arg.clone().requires_grad_() for arg in args]
    first = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(first, leaves, along)


def of_q(function: Callable[..., Any], args: Tensors) -> Callable[[torch.Tensor], Any]:
    return lambda q: function(q, *args[1:])


MODES: dict[str, Callable[[Tensors, Tensors], Any]] = {
    "jvp": lambda args, along: jvp(attend, args, along),
    "jvp of q": lambda args, along: jvp(of_q(attend, args), args[:1], along[:1]),
    "jacfwd": lambda args, along: jacfwd(of_q(attend, args))(args[0]),
    "jacrev": lambda args, along: jacrev(of_q(attend, args))(args[0]),
    "vmap of jvp, mapped points": lambda args, along: vmap(lambda q, t: jvp(of_q(attend, args), (q,), (t,)))(
        torch.stack([args[0], args[0].cos()]), torch.stack([along[0], along[0].sin()])
    ),
    "jvp of vmap": lambda args, along: jvp(
        vmap(of_q(attend, args)), (torch.stack([args[0], args[0].cos()]),), (torch.stack([along[0]] * 2),)
    ),
    "grad of vmap": lambda args, along: grad(lambda q: vmap(of_q(total, args))(q).sum())(torch.stack([args[0]] * 2)),
    "grad of grad": lambda args, along: grad(
        lambda *a: sum(g.abs().square().sum() for g in grad(total, argnums=(0, 1, 2, 3, 4))(*a)),
        argnums=(0, 1, 2, 3, 4),
    )(*args),
    "jvp of grad": lambda args, along: jvp(grad(total, argnums=(0, 1, 2, 3, 4)), args, along),
    "grad of jvp": lambda args, along: grad(lambda *a: jvp(total, a, along)[1], argnums=(0, 1, 2, 3, 4))(*args),
    "hessian": lambda args, along: hessian(of_q(total, args))(args[0]),
    "jacrev of jacfwd": lambda args, along: jacrev(jacfwd(of_q(total, args)))(args[0]),
    "jacrev of jacrev": lambda args, along: jacrev(jacrev(of_q(total, args)))(args[0]),
    "dual numbers": dual,
    "dual numbers of a gradient": dual_of_gradient,
    "gradient of a gradient": gradient_twice,
}


@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str) -> None:
    torch.manual_seed(0)
    args = arguments()
    along = tuple(torch.randn_like(arg) for arg in args)
    found = tree_leaves(MODES[mode](args, along))
    with use_backend("reference"):
        expected = tree_leaves(MODES[mode](args, along))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0 or mode == "jvp"
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_gradcheck_of_both_orders_and_modes() -> None:
    torch.manual_seed(0)
    leaves = [arg.requires_grad_() for arg in arguments()]
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(attend, leaves, **checks)
    assert torch.autograd.gradgradcheck(attend, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)
    x, freqs = random(2, 3, 2, 4).requires_grad_(), torch.randn(1, 3, 2, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(rope, (x, freqs), **checks)
    assert torch.autograd.gradgradcheck(rope, (x, freqs), check_fwd_over_rev=True)


def test_gradient_of_the_tangent_of_a_dual_number() -> None:
    """Within its level and after it. The reference can do neither: torch's logsumexp has no such derivative."""
    args = arguments()
    along = torch.randn_like(args[0])
    q = args[0].clone().requires_grad_()
    with forward_ad.dual_level():
        out, _ = attend(forward_ad.make_dual(q, along), *args[1:])
        tangent = forward_ad.unpack_dual(out).tangent
        (inside,) = torch.autograd.grad(tangent.sin().sum(), q, retain_graph=True)
    (after,) = torch.autograd.grad(tangent.sin().sum(), q)
    expected = grad(lambda q: jvp(of_q(attend, args), (q,), (along,))[1][0].sin().sum())(args[0])
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)


def test_gradient_through_a_finished_vjp() -> None:
    """What torch.func.vjp returns runs when its level is gone, and outer autograd records it."""
    args = arguments()
    cotangent = random(BATCH, QUERIES, HEADS, 3)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        _, pull_back = vjp(lambda q, freqs: attend(q, *tensors[1:3], freqs, tensors[4])[0], tensors[0], tensors[3])
        return sum(slope.abs().square().sum() for slope in pull_back(cotangent))  # type: ignore[return-value]

    leaves = [arg.clone().requires_grad_() for arg in args]
    found = torch.autograd.grad(loss(*leaves), leaves)
    with use_backend("reference"):
        expected = torch.autograd.grad(loss(*leaves), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_tangents_that_share_a_point_are_one_call() -> None:
    q, k, v = (random(1, n, HEADS, HEAD_DIM) for n in (QUERIES, KEYS, KEYS))
    directions = random(3, *q.shape)
    with OperationCounter() as counter:
        _, moved = vmap(lambda t: jvp(lambda q: anchor_attention(q, k, v, TABLE), (q,), (t,)))(directions)
    assert counter.calls == ["attention", "attention_jvp"]
    _, _, expected, _ = anchor_attention_jvp(q, k, v, TABLE, directions)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-13)


def test_what_has_no_derivative_says_so() -> None:
    q, k, v = (random(1, n, 1, 4) for n in (6, 6, 6))

    def loss(q: torch.Tensor) -> torch.Tensor:
        return anchor_attention(q, k, v, TABLE).sin().sum()

    def tangent(q: torch.Tensor) -> torch.Tensor:
        return jvp(loss, (q,), (q.cos(),))[1]

    with pytest.raises(RuntimeError, match="forward mode can't be applied to forward mode: use jvp of grad"):
        jvp(tangent, (q,), (q,))
    with pytest.raises(RuntimeError, match="there is no third derivative"):
        grad(lambda q: grad(lambda q: grad(loss)(q).square().sum())(q).square().sum())(q)
    freqs = unit_freqs(1, 6, 4, torch.float64)
    out, lse = torch.ops.anchor_attention.attention(q, k, v, [0, 6], [0, 1], [0, 6], freqs)
    flags = (True, False, False, False)
    gradient, *_ = torch.ops.anchor_attention.attention_backward(
        out.requires_grad_(), None, q, k, v, out, lse, [0, 6], [0, 1], [0, 6], freqs, None, None, False, *flags
    )
    with pytest.raises(RuntimeError, match="with q_freqs has no derivative of its own"):
        gradient.sum().backward()


def test_modules_and_caches() -> None:
    """The derivative of queries against a fixed cache, and its gradient by the parameters."""
    torch.manual_seed(0)
    module = SelfAnchorAttention(dim=16, num_heads=2, branches=("a", "b"), use_rope=True, init_weights="torch").double()
    rotation = RopeFrequency(8, 2).double()
    anchors, queries = random(1, 9, 16), random(1, 6, 16)
    positions = torch.rand(1, 9, 2, dtype=torch.float64), torch.rand(1, 6, 2, dtype=torch.float64)
    specs = [TokenSpec("a_anchors", 4), TokenSpec("b_anchors", 5)]
    alone = [TokenSpec("a_anchors", None), TokenSpec("a_queries", 6), TokenSpec("b_anchors", None)]
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def decode(parameters: dict[str, torch.Tensor], points: torch.Tensor) -> torch.Tensor:
        _, cache = functional_call(
            module, parameters, (anchors, specs, rotation(positions[0])), {"return_kv_cache": True}
        )
        return functional_call(module, parameters, (queries, alone, rotation(points)), {"kv_cache": cache})

    def slope(parameters: dict[str, torch.Tensor], points: torch.Tensor) -> torch.Tensor:
        return jvp(lambda points: decode(parameters, points), (points,), (torch.ones_like(points),))[1]

    moved = slope(parameters, positions[1])
    step = 1e-5
    difference = (decode(parameters, positions[1] + step) - decode(parameters, positions[1] - step)) / (2 * step)
    # Central differences: an error of step² in the third derivative, and eps / step of rounding.
    torch.testing.assert_close(moved, difference, rtol=1e-7, atol=1e-8)

    trained = grad(lambda parameters: slope(parameters, positions[1]).square().sum())(parameters)
    with use_backend("reference"):
        expected = grad(lambda parameters: slope(parameters, positions[1]).square().sum())(parameters)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)
    assert trained["mixed_attention.qkv.weight"].abs().max() > 0


def test_first_gradients_keep_their_one_operation() -> None:
    module = MixedAttention(hidden_dim=16, num_heads=2, use_rope=True).double()
    x, freqs = random(1, 8, 16).requires_grad_(), unit_freqs(1, 8, 8, torch.float64)
    specs = [TokenSpec("anchors", 8)]
    from anchor_attention import AttentionPattern

    y = module(x, specs, [AttentionPattern(["anchors"], ["anchors"])], freqs=freqs)
    with OperationCounter() as counter:
        y.sum().backward()
    assert counter.calls.count("attention_backward") == 1 and "rope" not in counter.calls


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled() -> None:
    """Gradients and the plain function compile; forward mode applies around a compiled call."""
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    freqs, along = unit_freqs(1, 6, 8), torch.randn(3, *q.shape)

    def loss(q: torch.Tensor) -> torch.Tensor:
        return anchor_attention(q, k, v, TABLE, q_freqs=freqs).sin().sum()

    def slopes(q: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
        return anchor_attention_jvp(q, k, v, TABLE, along)[2].sin().sum()

    close = {"rtol": 1e-5, "atol": 1e-5}
    for function, rest in ((loss, ()), (slopes, (along,))):
        leaf = q.clone().requires_grad_()
        (found,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(leaf, *rest), leaf)
        (expected,) = torch.autograd.grad(function(leaf, *rest), leaf)
        torch.testing.assert_close(found, expected, **close)

    expected = jvp(loss, (q,), (along[0],))[1]
    torch.testing.assert_close(jvp(torch.compile(loss), (q,), (along[0],))[1], expected, **close)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(torch.compile(loss)(forward_ad.make_dual(q, along[0]))).tangent
    torch.testing.assert_close(moved, expected, **close)


@pytest.mark.usefixtures("_fresh_compiler")
def test_forward_mode_inside_of_a_compiled_function_is_refused() -> None:
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))

    def slope(q: torch.Tensor) -> torch.Tensor:
        return jvp(lambda q: anchor_attention(q, k, v, TABLE), (q,), (q,))[1]

    with pytest.raises(Exception, match=r"torch.func can't differentiate torch.ops.anchor_attention.attention"):
        torch.compile(slope)(q)
