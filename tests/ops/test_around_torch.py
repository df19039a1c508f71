"""The functional interface among what else PyTorch has: other devices, counters, learnt scales, masks of any stride."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anchor_attention import (
    KeyRangeTable,
    anchor_attention,
    anchor_attention_reference,
    converters,
    merge_attention,
    rope,
    use_backend,
)
from tests.generators import unit_freqs

TABLE = KeyRangeTable.from_ranges([[0, 4], [5, 9]], [[0, 3], [2, 7]])
BACKENDS = ("fused", "reference")


def _tensors(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, n, 2, 8).to(dtype).requires_grad_(requires_grad) for n in (9, 7, 7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v", "q_freqs", "k_freqs", "key_mask"])
def test_an_argument_without_data_among_others_is_refused(name: str, backend: str) -> None:
    q, k, v = _tensors()
    arguments = {"q": q, "k": k, "v": v, "q_freqs": unit_freqs(1, 9, 8), "k_freqs": unit_freqs(1, 7, 8)}
    arguments["key_mask"] = torch.ones(2, 7, dtype=torch.bool)
    arguments[name] = arguments[name].to("meta")
    with use_backend(backend), pytest.raises(RuntimeError) as error:
        anchor_attention(table=TABLE, **arguments)
    refused, where = str(error.value).split(" must be on the device of ")
    assert refused.startswith("anchor_attention: ") and name in (refused.split()[1], where.split()[0])
    assert sorted(re.findall("cpu|meta", where)) == ["cpu", "meta"]
    with use_backend(backend), pytest.raises(RuntimeError, match=r"freqs must be on the device of x \(cpu\), got meta"):
        rope(q, unit_freqs(1, 9, 8).to("meta"))


def test_shapes_are_inferred_where_all_are_on_meta() -> None:
    out, lse = anchor_attention(*(tensor.to("meta") for tensor in _tensors()), TABLE, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 9, 2, 8), (2, 2, 9))
    with pytest.raises(RuntimeError, match=r"k_ranges\[1\] = \[2, 7\) is out of bounds for n_keys = 6"):
        q, k, v = (tensor.to("meta") for tensor in _tensors())
        anchor_attention(q, k[:, :6], v[:, :6], TABLE)


def test_tables_are_made_of_numbers_whatever_the_default_device_is() -> None:
    makers: dict[str, Callable[[], KeyRangeTable]] = {
        "ranges": lambda: KeyRangeTable.from_ranges(np.array([[0, 4]]), np.array([[0, 3]])),
        "rows of arrays": lambda: KeyRangeTable.from_ranges([np.array([0, 4])], [(np.int32(0), 3)]),
        "cu_seqlens": lambda: KeyRangeTable.from_cu_seqlens(np.array([0, 4]), np.array([0, 3])),
        "gappy keys": lambda: converters.from_gappy_keys([0, 4], np.array([0]), [3]),
    }
    expected = KeyRangeTable([0, 4], [0, 1], [0, 3])
    with torch.device("meta"):
        for name, make in makers.items():
            assert make() == expected, name
        assert expected.to_block_mask(4, 3, device="cpu").kv_num_blocks.tolist() == [[[1]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.3, 0.0, -1.7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learnt_scale_takes_its_gradient(value: float, dtype: torch.dtype, backend: str) -> None:
    q, k, v = _tensors(dtype)
    weight = torch.randn(2, 9, 2, 8, dtype=torch.float64)
    exact = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    q64, k64, v64 = (tensor.double() for tensor in (q, k, v))
    expected = anchor_attention_reference(q64 * exact, k64, v64, TABLE, scale=1.0)
    (expected * weight).sum().backward()
    for shape in ((), (1,)):
        scale = torch.full(shape, value, requires_grad=True)
        with use_backend(backend):
            out = anchor_attention(q, k, v, TABLE, scale=scale)
        assert out.dtype == dtype and scale.grad is None
        (out.double() * weight).sum().backward()
        eps = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
        torch.testing.assert_close(out.double(), expected, rtol=8 * eps, atol=8 * eps)
        # A sum over all queries of products that were each rounded.
        assert (scale.grad.double() - exact.grad).abs().item() <= 16 * eps * (weight.abs().sum() * v.abs().max()).sqrt()


def test_a_scale_of_several_elements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale must be a number or a tensor of one element, got shape \(2,\)"):
        anchor_attention(*_tensors(), TABLE, scale=torch.ones(2))


def test_a_scale_that_is_complex_or_elsewhere_is_refused() -> None:
    q, k, v = _tensors()
    with pytest.raises(ValueError, match=r"scale must be real, got a tensor of torch.complex64"):
        anchor_attention(q, k, v, TABLE, scale=torch.tensor(0.3 + 0.1j))
    with pytest.raises(ValueError, match=r"scale must be on the device of q \(cpu\) or the CPU, got meta"):
        anchor_attention(q, k, v, TABLE, scale=torch.tensor(0.3, device="meta"))
    out = anchor_attention(*(tensor.to("meta") for tensor in (q, k, v)), TABLE, scale=torch.tensor([0.3]))
    assert (out.device.type, out.shape) == ("meta", (2, 9, 2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_keys_in_any_part_take_no_gradient_of_merging(dtype: torch.dtype) -> None:
    lses = [torch.tensor([[[-torch.inf, 0.3, -torch.inf]]], dtype=dtype, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        lses[1][0, 0, 2] = -0.5
    outs = [torch.full((1, 3, 1, 4), float(i), dtype=dtype, requires_grad=True) for i in range(2)]
    out, lse = merge_attention(outs, lses)
    assert out[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert lse[0, 0, 0] == -torch.inf and lse[0, 0, 2] == -0.5
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    # Four columns of out, and lse once: weights · (value − merged value) · 4 + weights.
    for i, (of_lse, of_out) in enumerate((([0.0, -0.5, 0.0], [0.0, 0.5, 0.0]), ([0.0, 1.5, 1.0], [0.0, 0.5, 1.0]))):
        assert lses[i].grad[0, 0].tolist() == pytest.approx(of_lse)
        assert outs[i].grad[0, :, 0, 0].tolist() == pytest.approx(of_out)


def test_merging_keeps_nan_and_names_what_does_not_fit() -> None:
    out, lse = torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2)
    assert merge_attention([out], [lse * torch.nan])[0].isnan().all()
    with pytest.raises(ValueError, match=r"outs\[1\] and lses\[1\] must have shapes \(1, 2, 1, 4\) and \(1, 1, 2\)"):
        merge_attention([out, out], [lse, lse.mT])
    with pytest.raises(ValueError, match="outs and lses must be lists or tuples of tensors"):
        merge_attention(out, lse)
    with pytest.raises(ValueError, match=r"outs\[0\] must have 4 axes, got shape \(2, 1, 4\)"):
        merge_attention([out[0]], [lse])
    with pytest.raises(ValueError, match=r"lses\[1\] must have 3 axes, got shape \(1, 2\)"):
        merge_attention([out, out], [lse, lse[0]])
    with pytest.raises(ValueError, match=r"outs\[1\] must be a torch.Tensor, got <class 'NoneType'>"):
        merge_attention([out, None], [lse, lse])


def _flops(wanted: str) -> int:
    q, k, v = _tensors()
    inputs = {"q": q, "k": k, "v": v}
    with FlopCounterMode(display=False) as counter:
        out = anchor_attention(**{name: inputs[name].requires_grad_(name in wanted) for name in inputs}, table=TABLE)
        if wanted:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("wanted", "products"), [("", 2), ("qkv", 6), ("v", 3), ("q", 4), ("k", 4), ("kv", 5)])
def test_flops_are_counted(wanted: str, products: int) -> None:
    """As many as the plain formula's products have, forward and for each gradient that is wanted."""
    assert TABLE.area() == 4 * 3 + 4 * 5
    assert _flops(wanted) == products * 2 * TABLE.area() * 2 * 2 * 8
    if len(wanted) != 1:
        with use_backend("reference"):
            assert _flops(wanted) == products * 2 * TABLE.area() * 2 * 2 * 8


def test_masks_and_factors_of_any_stride_are_read() -> None:
    q, k, v = _tensors(requires_grad=True)
    mask = torch.rand(7, 2) < 0.7
    q_freqs, k_freqs = (unit_freqs(n, 2, 8).transpose(0, 1).requires_grad_() for n in (9, 7))
    assert mask.T.stride(1) != 1 and q_freqs.mT.contiguous().mT.stride(2) != 1

    def run(*arguments: torch.Tensor) -> list[torch.Tensor]:
        mask, *freqs = arguments
        out = anchor_attention(q, k, v, TABLE, q_freqs=freqs[0], k_freqs=freqs[1], key_mask=mask)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v, q_freqs, k_freqs))]

    strided = run(mask.T, q_freqs.mT.contiguous().mT, k_freqs.mT.contiguous().mT)
    contiguous = run(mask.T.contiguous(), q_freqs.contiguous(), k_freqs.contiguous())
    for actual, expected in zip(strided, contiguous, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_takes_complex64_factors(backend: str) -> None:
    q, k, v = _tensors(torch.float64)
    q_freqs, k_freqs = unit_freqs(1, 9, 8).requires_grad_(), unit_freqs(1, 7, 8)
    with use_backend(backend):
        out = anchor_attention(q, k, v, TABLE, q_freqs=q_freqs, k_freqs=k_freqs)
        wide = (freqs.to(torch.complex128) for freqs in (q_freqs, k_freqs))
        expected = anchor_attention(q, k, v, TABLE, **dict(zip(("q_freqs", "k_freqs"), wide, strict=True)))
        assert torch.equal(out, expected)
        assert torch.autograd.grad(out.sum(), q_freqs)[0].dtype == torch.complex64
        assert torch.equal(rope(q, q_freqs), rope(q, q_freqs.to(torch.complex128)))


def test_what_is_no_table_or_tensor_is_named() -> None:
    q, k, v = _tensors()
    call: Any = anchor_attention
    for wrong, kind in (([[0, 9]], "list"), ((1, 2), "tuple"), ({}, "dict"), (np.ones(3), "numpy"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"table must be a KeyRangeTable, .*converters\.from_dense.*{kind}"):
            call(q, k, v, wrong)
    with pytest.raises(ValueError, match=r"table must be a KeyRangeTable, .* got a tensor of shape \(9, 7\)"):
        call(q, k, v, torch.ones(9, 7))
    for position, name in enumerate(("q", "k", "v")):
        with pytest.raises(ValueError, match=rf"{name} must be a torch\.Tensor, got <class 'numpy\.ndarray'>"):
            call(*(t.numpy() if i == position else t for i, t in enumerate((q, k, v))), TABLE)
    for name in ("q_freqs", "k_freqs", "key_mask"):
        with pytest.raises(ValueError, match=rf"{name} must be a torch\.Tensor, got <class 'list'>"):
            call(q, k, v, TABLE, **{name: [True]})
    with pytest.raises(ValueError, match=r"freqs must be a torch\.Tensor"):
        call = rope
        call(q, np.ones(3))


def test_factors_of_keys_are_called_by_their_name() -> None:
    q, k, v = _tensors()
    for backend in BACKENDS:
        with (
            use_backend(backend),
            pytest.raises(
                RuntimeError, match=r"anchor_attention: k_freqs must have shape \(1, 7, 4\), got \(1, 6, 4\)"
            ),
        ):
            anchor_attention(q, k, v, TABLE, k_freqs=unit_freqs(1, 6, 8))


def test_queries_without_keys_can_be_made_an_error() -> None:
    q, k, v = _tensors()
    with pytest.raises(ValueError, match=r"table must cover every query, but \[4, 5\) of 9 queries read no key"):
        anchor_attention(q, k, v, TABLE, allow_uncovered=False)
    with pytest.raises(ValueError, match=r"but \[4, 9\) of 9 queries"):
        anchor_attention(q, k, v, KeyRangeTable.from_ranges([[0, 4]], [[0, 3]]), allow_uncovered=False)
    with pytest.raises(ValueError, match=r"but \[0, 9\) of 9 queries"):
        anchor_attention(q, k, v, KeyRangeTable([], [0], []), allow_uncovered=False)
    whole = KeyRangeTable.from_ranges([[0, 4], [4, 9]], [[0, 3], [2, 7]])
    assert torch.equal(anchor_attention(q, k, v, whole, allow_uncovered=False), anchor_attention(q, k, v, whole))
    anchor_attention(q[:, :0], k, v, KeyRangeTable([], [0], []), allow_uncovered=False)


def test_numbers_that_are_none_are_named() -> None:
    make: Any = KeyRangeTable
    for call, text in (
        (lambda: make.from_ranges(None, None), "q_ranges must be integers in a sequence, array or tensor, got None"),
        (lambda: make.from_ranges({}, {}), r"q_ranges must be integers .*, got \{\}"),
        (lambda: make.from_ranges([[0, 2.5]], [[0, 1]]), r"q_ranges must be one-dimensional integers, got 2\.5"),
        (
            lambda: make.from_ranges([[0, 2**63]], [[0, 1]]),
            "q_ranges must hold numbers of tokens below .* got 92233720368",
        ),
        (
            lambda: make.from_ranges(torch.ones(3, 3), torch.ones(3, 3)),
            r"q_ranges must have shape \(n, 2\), got \(3, 3\)",
        ),
        (lambda: make.from_cu_seqlens([0, True], [0, 1]), "cu_seqlens_q must be one-dimensional integers, got True"),
        (lambda: make.from_cu_seqlens(torch.empty(2, device="meta"), [0]), "cu_seqlens_q must hold numbers, .* meta"),
        (lambda: make(None, [0], []), "q_ranges must be integers in a sequence, array or tensor, got None"),
        (lambda: make([0, 2.0], [0, 1], [0, 1]), r"q_ranges must be one-dimensional integers, got 2\.0"),
        (lambda: TABLE.to_block_mask(9, 7, block_size=0), "block_size must be a positive integer or a pair .* got 0"),
        (
            lambda: converters.from_gappy_keys([0, 2.9], [0], [2]),
            r"cu_seqlens_q must be one-dimensional integers, got 2\.9",
        ),
        (lambda: converters.from_dense([[True]]), "mask must be a torch.Tensor, got <class 'list'>"),
        (lambda: converters.from_prefix(4, 2.0), r"n must be one-dimensional integers, got 2\.0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_memory_that_cannot_be_had_is_counted_in_bytes() -> None:
    code = """
import resource
import torch
from anchor_attention import KeyRangeTable, anchor_attention, rope
resource.setrlimit(resource.RLIMIT_AS, (14 << 30, 14 << 30))
q, k = torch.randn(1, 1, 1, 8).expand(1, 2**31 - 1, 1, 8), torch.randn(1, 1, 1, 8)
for call in (
    lambda: anchor_attention(q, k, k, KeyRangeTable([0, 1], [0, 1], [0, 1])),
    lambda: rope(q.transpose(1, 2), torch.ones(1, 1, 4, dtype=torch.complex64)),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = "anchor_attention: out of memory: can't allocate memory: you tried to allocate 68719476704 bytes for"
    assert result.stdout.splitlines() == [
        f"{words} out of shape (1, 2147483647, 1, 8)",
        f"{words} the rotated x of shape (1, 1, 2147483647, 8)",
    ]


def test_a_batch_of_empty_heads_takes_no_memory() -> None:
    table = KeyRangeTable([], [0], [])
    for shape in ((2**33, 0, 1, 8), (1, 0, 2**33, 8), (1, 0, 1, 2**40)):
        q, k, v = (torch.empty(shape, requires_grad=True) for _ in range(3))
        out = anchor_attention(q, k, v, table)
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), q)[0].shape == shape
    q, k = torch.randn(1, 0, 2, 8, requires_grad=True), torch.randn(1, 3, 2, 8, requires_grad=True)
    freqs = torch.ones(1, 0, 4, dtype=torch.complex64, requires_grad=True)
    grads = torch.autograd.grad(anchor_attention(q, k, k, table, q_freqs=freqs).sum(), (q, k, freqs))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, freqs.shape] and not grads[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_may_hold_anything_on_either_back_end(backend: str) -> None:
    q, k, v = _tensors()
    mask = torch.rand(2, 7) < 0.5

    def run(filled: float) -> list[torch.Tensor]:
        inputs = [q.clone(), *(tensor.masked_fill(~mask[..., None, None], filled) for tensor in (k, v))]
        out = anchor_attention(*(tensor.requires_grad_() for tensor in inputs), TABLE, key_mask=mask)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    with use_backend(backend):
        for clean, poisoned in zip(run(0.0), run(torch.nan), strict=True):
            torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


class _Recording(torch.Tensor):
    """A subclass that sees which functions it is given to."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append((func, args[3:], kwargs))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("at", range(3))
def test_a_subclass_of_tensor_is_asked_first(at: int) -> None:
    tensors = list(_tensors())
    expected = anchor_attention(*tensors, TABLE, scale=0.3)
    tensors[at] = tensors[at].as_subclass(_Recording)
    _Recording.calls.clear()
    out = anchor_attention(*tensors, TABLE, scale=0.3)
    function, (table,), options = _Recording.calls[0]
    assert function is anchor_attention and table is TABLE and options["scale"] == 0.3
    assert type(out) is _Recording and torch.equal(out.as_subclass(torch.Tensor), expected)


def test_a_mode_for_torch_functions_sees_the_call_and_changes_nothing() -> None:
    tensors = _tensors()
    expected = anchor_attention(*tensors, TABLE)
    with torch.device("cpu"):
        assert torch.equal(anchor_attention(*tensors, TABLE), expected)
