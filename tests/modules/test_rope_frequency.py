"""Rotary factors of coordinates: layout, gradients, the invariance that rotary embeddings are for, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anchor_attention import rope
from anchor_attention.modules import RopeFrequency, SelfAnchorAttention
from anchor_attention.modules.rope import rotate_half_rope
from anchor_attention.patterns import TokenSpec

FLOAT32_EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("head_dim", "n_axes", "n_frequencies"), [(64, 1, 32), (64, 2, 16), (64, 3, 10), (48, 3, 8), (32, 3, 5), (8, 3, 1)]
)
def test_layout(head_dim: int, n_axes: int, n_frequencies: int) -> None:
    module = RopeFrequency(hidden_dim=head_dim, input_dim=n_axes, max_wavelength=1000.0)
    coords = torch.rand(2, 7, n_axes) * 20 - 10
    freqs = module(coords)
    assert freqs.shape == (2, 7, head_dim // 2)
    assert freqs.dtype == torch.complex64
    for axis in range(n_axes):
        for i in range(n_frequencies):
            angle = coords[..., axis].double() * 1000.0 ** (-i / n_frequencies)
            expected = torch.polar(torch.ones_like(angle), angle)
            actual = freqs[..., axis * n_frequencies + i].to(torch.complex128)
            # |angle| is at most 10: its float32 rounding (frequency, product) and that of cos and sin.
            assert (actual - expected).abs().max() < (3 * 10 + 2) * FLOAT32_EPS
    rest = freqs[..., n_axes * n_frequencies :]
    assert torch.equal(rest, torch.ones_like(rest))


def test_leading_dimensions_are_free() -> None:
    module = RopeFrequency(64, 3)
    coords = torch.randn(2, 5, 3)
    torch.testing.assert_close(module(coords[1]), module(coords)[1], rtol=0, atol=0)
    assert module(coords[:0]).shape == (0, 5, 32)


def test_gradients_flow_to_the_coordinates() -> None:
    module = RopeFrequency(16, 3).double()
    coords = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert module(coords).dtype == torch.complex128
    assert torch.autograd.gradcheck(lambda c: torch.view_as_real(module(c)), coords)
    assert torch.autograd.gradgradcheck(lambda c: torch.view_as_real(module(c)), coords)


def test_attention_gradients_reach_the_coordinates() -> None:
    torch.manual_seed(0)
    frequencies = RopeFrequency(16, 2)
    attention = SelfAnchorAttention(dim=32, num_heads=2, branches=("a",), use_rope=True, init_weights="torch")
    coords = torch.randn(1, 7, 2, requires_grad=True)
    specs = [TokenSpec("a_anchors", 3), TokenSpec("a_queries", 4)]
    attention(torch.randn(1, 7, 32), specs, frequencies(coords)).square().sum().backward()
    assert coords.grad is not None
    assert (coords.grad.abs() > 0).all()


@pytest.mark.parametrize("implementation", ["complex", "real"])
def test_scores_depend_on_distance_alone(implementation: str) -> None:
    torch.manual_seed(0)
    module = RopeFrequency(64, 3, implementation=implementation).double()
    rotate = rope if implementation == "complex" else rotate_half_rope
    q, k = torch.randn(2, 1, 6, 2, 64, dtype=torch.float64)
    coords_q, coords_k = torch.randn(2, 1, 6, 3, dtype=torch.float64)
    shift = torch.tensor([3.0, -7.0, 0.5], dtype=torch.float64)

    def scores(offset: torch.Tensor) -> torch.Tensor:
        rotated_q, rotated_k = rotate(q, module(coords_q + offset)), rotate(k, module(coords_k + offset))
        return torch.einsum("bqhd,bkhd->bhqk", rotated_q, rotated_k)

    torch.testing.assert_close(scores(torch.zeros_like(shift)), scores(shift), rtol=0, atol=1e-11)
    assert (scores(torch.zeros_like(shift)) - torch.einsum("bqhd,bkhd->bhqk", q, k)).abs().max() > 0.1


def test_real_and_complex_give_the_same_scores() -> None:
    torch.manual_seed(0)
    coords = torch.randn(2, 5, 3, dtype=torch.float64)
    angles = RopeFrequency(64, 3, implementation="real").double()(coords)
    freqs = RopeFrequency(64, 3, implementation="complex").double()(coords)
    assert [tuple(angle.shape) for angle in angles] == [(2, 5, 20)] * 3
    q, k = torch.randn(2, 2, 5, 4, 64, dtype=torch.float64)
    # The same pairs, in the order of the two forms: halves of an axis' block against neighbours.
    first = torch.cat([torch.arange(10) + 20 * axis for axis in range(3)] + [torch.tensor([60, 62])])
    second = torch.cat([torch.arange(10, 20) + 20 * axis for axis in range(3)] + [torch.tensor([61, 63])])
    interleaved = torch.stack((first, second), dim=1).flatten()
    for x in (q, k):
        as_halves = rotate_half_rope(x, angles)[..., interleaved]
        torch.testing.assert_close(as_halves, rope(x[..., interleaved], freqs), rtol=0, atol=1e-13)


def test_trailing_dimensions_are_untouched_by_the_real_form() -> None:
    angles = RopeFrequency(64, 3, implementation="real")(torch.randn(1, 5, 3))
    x = torch.randn(1, 5, 2, 64).bfloat16()
    rotated = rotate_half_rope(x, angles)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated[..., 60:], x[..., 60:])
    assert not torch.equal(rotated[..., :60], x[..., :60])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_exact_frequencies(dtype: torch.dtype) -> None:
    coords = torch.rand(1, 9, 3) * 1000
    expected = RopeFrequency(64, 3)(coords)
    assert torch.equal(RopeFrequency(64, 3).to(dtype)(coords), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RopeFrequency(64, 3)(coords), expected)


def test_state_dict_holds_the_frequencies() -> None:
    module = RopeFrequency(64, 3)
    assert list(module.state_dict()) == ["omega"]
    assert module.state_dict()["omega"].shape == (10,)


def test_takes_a_config_object() -> None:
    module = RopeFrequency(SimpleNamespace(hidden_dim=32, input_dim=2, max_wavelength=40000, implementation="real"))
    assert (module.hidden_dim, module.input_dim, module.max_wavelength) == (32, 2, 40000)
    assert isinstance(module(torch.randn(1, 4, 2)), tuple)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 63, "input_dim": 3}, "hidden_dim=63"),
        ({"hidden_dim": 4, "input_dim": 3}, r"at least 2 \* input_dim, got hidden_dim=4 and input_dim=3"),
        ({"hidden_dim": 64, "input_dim": 0}, "input_dim must be a positive integer, got 0"),
        ({"hidden_dim": 64}, "input_dim must be the number of coordinates, got None"),
        ({"hidden_dim": 64, "input_dim": 3, "max_wavelength": 0.0}, "max_wavelength must be positive, got 0.0"),
        ({"hidden_dim": 64, "input_dim": 3, "implementation": "polar"}, "got 'polar'"),
    ],
)
def test_constructor_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeFrequency(**fields)


def test_forward_errors() -> None:
    with pytest.raises(ValueError, match=r"coords must be \(..., 3\), got shape \(2, 5, 2\)"):
        RopeFrequency(64, 3)(torch.randn(2, 5, 2))
    x = torch.randn(1, 5, 2, 16)
    for angles in ((), (torch.zeros(1, 5, 3),), (torch.zeros(1, 5, 10), torch.zeros(1, 5, 8))):
        with pytest.raises(ValueError, match="at most the head dimension 16, got"):
            rotate_half_rope(x, angles)
