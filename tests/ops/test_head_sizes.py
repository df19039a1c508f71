"""Values of another size than queries and keys, and keys with fewer heads than queries."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anchor_attention import KeyRangeTable, anchor_attention, merge_attention
from tests.generators import AttentionInputs, strided, unit_freqs
from tests.oracle import assert_as_good_as_plain, fused, plain_attention, reference, run

ops = torch.ops.anchor_attention
# (heads, heads of keys, head size, head size of values)
SIZES = ((2, 2, 72, 64), (2, 2, 16, 130), (6, 2, 64, 64), (4, 1, 40, 24))


def make(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, value_dim: int, n_queries: int = 150, n_keys: int = 90
) -> AttentionInputs:
    """Shared and repeated keys, rows of no group, padding, rotation."""
    table = KeyRangeTable.from_ranges(
        [[0, 80], [80, n_queries - 9], [80, n_queries - 9]], [[0, 70], [30, n_keys], [30, n_keys]]
    )
    q = strided(2, n_queries, heads, head_dim, dtype, "packed")
    k = strided(2, n_keys, kv_heads, head_dim, dtype, "packed")
    v = strided(2, n_keys, kv_heads, value_dim, dtype, "offset")
    grad_out = strided(2, n_queries, heads, value_dim, dtype, "contiguous")
    freqs = (unit_freqs(1, n, head_dim, dtype) for n in (n_queries, n_keys))
    return AttentionInputs(q, k, v, table, grad_out, *freqs, key_mask=torch.rand(2, n_keys) < 0.8)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_results_are_those_of_float64(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    inputs = make(dtype, *sizes)
    exact = run(reference, inputs.to(torch.float64))
    assert_as_good_as_plain(run(fused, inputs), exact, run(plain_attention, inputs), inputs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_keys_are_those_of_repeated_heads(sizes: tuple[int, ...]) -> None:
    """Grouped heads give the bits of repeated ones; gradients are the sums over the heads of a group."""
    inputs = make(torch.float64, *sizes)
    shared_by = sizes[0] // sizes[1]
    repeated = inputs.to(torch.float64)
    repeated.k, repeated.v = (tensor.repeat_interleave(shared_by, dim=2) for tensor in (repeated.k, repeated.v))
    actual, expected = run(fused, inputs), run(fused, repeated)
    for name in ("out", "lse"):
        assert torch.equal(actual[name], expected[name]), name
    for name in ("grad_k", "grad_v"):
        summed = expected[name].unflatten(2, (sizes[1], shared_by)).sum(3)
        torch.testing.assert_close(actual[name], summed, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("threads", (1, 2, 5))
def test_two_runs_give_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        # Many tiles; few tiles and many keys; many queries of few keys.
        for n_queries, n_keys in ((1500, 900), (100, 5000), (3000, 100)):
            inputs = make(torch.float32, 6, 2, 24, 40, n_queries, n_keys)
            first, again = run(fused, inputs), run(fused, inputs)
            assert all(torch.equal(first[name], again[name]) for name in first)
            exact = run(reference, inputs.to(torch.float64))
            assert_as_good_as_plain(first, exact, run(plain_attention, inputs), inputs)
    finally:
        torch.set_num_threads(before)


def small(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeyRangeTable]:
    q, k, v = (torch.randn(2, n, h, d, dtype=dtype) for n, h, d in ((5, 4, 6), (7, 2, 6), (7, 2, 3)))
    return q, k, v, KeyRangeTable.from_ranges([[0, 3], [3, 5]], [[0, 4], [2, 7]])


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v, table = small()
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *args: anchor_attention(*args, table, return_lse=True), tensors)


def test_opcheck() -> None:
    q, k, v, table = small(torch.float32)
    ranges = (table.q_ranges, table.k_offsets, table.k_ranges)
    out, lse = ops.attention(q, k, v, *ranges)
    needs = (None, None, None, False, True, True, True, False)
    torch.library.opcheck(ops.attention_backward, (out + 1, lse * 2, q, k, v, out, lse, *ranges, *needs))
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(ops.attention, (*tensors, *ranges))


def test_compiled_and_exported_calls_give_the_same() -> None:
    q, k, v, table = small(torch.float32)

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return anchor_attention(q, k, v, table)

    expected = Attend()(q, k, v)
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(q, k, v), expected)
    program = torch.export.export(Attend(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), expected)


def test_vmap_maps_each_sample() -> None:
    q, k, v, table = small()
    q, k, v = (tensor.unsqueeze(1) for tensor in (q, k, v))
    mapped = torch.func.vmap(lambda q, k, v: anchor_attention(q, k, v, table))(q, k, v)
    expected = torch.stack([anchor_attention(q[i], k[i], v[i], table) for i in range(2)])
    torch.testing.assert_close(mapped, expected)


def test_partial_results_of_wide_values_merge() -> None:
    q, k, v, _ = small()
    whole = anchor_attention(q, k, v, KeyRangeTable.from_ranges([[0, 5]], [[0, 7]]), return_lse=True)
    parts = [
        anchor_attention(q, k, v, KeyRangeTable.from_ranges([[0, 5]], [keys]), return_lse=True)
        for keys in ([0, 3], [3, 7])
    ]
    for merged, expected in zip(merge_attention(*zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(merged, expected)


def test_flops_know_both_sizes() -> None:
    q, k, v, table = small(torch.float32)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = anchor_attention(q, k, v, table)
    scores = 2 * 4 * table.area()
    assert counter.get_total_flops() == 2 * scores * (6 + 3)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * scores * (2 * 6 + 2 * 3)
