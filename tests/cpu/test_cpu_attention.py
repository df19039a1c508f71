"""What every instruction set of the CPU kernels must do with every dtype; test_instruction_sets.py runs it on each."""

from __future__ import annotations

import math

import pytest
import torch

from anchor_attention import KeyRangeTable, anchor_attention
from tests.generators import AttentionInputs, strided, unit_freqs
from tests.oracle import assert_as_good_as_plain, fused, plain_attention, reference, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _inputs(dtype: torch.dtype, head_dim: int = 64, n_queries: int = 340, n_keys: int = 400) -> AttentionInputs:
    table = KeyRangeTable.from_ranges([[0, 300], [0, 300], [301, n_queries]], [[0, 200], [170, 333], [201, n_keys]])
    q, k, v, grad_out = (strided(1, n, 2, head_dim, dtype, "packed") for n in (n_queries, n_keys, n_keys, n_queries))
    freqs = (unit_freqs(1, n, head_dim, dtype) for n in (n_queries, n_keys))
    return AttentionInputs(q, k, v, table, grad_out, *freqs)


@pytest.mark.parametrize("head_dim", [8, 96, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_passes_match_float64(dtype: torch.dtype, head_dim: int) -> None:
    inputs = _inputs(dtype, head_dim)
    exact = run(reference, inputs.to(torch.float64))
    assert_as_good_as_plain(run(fused, inputs), exact, run(plain_attention, inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat_and_threads_agree_within_rounding(dtype: torch.dtype) -> None:
    """Large enough that one thread and two work head by head in the backward; five take both heads at once."""
    inputs = _inputs(dtype, head_dim=96, n_queries=1100)
    exact = run(reference, inputs.to(torch.float64))
    plain = run(plain_attention, inputs)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            first, again = run(fused, inputs), run(fused, inputs)
            assert all(torch.equal(first[name], again[name]) for name in first)
            assert_as_good_as_plain(first, exact, plain, inputs)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_special_values_propagate_as_in_the_reference(name: str, value: float, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype, head_dim=16)
    inputs.q_freqs = inputs.k_freqs = None
    tensor = getattr(inputs, name).detach().clone()
    tensor[0, 35, 1, 3] = value
    setattr(inputs, name, tensor)
    actual, expected = fused(inputs)[0].double(), reference(inputs.to(torch.float64))[0]
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite])
    error = (actual - expected)[expected.isfinite()].abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected[expected.isfinite()].abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_do_not_disturb(dtype: torch.dtype) -> None:
    """Kept, but that products of bfloat16 take them as zero, as the processors that have such products define them."""
    tiny = torch.finfo(dtype).tiny
    v = torch.full((1, 70, 1, 16), tiny / 2, dtype=dtype)
    q, k = (torch.full((1, n, 1, 16), tiny / 4, dtype=dtype) for n in (40, 70))
    out, lse = anchor_attention(q, k, v, KeyRangeTable.from_ranges([[0, 40]], [[0, 70]]), return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(70)), rtol=1e-6, atol=0)
    # A denormal has fewer bits: its last one is an absolute error.
    last_bit = tiny * torch.finfo(dtype).eps
    error = (out.double() - v[:, :40].double()).abs().max().item()
    assert error <= (tiny / 2 if dtype == torch.bfloat16 else 2 * last_bit)
