"""Shows in half a minute that an installed anchor_attention works here: operation, gradients, module, compiler.

Usage: python scripts/smoke_test.py   (in the environment that it is installed in; needs nothing else)
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import anchor_attention
from anchor_attention import CrossAnchorAttention, KeyRangeTable, RopeFrequency, TokenSpec
from anchor_attention.__main__ import describe

SPECS = [
    TokenSpec("surface_anchors", 8),
    TokenSpec("surface_queries", 21),
    TokenSpec("volume_anchors", 9),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def check_operation(dtype: torch.dtype) -> None:
    """Output, log-sum-exp and gradients are those of plain PyTorch in float64."""
    table = KeyRangeTable.from_ranges([[0, 20], [20, 50], [20, 50]], [[0, 12], [0, 5], [12, 17]])
    inputs = [torch.randn(2, n, 3, 16, dtype=dtype, requires_grad=True) for n in (50, 17, 17)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    key_mask = torch.rand(2, 17) < 0.8
    results, exact = [], []
    for tensors, backend, into in ((inputs, "fused", results), (exact_inputs, "reference", exact)):
        with anchor_attention.use_backend(backend):
            out, lse = anchor_attention.anchor_attention(*tensors, table, key_mask=key_mask, return_lse=True)
        into += [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), tensors)]
    for actual, expected in zip(results, exact, strict=True):
        tolerance = TOLERANCE[dtype] * (1 + expected.detach().abs().max().item())
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def check_module() -> None:
    """A module with rotary embedding: forward, backward, cached queries."""
    module = CrossAnchorAttention(dim=48, num_heads=3, branches=("surface", "volume"), use_rope=True)
    n = sum(spec.size for spec in SPECS)
    x = torch.randn(2, n, 48, requires_grad=True)
    freqs = RopeFrequency(hidden_dim=16, input_dim=3)(torch.rand(2, n, 3))
    y, cache = module(x, SPECS, freqs, return_kv_cache=True)
    y.square().mean().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    queries = [TokenSpec("surface_anchors", None), SPECS[1], TokenSpec("volume_anchors", None)]
    cached = module(x[:, 8:29], queries, freqs[:, 8:29], kv_cache=cache)
    torch.testing.assert_close(cached, y[:, 8:29], rtol=0, atol=1e-5)


def check_compiler() -> None:
    """One graph serves several token counts, forward and backward."""
    module = CrossAnchorAttention(dim=48, num_heads=3, branches=("surface", "volume"))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((8, 21, 9), (5, 40, 7), (11, 3, 30)):
        specs = [TokenSpec(spec.name, size) for spec, size in zip(SPECS, sizes, strict=True)]
        x = torch.randn(1, sum(sizes), 48, requires_grad=True)
        results = []
        for function in (compiled, module):
            y = function(x, specs)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    torch.manual_seed(0)
    for dtype in TOLERANCE:
        check_operation(dtype)
    check_module()
    check_compiler()
    assert f"torch             {torch.__version__}" in describe()
    print(
        f"anchor-attention {anchor_attention.__version__} works: Python {platform.python_version()}, "
        f"torch {torch.__version__}, {anchor_attention.cpu_instruction_sets().selected}, "
        f"installed in {Path(anchor_attention.__file__).parent}"
    )


if __name__ == "__main__":
    main()
