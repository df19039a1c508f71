"""attention and attention_backward against float64, on inputs chosen to break them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchor_attention import KeyRangeTable, anchor_attention, merge_attention, use_backend
from tests.generators import AttentionInputs, attention_inputs, strided, unit_freqs
from tests.oracle import assert_as_good_as_plain, fused, plain_attention, reference, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_matches_float64(data: st.DataObject, dtype: torch.dtype) -> None:
    inputs = data.draw(attention_inputs(dtype))
    exact = run(reference, inputs.to(torch.float64))
    assert_as_good_as_plain(run(fused, inputs), exact, run(plain_attention, inputs), inputs)


@given(attention_inputs(torch.float64))
def test_float64_is_exact(inputs: AttentionInputs) -> None:
    actual, exact = run(fused, inputs), run(reference, inputs)
    for name, expected in exact.items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-11, atol=1e-11, msg=name)


@given(attention_inputs(torch.float32))
def test_reference_backend_is_selectable(inputs: AttentionInputs) -> None:
    with use_backend("reference"):
        selected = run(fused, inputs)
    for name, expected in run(reference, inputs).items():
        torch.testing.assert_close(selected[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def _inputs(
    dtype: torch.dtype = torch.float32, n_queries: int = 300, n_keys: int = 200, head_dim: int = 64
) -> AttentionInputs:
    table = KeyRangeTable.from_ranges([[0, 150], [150, n_queries]], [[0, 90], [90, n_keys]])
    q, k, v, grad_out = (strided(1, n, 3, head_dim, dtype, "packed") for n in (n_queries, n_keys, n_keys, n_queries))
    freqs = (unit_freqs(1, n, head_dim, dtype) for n in (n_queries, n_keys))
    return AttentionInputs(q, k, v, table, grad_out, *freqs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = _inputs(dtype, n_queries=1500, n_keys=900)
    inputs.table = KeyRangeTable.from_ranges([[0, 700], [700, 1500]], [[0, 900], [100, 650]])
    first = run(fused, inputs)
    for _ in range(3):
        again = run(fused, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_thread_equals_many_within_rounding() -> None:
    inputs = _inputs(n_queries=1500, n_keys=900)
    inputs.table = KeyRangeTable.from_ranges([[0, 700], [700, 1500]], [[0, 900], [100, 650]])
    threads = torch.get_num_threads()
    results = {}
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results[n] = run(fused, inputs)
    finally:
        torch.set_num_threads(threads)
    for n in (2, 5):
        for name, expected in results[1].items():
            torch.testing.assert_close(results[n][name], expected, rtol=1e-4, atol=1e-5, msg=f"{name}, {n} threads")


def test_views_are_read_in_place() -> None:
    inputs = _inputs()
    contiguous = anchor_attention(
        *(tensor.contiguous() for tensor in (inputs.q, inputs.k, inputs.v)), inputs.table, **inputs.keywords()
    )
    assert torch.equal(fused(inputs)[0], contiguous)


def test_output_is_contiguous_and_flattens_for_free() -> None:
    out, lse = fused(_inputs())
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    assert out.flatten(2).data_ptr() == out.data_ptr()


def test_repeated_range_counts_twice_as_a_concatenation_would() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, dtype=torch.float64) for n in (9, 20, 20))
    once = KeyRangeTable.from_ranges([[0, 9]], [[0, 32]])
    twice = KeyRangeTable.from_ranges([[0, 9], [0, 9]], [[0, 20], [4, 16]])
    concatenated = anchor_attention(q, torch.cat([k, k[:, 4:16]], 1), torch.cat([v, v[:, 4:16]], 1), once)
    torch.testing.assert_close(anchor_attention(q, k, v, twice), concatenated)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_rows_without_keys_are_zero_and_take_no_gradient(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, n, 2, 16).to(dtype).requires_grad_() for n in (40, 12, 12))
    key_mask = torch.ones(2, 12, dtype=torch.bool)
    key_mask[1, :5] = False
    table = KeyRangeTable.from_ranges([[3, 10], [10, 20]], [[0, 5], [6, 6]])
    out, lse = anchor_attention(q, k, v, table, key_mask=key_mask, return_lse=True)
    out.float().sum().backward()
    without_keys = torch.ones(2, 40, dtype=torch.bool)
    without_keys[0, 3:10] = False
    assert (out[without_keys] == 0).all() and (lse.transpose(1, 2)[without_keys] == -math.inf).all()
    assert (q.grad[without_keys] == 0).all() and not q.grad.isnan().any()
    assert (k.grad[:, 5:] == 0).all() and (v.grad[1] == 0).all()


def test_masked_keys_may_hold_anything() -> None:
    inputs = _inputs()
    inputs.key_mask = torch.rand(1, 200) < 0.6
    clean = run(fused, inputs)
    for name in ("k", "v"):
        poisoned = getattr(inputs, name).detach().clone()
        poisoned[~inputs.key_mask] = torch.nan
        setattr(inputs, name, poisoned)
    inputs.k_freqs = inputs.k_freqs.detach()
    poisoned_result = run(fused, inputs)
    assert torch.equal(clean["out"], poisoned_result["out"])
    for name in ("grad_q", "grad_q_freqs"):
        assert torch.equal(clean[name], poisoned_result[name]), name
    for name in ("grad_k", "grad_v"):
        assert torch.equal(clean[name][:, inputs.key_mask[0]], poisoned_result[name][:, inputs.key_mask[0]]), name


def test_a_neighbouring_group_may_hold_anything() -> None:
    inputs = _inputs()
    clean = fused(inputs)[0]
    for name in ("k", "v"):
        poisoned = getattr(inputs, name).detach().clone()
        poisoned[:, 90:] = torch.nan
        setattr(inputs, name, poisoned)
    out = fused(inputs)[0]
    assert torch.equal(out[:, :150], clean[:, :150]) and out[:, 150:].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_propagate_as_in_the_reference(value: float) -> None:
    for name in ("q", "k", "v"):
        inputs = _inputs(head_dim=16)
        inputs.q_freqs = inputs.k_freqs = None
        tensor = getattr(inputs, name).detach().clone()
        tensor[0, 33, 1, 3] = value
        setattr(inputs, name, tensor)
        actual, expected = fused(inputs)[0], reference(inputs)[0]
        assert torch.equal(actual.isnan(), expected.isnan()), name
        torch.testing.assert_close(actual.nan_to_num(0.0), expected.nan_to_num(0.0), msg=name)


def test_large_scores_do_not_overflow() -> None:
    inputs = _inputs()
    inputs.q, inputs.k = (inputs.q.detach() * 40, inputs.k.detach() * 40)
    exact = run(reference, inputs.to(torch.float64))
    assert exact["lse"].max() > 1e3
    assert_as_good_as_plain(run(fused, inputs), exact, run(plain_attention, inputs), inputs)


def test_denormals_are_kept() -> None:
    q = torch.zeros(1, 4, 1, 16)
    v = torch.full((1, 8, 1, 16), 1e-40)
    out = anchor_attention(q, torch.zeros(1, 8, 1, 16), v, KeyRangeTable.from_ranges([[0, 4]], [[0, 8]]))
    torch.testing.assert_close(out, v[:, :4], rtol=1e-3, atol=1e-45)


def test_only_wanted_gradients_are_computed() -> None:
    everything = run(fused, _inputs())
    for wanted in (("q",), ("k",), ("v",), ("q_freqs",), ("k_freqs",), ("q", "v")):
        torch.manual_seed(0)
        inputs = _inputs()
        inputs.names = wanted
        torch.manual_seed(0)
        full = _inputs()
        expected = run(fused, full)
        actual = run(fused, inputs)
        for name in wanted:
            torch.testing.assert_close(actual[f"grad_{name}"], expected[f"grad_{name}"], rtol=1e-5, atol=1e-5)
    assert set(everything) == {"out", "lse", "grad_q", "grad_k", "grad_v", "grad_q_freqs", "grad_k_freqs"}


def test_partial_results_merge_and_train() -> None:
    inputs = _inputs(torch.float64)
    whole = KeyRangeTable.from_ranges([[0, 300]], [[0, 200]])
    inputs.table = whole
    expected = run(fused, inputs)

    def in_parts(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for begin, end in ((0, 60), (60, 60), (60, 200)):
            table = KeyRangeTable.from_ranges([[0, 300]], [[begin, end]])
            parts.append(anchor_attention(inputs.q, inputs.k, inputs.v, table, return_lse=True, **inputs.keywords()))
        return merge_attention(*zip(*parts, strict=True))

    actual = run(in_parts, inputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_runs_in_its_dtype(dtype: torch.dtype) -> None:
    inputs = _inputs()
    with torch.autocast("cpu", dtype=dtype):
        out = fused(inputs)[0]
    assert out.dtype == dtype
    assert torch.equal(out, fused(inputs.to(dtype))[0])
    with torch.autocast("cpu", dtype=dtype):
        assert fused(inputs.to(torch.float64))[0].dtype == torch.float64


def test_conjugated_freqs_are_resolved() -> None:
    inputs = _inputs()
    conjugated = inputs.q_freqs.conj()
    assert conjugated.is_conj()
    expected = anchor_attention(inputs.q, inputs.k, inputs.v, inputs.table, q_freqs=conjugated.resolve_conj())
    assert torch.equal(anchor_attention(inputs.q, inputs.k, inputs.v, inputs.table, q_freqs=conjugated), expected)


def test_thousands_of_ranges_cost_what_their_area_costs() -> None:
    n = 5000
    bounds = torch.arange(n + 1) * 3
    table = KeyRangeTable.from_cu_seqlens(bounds, bounds)
    q, k, v = (torch.randn(1, 3 * n, 2, 16) for _ in range(3))
    dense = anchor_attention(
        *(t.unflatten(1, (n, 3))[0] for t in (q, k, v)), KeyRangeTable.from_ranges([[0, 3]], [[0, 3]])
    )
    torch.testing.assert_close(anchor_attention(q, k, v, table), dense.flatten(0, 1).unsqueeze(0))


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """Token strides that put the last rows 2³¹ elements behind the first: only the touched pages exist."""
    storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    rows = storage.as_strided((1, 5, 1, 16), (0, 2**29, 16, 1))
    rows.copy_(torch.randn(1, 5, 1, 16))
    table = KeyRangeTable.from_ranges([[0, 5]], [[0, 5]])
    expected = anchor_attention(*(rows.contiguous() for _ in range(3)), table)
    assert rows.stride(1) * 4 >= 2**31
    assert torch.equal(anchor_attention(rows, rows, rows, table), expected)


def test_scale_zero_averages_the_values() -> None:
    inputs = _inputs(torch.float64)
    inputs.scale = 0.0
    out = fused(inputs)[0]
    torch.testing.assert_close(out[:, :150], inputs.v[:, :90].mean(1, keepdim=True).expand(-1, 150, -1, -1))
