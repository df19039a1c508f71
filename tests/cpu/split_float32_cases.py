"""float32 from products of bfloat16 parts, against bounds derived from what the parts leave out.

Run by test_cpu_tiles.py in a process of its own, on an instruction set with tile registers.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from anchor_attention import KeyRangeTable, anchor_attention
from anchor_attention.reference import anchor_attention_reference

# x = high + low + rest with |low| <= 2^-9 |x| and |rest| <= 2^-18 |x|. A product leaves out low · low and both rests.
SPLIT = 3 * 2.0**-18
FLOAT32 = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _allow_less_than_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def _gradients(
    function: object, tensors: tuple[torch.Tensor, ...], table: KeyRangeTable, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
    out = function(*leaves, table)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def _bounds(tensors: tuple[torch.Tensor, ...], grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Largest errors of out, grad_q, grad_k, grad_v, element by element, in the first order of the errors."""
    q, k, v, grad_out = (tensor.double().transpose(1, 2) for tensor in (*tensors, grad_out))
    eps, scale = SPLIT + FLOAT32, q.shape[-1] ** -0.5
    scores_error = eps * scale * q.abs() @ k.abs().mT
    p = torch.softmax(scale * q @ k.mT, -1)
    p_error = p * (scores_error + (p * scores_error).sum(-1, keepdim=True) + FLOAT32)
    out_error = p_error @ v.abs() + eps * p @ v.abs()
    grad_v_error = (p_error + eps * p).mT @ grad_out.abs()
    grad_p = grad_out @ v.mT
    centred = grad_p - (p * grad_p).sum(-1, keepdim=True)
    centred_error = eps * grad_out.abs() @ v.abs().mT + (grad_out.abs() * out_error).sum(-1, keepdim=True)
    centred_error += FLOAT32 * (grad_out.abs() * (p @ v).abs()).sum(-1, keepdim=True)
    grad_s_error = p_error * centred.abs() + p * centred_error + eps * (p * centred).abs()
    grad_q_error = scale * grad_s_error @ k.abs()
    grad_k_error = scale * grad_s_error.mT @ q.abs()
    return tuple(error.transpose(1, 2) for error in (out_error, grad_q_error, grad_k_error, grad_v_error))


@pytest.mark.parametrize("head_dim", [8, 40, 64, 128])
@pytest.mark.parametrize("magnitude", [1.0, 1e-10, 20.0])
def test_errors_are_what_the_parts_leave_out(head_dim: int, magnitude: float) -> None:
    tensors = tuple(torch.randn(1, n, 2, head_dim) * size for n, size in ((150, 1), (201, magnitude), (201, magnitude)))
    grad_out = torch.randn(1, 150, 2, head_dim)
    table = KeyRangeTable.from_ranges([[0, 150]], [[0, 201]])
    actual = _gradients(anchor_attention, tensors, table, grad_out)
    exact = _gradients(anchor_attention_reference, tuple(t.double() for t in tensors), table, grad_out.double())
    # One rounding of a result that float32 holds.
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, found, expected, bound in zip(names, actual, exact, _bounds(tensors, grad_out), strict=True):
        excess = ((found - expected).abs() - bound).max().item()
        assert excess <= 0, f"{name}: {excess:.3e} above the bound"


def test_it_is_asked_for_by_torchs_precision() -> None:
    tensors = tuple(torch.randn(1, 64, 2, 64) for _ in range(3))
    table = KeyRangeTable.from_ranges([[0, 64]], [[0, 64]])
    split = anchor_attention(*tensors, table)
    torch.set_float32_matmul_precision("highest")
    full = anchor_attention(*tensors, table)
    exact = anchor_attention(*(tensor.double() for tensor in tensors), table)
    assert (full - exact).abs().max() < (split - exact).abs().max() <= 2e-4


def test_two_runs_give_the_same_bits() -> None:
    tensors = tuple(torch.randn(1, n, 2, 64) for n in (700, 500, 500))
    table = KeyRangeTable.from_ranges([[0, 300], [300, 700]], [[0, 500], [100, 410]])
    first, again = (_gradients(anchor_attention, tensors, table, torch.ones(1, 700, 2, 64)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """An infinity may come out as NaN: its lower part is the difference of two infinities."""
    for position in range(3):
        tensors = [torch.randn(1, n, 1, 16) for n in (70, 90, 90)]
        tensors[position][0, 33, 0, 3] = value
        table = KeyRangeTable.from_ranges([[0, 40], [40, 70]], [[0, 50], [50, 90]])
        actual, expected = anchor_attention(*tensors, table), anchor_attention_reference(*tensors, table)
        assert not actual[~expected.isfinite()].isfinite().any()
        assert actual[:, 40:].isfinite().all()
