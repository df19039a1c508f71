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


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1])
def test_a_nan_stays_one_whatever_its_payload(name: str, bits: int) -> None:
    table = KeyRangeTable.from_ranges([[0, 3], [3, 4]], [[0, 4], [4, 5]])
    inputs = {key: torch.randn(1, 5 if key != "q" else 4, 1, 8) for key in ("q", "k", "v")}
    inputs[name][0, 1, 0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    q = inputs["q"].requires_grad_()
    out, lse = anchor_attention(q, inputs["k"], inputs["v"], table, return_lse=True)
    out.sum().backward()
    assert q.grad is not None
    touched = [1] if name == "q" else [0, 1, 2]
    for row in range(4):
        assert out[0, row, 0, 0].isnan().item() == (row in touched)
        assert q.grad[0, row].isnan().any().item() == (row in touched)
        assert lse[0, 0, row].isnan().item() == (row in touched and name != "v")


def test_float16_does_not_depend_on_how_threads_treat_denormals() -> None:
    """The setting is one of each thread; no float32 in here is denormal."""
    table = KeyRangeTable.from_ranges([[0, 600]], [[0, 2000]])
    q, k = torch.randn(1, 600, 4, 64).half(), torch.randn(1, 2000, 4, 64).half()
    v = torch.full((1, 2000, 4, 64), 2e-5).half()
    expected = anchor_attention(q, k, v, table)
    assert (expected > 1e-5).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    try:
        actual = [anchor_attention(q, k, v, table) for _ in range(5)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(out, expected) for out in actual)
