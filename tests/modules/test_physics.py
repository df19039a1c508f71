"""Derivatives of fields by coordinates: fields with known derivatives, and a decoder of the package's modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from anchor_attention import RopeFrequency, SelfAnchorAttention, TokenSpec, physics, use_backend

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def points(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(*shape, dtype=torch.float64)


def plane(x: torch.Tensor) -> torch.Tensor:
    """u = (x² y, sin x + y³)."""
    a, b = x.unbind(-1)
    return torch.stack([a**2 * b, a.sin() + b**3], dim=-1)


def space(x: torch.Tensor) -> torch.Tensor:
    """u = (y z, x² z, x y³)."""
    a, b, c = x.unbind(-1)
    return torch.stack([b * c, a**2 * c, a * b**3], dim=-1)


@pytest.mark.parametrize("shape", [(7, 2), (2, 7, 2), (2, 3, 7, 2)])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_fields_in_the_plane(shape: tuple[int, ...], chunk_size: int) -> None:
    x = points(*shape)
    a, b = x.unbind(-1)
    values, slopes = physics.jacobian(plane, x, chunk_size=chunk_size)
    torch.testing.assert_close(values, plane(x), **EXACT)
    rows = [torch.stack([2 * a * b, a**2], dim=-1), torch.stack([a.cos(), 3 * b**2], dim=-1)]
    torch.testing.assert_close(slopes, torch.stack(rows, dim=-2), **EXACT)
    divergence = physics.divergence(plane, x, chunk_size=chunk_size)
    torch.testing.assert_close(divergence, 2 * a * b + 3 * b**2, **EXACT)
    torch.testing.assert_close(physics.curl(plane, x, chunk_size=chunk_size), a.cos() - a**2, **EXACT)
    second = torch.stack([2 * b, -a.sin() + 6 * b], dim=-1)
    torch.testing.assert_close(physics.laplacian(plane, x, chunk_size=chunk_size), second, **EXACT)


def test_fields_in_space() -> None:
    x = points(5, 3)
    a, b, c = x.unbind(-1)
    rotation = torch.stack([3 * a * b**2 - a**2, b - b**3, 2 * a * c - c], dim=-1)
    torch.testing.assert_close(physics.curl(space, x), rotation, **EXACT)
    torch.testing.assert_close(physics.divergence(space, x), torch.zeros_like(a), **EXACT)
    second = torch.stack([torch.zeros_like(a), 2 * c, 6 * a * b], dim=-1)
    torch.testing.assert_close(physics.laplacian(space, x), second, **EXACT)
    of_one = physics.gradient(lambda x: space(x)[..., 2:], x)
    torch.testing.assert_close(of_one, torch.stack([b**3, 3 * a * b**2, torch.zeros_like(a)], dim=-1), **EXACT)


def test_no_points() -> None:
    values, slopes = physics.jacobian(plane, points(2, 0, 2))
    assert values.shape == (2, 0, 2) and slopes.shape == (2, 0, 2, 2)
    assert physics.curl(plane, points(0, 2)).shape == (0,) and physics.laplacian(plane, points(0, 2)).shape == (0, 2)


def test_a_chunk_is_all_that_the_decoder_sees() -> None:
    seen: list[int] = []

    def decoder(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2])
        return plane(x)

    for function in (physics.jacobian, physics.divergence, physics.curl, physics.laplacian):
        function(decoder, points(2, 10, 2), chunk_size=4)
    assert max(seen) == 4


BAD = {
    "coordinates must be a floating-point tensor": lambda: physics.jacobian(plane, torch.ones(3, 2, dtype=torch.long)),
    r"coordinates must be .* got torch.float64 of shape \(2,\)": lambda: physics.gradient(plane, points(2)),
    "chunk_size must be at least 1, got 0": lambda: physics.jacobian(plane, points(3, 2), chunk_size=0),
    r"decoder must return \(3, 2\) .* got torch.float64 of shape \(3, 1\)": lambda: physics.divergence(
        lambda x: x[..., :1], points(3, 2)
    ),
    r"decoder must return \(3, 1\) .* got torch.float64 of shape \(3, 2\)": lambda: physics.gradient(
        plane, points(3, 2)
    ),
    r"decoder must return \(3, outputs\)": lambda: physics.jacobian(lambda x: x.sum(-1), points(3, 2)),
    r"coordinates must have 2 or 3 components, got shape \(3, 4\)": lambda: physics.curl(plane, points(3, 4)),
    r"coordinates must have 2 components, got shape \(3, 3\)": lambda: physics.stream_velocity(space, points(3, 3)),
}


@pytest.mark.parametrize("text", BAD)
def test_errors_name_the_argument(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BAD[text]()


class Decoder(nn.Module):
    """Coordinates become queries and their rotation; a block of two attentions to anchors, which are fixed."""

    def __init__(self, d: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(d, 24)
        self.attentions = nn.ModuleList(
            SelfAnchorAttention(dim=24, num_heads=2, branches=("a",), use_rope=True, init_weights="torch")
            for _ in range(2)
        )
        self.rotation = RopeFrequency(12, d)
        self.head = nn.Linear(24, outputs)
        self.double()
        self.anchors = points(1, 9, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        specs = [TokenSpec("a_anchors", 9), TokenSpec("a_queries", x.shape[1])]
        positions = torch.cat([self.anchors.expand(len(x), -1, -1), x], dim=1)
        freqs = self.rotation(positions)
        hidden = self.embed(positions).sin()
        for attention in self.attentions:
            hidden = hidden + attention(hidden, specs, freqs)
        return self.head(hidden[:, 9:])


def central_differences(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, step: float) -> torch.Tensor:
    columns = []
    for i in range(x.shape[-1]):
        along = torch.zeros_like(x)
        along[..., i] = step
        columns.append((function(x + along) - function(x - along)) / (2 * step))
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("d", [2, 3])
def test_through_a_decoder_of_modules(d: int) -> None:
    """Coordinates enter by the embedding and by the rotation; held against differences of float64."""
    decoder = Decoder(d, d)
    x = points(2, 11, d)
    with torch.no_grad():
        values, slopes = physics.jacobian(decoder, x, chunk_size=4)
        torch.testing.assert_close(values, decoder(x), **EXACT)
        # step² times the third derivative, and eps / step: 1e-10 each.
        torch.testing.assert_close(slopes, central_differences(decoder, x, 1e-5), rtol=1e-7, atol=1e-7)
        expected = central_differences(lambda x: physics.jacobian(decoder, x)[1], x, 1e-5)
        laplacian = physics.laplacian(decoder, x, chunk_size=5)
        torch.testing.assert_close(laplacian, expected.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-6, atol=1e-6)
        assert laplacian.abs().max() > 0.01


def test_a_stream_function_has_no_divergence_and_trains() -> None:
    decoder = Decoder(2, 1)
    x = points(1, 12, 2)
    with torch.no_grad():
        divergence = physics.divergence(lambda x: physics.stream_velocity(decoder, x), x)
        slopes = physics.jacobian(lambda x: physics.stream_velocity(decoder, x), x)[1]
    # Its two terms are the same second derivative, up to rounding.
    assert divergence.abs().max() <= 1e-13 < 0.01 < slopes.abs().max()

    def loss() -> torch.Tensor:
        velocity = physics.stream_velocity(decoder, x)
        return (velocity - plane(x)).square().mean() + physics.curl(lambda x: decoder(x) * plane(x), x).square().mean()

    gradients = torch.autograd.grad(loss(), list(decoder.parameters()))
    with use_backend("reference"):
        expected = torch.autograd.grad(loss(), list(decoder.parameters()))
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in gradients[:4])
