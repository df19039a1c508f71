"""Projections of 16-bit numbers on processors that have no products of them: computed in float32, rounded once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from anchor_attention import SelfAnchorAttention
from anchor_attention.modules import projection
from tests.module_cases import DIM, make, specs, total

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
SPECS = specs(surface_anchors=5, surface_queries=7, volume_anchors=4)


@pytest.fixture
def without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_has_products", lambda dtype: False)


def assert_rounded_once(found: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """One rounding to ``dtype``, after sums in float32 of terms whose absolute values add up to ``magnitude``."""
    terms = 64 * torch.finfo(torch.float32).eps * magnitude
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + terms + torch.finfo(dtype).smallest_normal
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_rounded_once(without_products: None, dtype: torch.dtype, autocast: bool) -> None:
    given = torch.float32 if autocast else dtype
    x, weight, bias, grad = (torch.randn(shape).to(given) for shape in ((3, 33, 24), (40, 24), (40,), (3, 33, 40)))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = projection.linear(x, weight, bias)
    grad = grad.to(dtype)
    gradients = torch.autograd.grad(out, leaves, grad)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = nn.functional.linear(*wide)
    expected = torch.autograd.grad(exact, wide, grad.double())
    sizes = [leaf.detach().abs().requires_grad_() for leaf in wide]
    magnitude = nn.functional.linear(*sizes)
    magnitudes = torch.autograd.grad(magnitude, sizes, grad.double().abs())
    assert_rounded_once(out.detach(), exact.detach(), magnitude.detach(), dtype)
    for found, value, size in zip(gradients, expected, magnitudes, strict=True):
        assert_rounded_once(found, value, size, given)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_a_module_goes_the_same_way_and_calls_what_is_no_plain_layer(
    without_products: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(SelfAnchorAttention).to(dtype)
    x = torch.randn(2, total(SPECS), DIM, dtype=dtype)
    types: list[torch.dtype] = []
    product = nn.functional.linear

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        types.append(weight.dtype)
        return product(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", seen)
    # Keys and values of the anchors, queries of all, the output projection.
    module(x, SPECS).square().sum().backward()
    assert types == 3 * [torch.float32]
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in module.parameters())

    types.clear()
    calls: list[nn.Module] = []
    for layer in (module.mixed_attention.qkv, module.mixed_attention.proj):
        layer.register_forward_hook(lambda layer, args, out: calls.append(layer))
    module(x, SPECS)
    assert calls == [module.mixed_attention.qkv, module.mixed_attention.proj]
    assert types == 2 * [dtype]


def test_types_that_differ_stay_an_error(without_products: None) -> None:
    x, weight = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        projection.linear(x, weight, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_are_multiplied_as_they_are(without_products: None, dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 24, dtype=dtype), torch.randn(5, 24, dtype=dtype)
    assert torch.equal(projection.linear(x, weight, None), nn.functional.linear(x, weight))


def test_a_compiled_graph_keeps_its_type(without_products: None) -> None:
    x, weight = torch.randn(7, 24, dtype=torch.bfloat16), torch.randn(5, 24, dtype=torch.bfloat16)
    graph = torch.export.export(_Linear(weight), (x,)).graph_module.code
    assert "linear" in graph
    assert "float32" not in graph


class _Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return projection.linear(x, self.weight, None)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no x86 vectors here")
def test_what_torch_is_held_to_counts() -> None:
    script = "from anchor_attention.modules.projection import _has_products; import torch; print(_has_products({}))"
    for dtype in SIXTEEN_BIT:
        surroundings = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
        arguments = [sys.executable, "-c", script.format(dtype)]
        found = subprocess.run(arguments, env=surroundings, check=True, capture_output=True, text=True).stdout
        assert found.split() == ["False"]
