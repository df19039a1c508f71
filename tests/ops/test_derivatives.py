"""attention_jvp and attention_double_backward, against float64 derivatives of the definition in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from anchor_attention import (
    KeyRangeTable,
    anchor_attention,
    anchor_attention_jvp,
    anchor_attention_reference,
    use_backend,
)
from tests.devices import DEVICES, DEVICES_AND_DTYPES, Device

ops = torch.ops.anchor_attention
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rows without keys before, between and behind, ranges that overlap and repeat, one key alone.
TABLE = KeyRangeTable.from_ranges(
    [[2, 39], [40, 141], [40, 141], [150, 160], [150, 160]], [[0, 90], [60, 200], [190, 210], [5, 6], [5, 6]]
)
RANGES = (TABLE.q_ranges, TABLE.k_offsets, TABLE.k_ranges)
QUERIES, KEYS = 165, 210


@dataclass
class Sample:
    """Arguments of both operations; a direction that is not among ``moves`` is None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    directions: tuple[torch.Tensor | None, ...]
    key_mask: torch.Tensor | None
    scale: float | None
    grad_out: torch.Tensor
    grad_lse: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v

    def on(self, device: str) -> Sample:
        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return replace(self, **{name: moved(value) for name, value in vars(self).items()})

    def value(self) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ops.attention(*self.tensors, *RANGES, None, self.key_mask, self.scale)
        return out, lse

    def jvp(self, known: bool = False) -> tuple[torch.Tensor, ...]:
        value = self.value() if known else (None, None)
        return ops.attention_jvp(*self.tensors, *value, *self.directions, *RANGES, self.key_mask, self.scale)

    def double_backward(self) -> tuple[torch.Tensor, ...]:
        first = (None if direction is None else direction[0] for direction in self.directions)
        return ops.attention_double_backward(
            self.grad_out, self.grad_lse, *self.tensors, *self.value(), *first, *RANGES, self.key_mask, self.scale,
            True, True, True,
        )  # fmt: skip


def sample(
    dtype: torch.dtype,
    moves: str = "qkv",
    kv_heads: int = 4,
    value_dim: int = 24,
    n: int = 2,
    masked: bool = True,
    scale: float | None = None,
) -> Sample:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    batch, heads, head_dim = 2, 4, 24
    shapes = {"q": (QUERIES, heads, head_dim), "k": (KEYS, kv_heads, head_dim), "v": (KEYS, kv_heads, value_dim)}
    tensors = [normal(batch, *shape) for shape in shapes.values()]
    directions = tuple(normal(n, batch, *shape) if name in moves else None for name, shape in shapes.items())
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, KEYS) < 0.7
        key_mask[1, :95] = False  # all keys of the first group and of the last one
    grad_lse = normal(batch, heads, QUERIES).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Sample(*tensors, directions, key_mask, scale, normal(batch, QUERIES, heads, value_dim), grad_lse)


def definition(s: Sample, dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = anchor_attention_reference(
            *(tensor.to(dtype) for tensor in (q, k, v)), TABLE, key_mask=s.key_mask, scale=s.scale, return_lse=True
        )
        # Zero, which does not move, for −inf.
        return out, torch.where(lse.isfinite(), lse, 0.0)

    return attend


def expected_tangents(s: Sample, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n = next(len(direction) for direction in s.directions if direction is not None)
    moved = []
    for i in range(n):
        along = tuple(
            torch.zeros_like(tensor, dtype=dtype) if direction is None else direction[i].to(dtype)
            for tensor, direction in zip(s.tensors, s.directions, strict=True)
        )
        primals = tuple(tensor.to(dtype) for tensor in s.tensors)
        moved.append(torch.func.jvp(definition(s, dtype), primals, along)[1])
    out, lse = (torch.stack(parts) for parts in zip(*moved, strict=True))
    return out, lse


def expected_second(s: Sample, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (s.grad_out, s.grad_lse, *s.tensors)]
    out, lse = definition(s, dtype)(*leaves[2:])
    grads = torch.autograd.grad((out * leaves[0]).sum() + (lse * leaves[1]).sum(), leaves[2:], create_graph=True)
    loss = sum(
        (grad * direction[0].to(dtype)).sum()
        for grad, direction in zip(grads, s.directions, strict=True)
        if direction is not None
    )
    second = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, second, strict=True)]


def assert_as_good_as_plain(actual: Any, exact: Any, plain: Any, dtype: torch.dtype) -> None:
    """Error ≤ 2 × that of the definition in float32 and rounded to the dtype, plus the rounding of the largest sum."""
    for found, wanted, theirs in zip(actual, exact, plain, strict=True):
        eps = torch.finfo(found.dtype).eps
        rounded = theirs.to(found.dtype).double()
        # In float64 nothing is more exact to compare with: both have the rounding of sums of some hundred products.
        bound = 2 * (rounded - wanted).abs().max() + (64 if dtype == torch.float64 else 8) * eps * wanted.abs().max()
        # 16-bit outputs take part as they were rounded, in delta and in <dO, tangent>.
        if dtype in (torch.bfloat16, torch.float16):
            bound += torch.finfo(dtype).eps * wanted.abs().max()
        error = (found.double() - wanted).abs().max()
        assert error <= bound, f"error {error:.3e}, allowed {bound:.3e}"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tangents(dtype: torch.dtype, known: bool) -> None:
    s = sample(dtype)
    out, lse, out_tangents, lse_tangents = s.jvp(known)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    plain = expected_tangents(s, working)
    assert_as_good_as_plain((out_tangents, lse_tangents), expected_tangents(s, torch.float64), plain, dtype)
    if known:
        assert out.shape == lse.shape == (0,)
    else:
        expected_out, expected_lse = s.value()
        assert torch.equal(lse.isfinite(), expected_lse.isfinite())
        torch.testing.assert_close(out, expected_out, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("name", "dtype"), DEVICES_AND_DTYPES, ids=str)
def test_tangents_on_every_device(name: str, dtype: torch.dtype, known: bool) -> None:
    s = sample(dtype, kv_heads=2, value_dim=40)
    exact, plain = (expected_tangents(s, working) for working in (torch.float64, torch.float32))
    with Device(name).executing() as device:
        out, lse, *tangents = s.on(device.memory).jvp(known)
        assert_as_good_as_plain([tangent.cpu() for tangent in tangents], exact, plain, dtype)
        if known:
            assert out.shape == lse.shape == (0,)
        else:
            # Where products are of 16-bit types, the forward's probabilities are rounded to them, those here are not.
            unit = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
            for found, wanted in zip((out, lse), s.on(device.memory).value(), strict=True):
                atol = 1e-6 + unit * float(s.v.abs().max())
                torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode_on_every_device(device: str) -> None:
    """Through torch.func, of rotated queries: the tangent of the known value."""
    s = sample(torch.float32, "q", n=1)
    freqs = torch.polar(torch.ones(1, QUERIES, 12), torch.rand(1, QUERIES, 12))

    def tangent(memory: str, dtype: torch.dtype) -> torch.Tensor:
        q, k, v, direction = (t.to(memory, dtype) for t in (*s.tensors, s.directions[0][0]))  # type: ignore[index]
        factors = freqs.to(memory, dtype.to_complex())
        attend = partial(anchor_attention, k=k, v=v, table=TABLE, q_freqs=factors, key_mask=s.key_mask.to(memory))
        return torch.func.jvp(attend, (q,), (direction,))[1].cpu()

    exact = tangent("cpu", torch.float64)
    with Device(device).executing() as executing:
        torch.testing.assert_close(tangent(executing.memory, torch.float32).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives(dtype: torch.dtype) -> None:
    s = sample(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert_as_good_as_plain(s.double_backward(), expected_second(s, torch.float64), expected_second(s, working), dtype)


@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize(("name", "dtype"), DEVICES_AND_DTYPES, ids=str)
def test_second_derivatives_on_every_device(name: str, dtype: torch.dtype, moves: str) -> None:
    s = sample(dtype, moves, kv_heads=2, value_dim=40)
    exact, plain = (expected_second(s, working) for working in (torch.float64, torch.float32))
    with Device(name).executing() as device:
        found = [result.cpu() for result in s.on(device.memory).double_backward()]
    assert_as_good_as_plain(found, exact, plain, dtype)


@pytest.mark.parametrize("moves", ["q", "k", "v", "qk", "qv", "kv"])
def test_directions_that_are_zero(moves: str) -> None:
    s = sample(torch.float64, moves)
    for known in (False, True):
        for found, wanted in zip(s.jvp(known)[2:], expected_tangents(s, torch.float64), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    for found, wanted in zip(s.double_backward(), expected_second(s, torch.float64), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kv_heads", "value_dim", "n", "scale"), [(2, 40, 1, -0.3), (1, 8, 11, None), (4, 130, 8, 1.0)]
)
def test_head_sizes_groups_of_heads_and_many_tangents(
    kv_heads: int, value_dim: int, n: int, scale: float | None
) -> None:
    s = sample(torch.float64, "qkv", kv_heads, value_dim, n, masked=False, scale=scale)
    for found, wanted in zip(s.jvp()[2:], expected_tangents(s, torch.float64), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-12)
    for found, wanted in zip(s.double_backward(), expected_second(s, torch.float64), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)


def test_what_all_keys_have_in_common_does_not_cancel() -> None:
    """Keys with a common part move all scores of a row alike, which moves nothing: no digit is lost to it."""
    s = sample(torch.float32, "q", masked=False, scale=0.02)
    s.k += 100.0
    exact = expected_tangents(s, torch.float64)[0]
    # T is some 300, of which a float32 keeps 3e-5; without a reference, sums of P·T·v lose as much of each tangent.
    rounding = torch.finfo(torch.float32).eps * 300
    error = (s.jvp()[2].double() - exact).abs().max().item()
    plain = (expected_tangents(s, torch.float32)[0].double() - exact).abs().max().item()
    assert error <= 2 * plain + rounding


def test_masked_keys_may_hold_anything() -> None:
    s = sample(torch.float32)
    expected = (*s.jvp(), *s.double_backward())
    assert s.key_mask is not None
    for tensor in (s.k, s.v, *(direction[0] for direction in s.directions[1:])):
        tensor[~s.key_mask] = torch.nan
    found = (*s.jvp(), *s.double_backward())
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if i not in (2, 3):
            assert torch.equal(one, other), i
    assert torch.equal(found[2][0], expected[2][0]) and torch.equal(found[3][0], expected[3][0])


def test_rows_without_keys_do_not_move() -> None:
    s = sample(torch.float32)
    _, lse, out_tangents, lse_tangents = s.jvp()
    alone = lse == -torch.inf
    assert alone.any() and (lse_tangents[:, alone] == 0).all()
    assert (out_tangents.transpose(2, 3)[:, alone] == 0).all()
    assert all(result.isfinite().all() for result in s.double_backward())


def test_every_run_gives_the_same_bits() -> None:
    s = sample(torch.float32)
    first, second = ((*s.jvp(), *s.double_backward()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads(threads: int) -> None:
    s = sample(torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = (*s.jvp(), *s.double_backward())
        torch.set_num_threads(threads)
        for found, wanted in zip((*s.jvp(), *s.double_backward()), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(before)


def test_tangents_of_any_layout() -> None:
    s = sample(torch.float64)
    expected = s.jvp()
    q_tangents, k_tangents, v_tangents = s.directions
    assert q_tangents is not None and k_tangents is not None and v_tangents is not None
    last_axis_first = q_tangents.movedim(-1, 0).contiguous().movedim(0, -1)
    heads_first = k_tangents.transpose(2, 3).contiguous().transpose(2, 3)
    for found, wanted in zip(
        ops.attention_jvp(
            *s.tensors, None, None, last_axis_first, heads_first, v_tangents, *RANGES, s.key_mask, s.scale
        ),
        expected,
        strict=True,
    ):
        assert torch.equal(found, wanted)
    same = ops.attention_jvp(*s.tensors, None, None, q_tangents[:1].expand(3, -1, -1, -1, -1), None, None, *RANGES)
    assert torch.equal(same[2][0], same[2][2])


def test_empty_axes() -> None:
    for batch, queries, keys, heads, n in [
        (0, 3, 4, 2, 1),
        (1, 0, 4, 2, 1),
        (1, 3, 0, 2, 1),
        (1, 3, 4, 0, 1),
        (1, 3, 4, 2, 0),
    ]:
        q, k = torch.randn(batch, queries, heads, 8), torch.randn(batch, keys, heads, 8)
        table = ([0, queries], [0, 1], [0, keys])
        results = ops.attention_jvp(q, k, k, None, None, torch.randn(n, *q.shape), None, None, *table)
        assert results[2].shape == (n, *q.shape) and results[3].shape == (n, batch, heads, queries)
        assert not results[2].isnan().any()
        out, lse = ops.attention(q, k, k, *table)
        torch.testing.assert_close(results[:2], (out, lse))
        second = ops.attention_double_backward(
            out, None, q, k, k, out, lse, q, k, k, *table, None, None, True, True, True
        )
        assert [tuple(r.shape) for r in second] == [tuple(t.shape) for t in (out, lse, q, k, k)]
        assert not any(r.isnan().any() for r in second)


def opcheck_samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    q, k, v = (torch.randn(2, n, 2, d) for n, d in ((9, 8), (7, 8), (7, 12)))
    table = ([0, 4, 5, 9], [0, 1, 3], [0, 3, 0, 2, 4, 7])
    mask = torch.rand(2, 7) < 0.8
    out, lse = ops.attention(q, k, v, *table, None, mask)
    tangents = [torch.randn(3, *tensor.shape) for tensor in (q, k, v)]
    with_grad = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    flags = (True, False, True)
    return {
        "jvp": (ops.attention_jvp, (*with_grad, None, None, *tangents, *table, mask, 0.3)),
        "known": (ops.attention_jvp, (q, k, v, out, lse, tangents[0], None, None, *table, mask, None)),
        "second": (
            ops.attention_double_backward,
            (torch.randn_like(out), None, q, k, v, out, lse, tangents[0][0], None, None, *table, mask, None, *flags),
        ),
    }


@pytest.mark.parametrize("name", opcheck_samples())
def test_opcheck(name: str) -> None:
    operation, arguments = opcheck_samples()[name]
    torch.library.opcheck(operation, arguments)


BAD = {
    "none": ({"q_tangents": None}, "one of q_tangents, k_tangents and v_tangents must be given, got none"),
    "rank": ({"q_tangents": torch.zeros(1, 5, 2, 8)}, r"q_tangents must be \(tangents, batch, .* got 4 axes"),
    "shape": ({"q_tangents": torch.zeros(2, 1, 5, 2, 6)}, r"q_tangents must have shape \(2, 1, 5, 2, 8\)"),
    "numbers": ({"k_tangents": torch.zeros(3, 1, 4, 2, 8)}, r"k_tangents must have shape \(2, 1, 4, 2, 8\), got \(3,"),
    "dtype": ({"q_tangents": torch.zeros(2, 1, 5, 2, 8).double()}, r"q_tangents must have the dtype of q \(Float\)"),
    "half known": ({"out": torch.zeros(1, 5, 2, 8)}, "out and lse must be given together"),
    "lse": (
        {"out": torch.zeros(1, 5, 2, 8), "lse": torch.zeros(1, 2, 4)},
        r"lse must have shape \(1, 2, 5\), got \(1, 2, 4\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("fake", [False, True])
def test_errors_name_the_argument(name: str, fake: bool) -> None:
    changed, text = BAD[name]
    arguments = {
        "q": torch.zeros(1, 5, 2, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8), "out": None,
        "lse": None, "q_tangents": torch.zeros(2, 1, 5, 2, 8), "k_tangents": None, "v_tangents": None, **changed,
    }  # fmt: skip
    if fake:
        mode = FakeTensorMode()
        arguments = {key: None if value is None else mode.from_tensor(value) for key, value in arguments.items()}
    with pytest.raises(RuntimeError, match=text):
        ops.attention_jvp(*arguments.values(), [0, 5], [0, 1], [0, 4])


def test_function_and_reference_backend() -> None:
    s = sample(torch.float64)
    fused = anchor_attention_jvp(*s.tensors, TABLE, *s.directions, key_mask=s.key_mask)
    with use_backend("reference"):
        plain = anchor_attention_jvp(*s.tensors, TABLE, *s.directions, key_mask=s.key_mask)
    for found, wanted in zip(fused, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"q_tangents must be a torch\.Tensor"):
        anchor_attention_jvp(*s.tensors, TABLE, 3)  # type: ignore[arg-type]


def test_flops_are_those_of_the_products() -> None:
    q, k, v = torch.randn(2, 10, 4, 8), torch.randn(2, 6, 4, 8), torch.randn(2, 6, 4, 16)
    table = ([0, 10], [0, 1], [0, 6])
    out, lse = ops.attention(q, k, v, *table)
    scores = 2 * 2 * 4 * 10 * 6
    with FlopCounterMode(display=False) as counter:
        ops.attention_jvp(q, k, v, None, None, torch.randn(3, *q.shape), None, None, *table)
    assert counter.get_total_flops() == scores * (1 + 3) * (8 + 16)
    with FlopCounterMode(display=False) as counter:
        ops.attention_double_backward(out, None, q, k, v, out, lse, q, k, v, *table, None, None, True, True, True)
    assert counter.get_total_flops() == scores * (2 * 8 + 2 * 16 + 2 * 16 + 4 * 8 + 16)
