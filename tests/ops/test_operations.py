"""torch.ops.anchor_attention: opcheck, gradcheck, compilation and argument errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from anchor_attention import KeyRangeTable, anchor_attention, rope, use_backend
from tests.generators import unit_freqs

ops = torch.ops.anchor_attention


def _tensors(
    dtype: torch.dtype = torch.float32, n_queries: int = 9, n_keys: int = 7, batch: int = 2, requires_grad: bool = True
) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(batch, n, 2, 8, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for n in (n_queries, n_keys, n_keys)
    )


TABLE = ([0, 4, 5, 9], [0, 1, 3], [0, 3, 0, 2, 4, 7])


def _attention_samples() -> dict[str, tuple[Any, ...]]:
    q, k, v = _tensors()
    freqs = unit_freqs(2, 9, 8).requires_grad_()
    mask = torch.rand(2, 7) < 0.7
    return {
        "plain": (q, k, v, *TABLE),
        "all arguments": (q, k, v, *TABLE, freqs, mask, 0.3, True),
        "shared freqs": (q, k, v, *TABLE, unit_freqs(1, 9, 8)),
        "no gradient": (*_tensors(requires_grad=False), *TABLE),
        "bfloat16": (*_tensors(torch.bfloat16), *TABLE, freqs),
        "float16": (*_tensors(torch.float16), *TABLE),
        "float64": (*_tensors(torch.float64), *TABLE),
        "empty table": (q, k, v, [], [0], []),
        "no keys": (*_tensors(n_keys=0), [0, 9], [0, 0], []),
        "no queries": (*_tensors(n_queries=0), [], [0], []),
        "empty batch": (*_tensors(batch=0), *TABLE),
        "packed": (*torch.randn(2, 9, 3, 2, 8, requires_grad=True).unbind(2), [0, 9], [0, 1], [2, 9]),
    }


def _backward_sample() -> tuple[Any, ...]:
    q, k, v = _tensors(requires_grad=False)
    freqs = unit_freqs(1, 9, 8)
    out, lse = ops.attention(q, k, v, *TABLE, freqs)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    return (*grads, q, k, v, out, lse, *TABLE, freqs, None, None, False, True, True, False, True)


@pytest.mark.parametrize("name", _attention_samples())
def test_opcheck_attention(name: str) -> None:
    torch.library.opcheck(ops.attention, _attention_samples()[name])


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (ops.attention_backward, _backward_sample),
        (ops.rope, lambda: (torch.randn(2, 5, 3, 8, requires_grad=True), unit_freqs(1, 5, 8).requires_grad_())),
        (ops.rope, lambda: (torch.randn(2, 0, 3, 8), unit_freqs(2, 0, 8))),
        (ops.rope_backward, lambda: (*(torch.randn(2, 5, 3, 8) for _ in range(2)), unit_freqs(2, 5, 8), True, True)),
        (ops.rope_backward, lambda: (torch.randn(2, 5, 3, 8), None, unit_freqs(2, 5, 8), True, False)),
        (ops.canonical_key_ranges, lambda: (*TABLE, 9, 7)),
    ],
    ids=[
        "attention_backward",
        "rope",
        "rope of nothing",
        "rope_backward",
        "rope_backward of x",
        "canonical_key_ranges",
    ],
)
def test_opcheck(operation: Any, arguments: Callable[[], tuple[Any, ...]]) -> None:
    torch.library.opcheck(operation, arguments())


def test_gradcheck_attention() -> None:
    q, k, v = _tensors(torch.float64)
    q_freqs, k_freqs = (torch.randn(b, n, 4, dtype=torch.complex128).requires_grad_() for b, n in ((1, 9), (2, 7)))
    mask = torch.tensor([[True] * 7, [True, False, True, False, False, True, False]])
    table = KeyRangeTable(*TABLE)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, q_freqs, k_freqs = tensors
        out, lse = anchor_attention(
            q, k, v, table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=mask, scale=0.4, return_lse=True
        )
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(call, (q, k, v, q_freqs, k_freqs))


def test_gradcheck_rope() -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    freqs = torch.randn(1, 3, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(rope, (x, freqs))


def test_factors_that_are_expanded_over_the_batch_get_gradients_of_their_own() -> None:
    x, freqs = torch.randn(3, 9, 2, 8), unit_freqs(1, 9, 8)
    for call in (
        rope,
        lambda x, freqs: anchor_attention(x, x, x, KeyRangeTable([0, 9], [0, 1], [0, 9]), q_freqs=freqs),
    ):
        expanded = freqs.expand(3, -1, -1).requires_grad_()
        copied = expanded.detach().clone().requires_grad_()
        grad, expected = (torch.autograd.grad((call(x, f) * x).sum(), f)[0] for f in (expanded, copied))
        torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compilation_serves_every_token_count(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: KeyRangeTable, *freqs: torch.Tensor
    ) -> torch.Tensor:
        return anchor_attention(q, k, v, table, q_freqs=freqs[0], k_freqs=freqs[1])

    def run(function: Any, first: int, second: int, anchors: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        n, m = first + second, 2 * anchors
        tensors = [torch.randn(1, tokens, 2, 16, requires_grad=True) for tokens in (n, m, m)]
        table = KeyRangeTable.from_ranges([[0, first], [first, n]], [[0, anchors], [anchors, m]])
        out = function(*tensors, table, unit_freqs(1, n, 16), unit_freqs(1, m, 16))
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    def eager(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: KeyRangeTable, *freqs: torch.Tensor
    ) -> torch.Tensor:
        return anchor_attention(q, k, v, table, q_freqs=freqs[0], k_freqs=freqs[1])

    for sizes in ((16, 9, 5), (33, 20, 7), (40, 40, 11), (64, 13, 20), (100, 81, 50), (64, 64, 64)):
        for compiled, expected in zip(run(call, *sizes), run(eager, *sizes), strict=True):
            torch.testing.assert_close(compiled, expected)
    assert counter.frame_count == 1


def test_rope_matches_the_reference_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(2, 33, 3, 24, dtype=torch.float64).to(dtype)[:, ::2]
        freqs = unit_freqs(1, 33, 24, dtype)[:, ::2] * 1.7
        with use_backend("reference"):
            expected = rope(x, freqs)
        one_rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(rope(x, freqs), expected, rtol=one_rounding, atol=one_rounding)


def _bad_arguments() -> dict[str, tuple[tuple[Any, ...], str]]:
    q, k, v = _tensors(requires_grad=False)
    good = (q, k, v, *TABLE)

    def replaced(position: int, value: Any) -> tuple[Any, ...]:
        return (*good[:position], value, *good[position + 1 :])

    huge = 2**40
    return {
        "rank": (replaced(0, q[0]), r"q must be \(batch, queries, heads, head_dim\), got 3 axes: \(9, 2, 8\)"),
        "k heads": (replaced(1, k.repeat(1, 1, 2, 1)), r"k must have shape \(2, 7, 2, 8\), got \(2, 7, 4, 8\)"),
        "k without heads": (replaced(1, k[:, :, :0]), r"k must have shape \(2, 7, 2, 8\), got \(2, 7, 0, 8\)"),
        "v heads": (replaced(1, k[:, :, :1]), r"v must have shape \(2, 7, 1, 8\), got \(2, 7, 2, 8\)"),
        "no head_dim of v": (
            replaced(2, v[..., :0]),
            r"v must have a head_dim of at least 1, got shape \(2, 7, 2, 0\)",
        ),
        "v length": (replaced(2, v[:, :5]), r"v must have shape \(2, 7, 2, 8\), got \(2, 5, 2, 8\)"),
        "dtype of q": ((*(t.int() for t in (q, k, v)), *TABLE), "q must be float32, bfloat16, float16 or .* got Int"),
        "dtype of k": (replaced(1, k.double()), r"k must have the dtype of q \(Float\), got Double"),
        "SDPA's layout": (
            (*(t.transpose(1, 2) for t in (q, k, v)), *TABLE),
            r"k must have shape \(2, 2, 9, 8\), got \(2, 2, 7, 8\); in the layout of scaled_dot_product_attention",
        ),
        "SDPA's layout, as many keys": (
            (*(q.transpose(1, 2),) * 3, *TABLE),
            r"out of bounds for n_queries = 2; in the layout of scaled_dot_product_attention, pass q.transpose\(1, 2\)",
        ),
        "SDPA's layout, freqs": (
            (*(q.transpose(1, 2),) * 3, *TABLE, unit_freqs(1, 9, 8)),
            r"q_freqs must have shape \(1, 2, 4\), got \(1, 9, 4\); in the layout of scaled_dot_product_attention",
        ),
        "SDPA's layout, mask": (
            (*(q.transpose(1, 2),) * 3, *TABLE, None, torch.ones(2, 9, dtype=torch.bool)),
            r"key_mask must have shape \(2, 2\), got \(2, 9\); in the layout of scaled_dot_product_attention",
        ),
        "stride": (replaced(0, torch.randn(2, 9, 8, 2).transpose(2, 3)), "q must be contiguous along its last axis"),
        "no head_dim": ((*(t[..., :0] for t in (q, k, v)), *TABLE), "head_dim of at least 1"),
        "query bound": (replaced(3, [0, 4, 5, 10]), r"q_ranges\[1\] = \[5, 10\) is out of bounds for n_queries = 9"),
        "key bound": (replaced(5, [0, 3, 0, 2, 4, 8]), r"k_ranges\[2\] = \[4, 8\) is out of bounds for n_keys = 7"),
        "negative": (replaced(5, [-1, 3, 0, 2, 4, 7]), r"k_ranges\[0\] = \[-1, 3\) is out of bounds"),
        "overflow": (replaced(5, [0, huge, 0, 2, 4, 7]), rf"k_ranges\[0\] = \[0, {huge}\) is out of bounds"),
        "reversed": (replaced(5, [3, 0, 0, 2, 4, 7]), r"k_ranges\[0\] = \[3, 0\) is reversed"),
        "overlap": (replaced(3, [0, 6, 5, 9]), r"disjoint, got q_ranges\[0\] = \[0, 6\) and q_ranges\[1\] = \[5, 9\)"),
        "odd": (replaced(3, [0, 4, 5]), r"q_ranges must hold \(begin, end\) pairs, got 3 numbers"),
        "odd keys": (replaced(5, [0]), r"k_ranges must hold \(begin, end\) pairs, got 1 numbers"),
        "decreasing": (
            replaced(4, [0, 2, 1]),
            r"k_offsets must not decrease, got k_offsets\[1\] = 2 and k_offsets\[2\] = 1",
        ),
        "offsets' end": (
            replaced(4, [0, 1, 2]),
            "k_offsets must end at the number of rows of k_ranges, got 2 for 3 rows",
        ),
        "offsets' begin": (replaced(4, [1, 2, 3]), r"k_offsets\[0\] must be 0, got 1"),
        "offsets' length": (replaced(4, [0, 3]), "one entry more than q_ranges has rows, got 2 entries for 2 rows"),
        "no offsets": (replaced(4, []), "got 0 entries for 2 rows"),
        "freqs' rank": ((*good, unit_freqs(1, 9, 8)[0]), r"q_freqs must be \(batch or 1, tokens, head_dim / 2\)"),
        "freqs' batch": ((*good, unit_freqs(3, 9, 8)), "q_freqs must have batch size 2 or 1, got 3"),
        "freqs' length": ((*good, unit_freqs(1, 8, 8)), r"q_freqs must have shape \(1, 9, 4\), got \(1, 8, 4\)"),
        "freqs' dtype": ((*good, unit_freqs(1, 9, 8).real), "q_freqs must be ComplexFloat for q of Float, got Float"),
        "odd head_dim": (
            (*(torch.randn(1, n, 1, 7) for n in (9, 7, 7)), *TABLE, unit_freqs(1, 9, 8)),
            "head_dim must be even to be rotated by q_freqs, got 7",
        ),
        "mask's shape": ((*good, None, torch.ones(2, 9, dtype=torch.bool)), r"key_mask must have shape \(2, 7\)"),
        "mask's dtype": ((*good, None, torch.ones(2, 7)), "key_mask must be Bool, got Float"),
        "scale": ((*good, None, None, float("nan")), "scale must be finite, got nan"),
    }


@pytest.mark.parametrize("name", _bad_arguments())
def test_bad_arguments_are_named(name: str) -> None:
    arguments, text = _bad_arguments()[name]
    with pytest.raises(RuntimeError, match=text) as refusal:
        ops.attention(*arguments)
    # Where there are no numbers, the words are the same.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for without_data in (lambda tensor: tensor.to("meta"), mode.from_tensor):
        tensors = (without_data(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        with mode, pytest.raises(RuntimeError) as inferred:
            ops.attention(*tensors)
        assert str(inferred.value) == str(refusal.value)


def test_bad_arguments_of_the_backward_are_named() -> None:
    good = _backward_sample()

    def refused(text: str, operation: Any, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=text) as refusal:
            operation(*arguments)
        with pytest.raises(RuntimeError) as inferred:
            operation(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        assert str(inferred.value) == str(refusal.value)

    def call(position: int, value: Any, text: str) -> None:
        refused(text, ops.attention_backward, *good[:position], value, *good[position + 1 :])

    call(0, good[0][..., :4], r"grad_out must have shape \(2, 9, 2, 8\), got \(2, 9, 2, 4\)")
    call(1, good[1].mT, r"grad_lse must have shape \(2, 2, 9\)")
    call(1, good[1].double(), r"grad_lse must have the dtype of lse \(Float\), got Double")
    call(5, torch.empty(2, 9, 8, 2).transpose(2, 3), "out must be contiguous")
    call(6, good[6].double(), "lse must be Float, got Double")
    call(10, None, "need_q_freqs is true, but there are no q_freqs")
    x, freqs = torch.randn(1, 2, 1, 4), unit_freqs(1, 2, 4)
    refused("x must be given when need_freqs is true", ops.rope_backward, x, None, freqs, False, True)
    refused(r"x must have shape \(1, 2, 1, 4\), got \(2, 1, 4\)", ops.rope_backward, x, x[0], freqs, True, True)
    refused(r"x must be \(batch, tokens, heads, head_dim\), got 3 axes: \(2, 1, 4\)", ops.rope, x[0], freqs)
    refused("freqs must be ComplexFloat for x of Float, got ComplexDouble", ops.rope, x, freqs.to(torch.complex128))


def test_other_devices_are_refused_clearly() -> None:
    q, k, v = _tensors(requires_grad=False)
    with pytest.raises(NotImplementedError, match="anchor_attention::attention"):
        ops.attention(*(tensor.to_mkldnn() for tensor in (q, k, v)), *TABLE)
