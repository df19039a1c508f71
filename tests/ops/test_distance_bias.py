"""A bias by squared distance against the same added to the scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anchor_attention import KeyRangeTable, anchor_attention, with_distance_bias


def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and positions far from the origin, which must not matter."""
    q, k, v = (torch.randn(2, n, h, d, dtype=torch.float64) for n, h, d in ((9, 4, 6), (13, 2, 6), (13, 2, 5)))
    positions = (torch.randn(1, 9, 3, dtype=torch.float64) + 100, torch.randn(2, 13, 3, dtype=torch.float64) + 100)
    return tuple(tensor.to(dtype) for tensor in (q, k, v, *positions))


def explicit(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor, strength: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    keys, values = (tensor.repeat_interleave(2, dim=2) for tensor in (k, v))
    distances = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1).unsqueeze(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale - strength * distances
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("scale", (None, 0.3, -0.2))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_scores_are_those_of_an_explicit_bias(dtype: torch.dtype, scale: float | None) -> None:
    tensors = [tensor.requires_grad_() for tensor in make(dtype)]
    strength = torch.tensor(0.8, dtype=dtype, requires_grad=True)
    q, k, v, x, y = tensors
    wide_q, wide_k, factor = with_distance_bias(q, k, x, y, strength, scale=scale)
    assert wide_q.shape == (2, 9, 4, 11) and wide_k.shape == (2, 13, 2, 11)
    table = KeyRangeTable.from_ranges([[0, 9]], [[0, 13]])
    found = anchor_attention(wide_q, wide_k, v, table, scale=factor, return_lse=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (*tensors, strength)]
    expected = explicit(*exact, 6**-0.5 if scale is None else scale)
    # In float32 the positions themselves are rounded at 100, alike for both; a score is some 10.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected[0])
    grads = torch.autograd.grad((found[0] * weights.to(dtype)).sum(), [*tensors, strength])
    theirs = torch.autograd.grad((expected[0] * weights).sum(), exact)
    for ours, grad in zip(grads, theirs, strict=True):
        torch.testing.assert_close(ours.double(), grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_wrong_arguments_are_named() -> None:
    q, k, _, x, y = make(torch.float32)
    with pytest.raises(ValueError, match=r"q_positions must be \(2 or 1, 9, 3\), got shape \(1, 9, 2\)"):
        with_distance_bias(q, k, x[..., :2], y, 1.0)
    with pytest.raises(ValueError, match=r"k_positions must be \(2 or 1, 13, 3\), got shape \(2, 12, 3\)"):
        with_distance_bias(q, k, x, y[:, :12], 1.0)
    with pytest.raises(ValueError, match="scale must be finite and not 0, got 0"):
        with_distance_bias(q, k, x, y, 1.0, scale=0)
    with pytest.raises(ValueError, match=r"strength must be a number or a tensor of one element, got shape \(2,\)"):
        with_distance_bias(q, k, x, y, torch.ones(2))
