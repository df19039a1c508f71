"""The checks of csrc/host, with the same messages, for tensors without data: fake ones and those on the meta device.

While torch traces, sizes can be symbols. What is unknown about them is left to the operation, which checks the numbers
when the graph runs: a comparison here would become a guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ._dtypes import working_dtype

# torch::headeronly::toString, for the dtypes that are met in practice.
_DTYPE_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.complex32: "ComplexHalf",
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
}
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADS_FIRST = "; in the layout of scaled_dot_product_attention, pass q.transpose(1, 2), and k and v likewise"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    q_freqs: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float | None,
) -> None:
    """Checks the arguments of ``attention``.

    Raises:
        RuntimeError: With the message of the operation.
    """
    _check_rank("q", q, 4, "(batch, queries, heads, head_dim)")
    _check_rank("k", k, 4, "(batch, keys, heads, head_dim)")
    _check_rank("v", v, 4, "(batch, keys, heads, head_dim)")
    batch, n_queries, heads, head_dim = q.shape
    n_keys = k.shape[1]
    if _known(head_dim < 1):
        _fail(f"q must have a head_dim of at least 1, got shape {_shape(q.shape)}")
    heads_first = _same((k.shape[0], k.shape[1], k.shape[3]), (batch, n_queries, head_dim))
    # Keys and values may have fewer heads than queries, if their number divides that of the queries.
    kv_heads, value_dim = k.shape[2], v.shape[3]
    if _known(kv_heads == 0) or (_is_number(kv_heads, heads) and heads % kv_heads):
        kv_heads = heads
    _check_shape("k", k, (batch, n_keys, kv_heads, head_dim), heads_first)
    _check_shape("v", v, (batch, n_keys, kv_heads, value_dim))
    if _known(value_dim < 1):
        _fail(f"v must have a head_dim of at least 1, got shape {_shape(v.shape)}")
    _check_same_device("k", k, "q", q)
    _check_same_device("v", v, "q", q)
    _check_floating("q", q)
    _check_same_dtype("k", k, "q", q)
    _check_same_dtype("v", v, "q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_last_axis(name, tensor)
    if q_freqs is not None:
        _check_freqs("q_freqs", q_freqs, "q", q)
    if key_mask is not None:
        heads_first = key_mask.dim() == 2 and _same(key_mask.shape, (batch, k.shape[2]))
        _check_shape("key_mask", key_mask, (batch, n_keys), heads_first)
        _check_same_device("key_mask", key_mask, "q", q)
        if key_mask.dtype != torch.bool:
            _fail(f"key_mask must be Bool, got {_dtype(key_mask.dtype)}")
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        _fail(f"scale must be finite, got {scale}")
    _check_table(q_ranges, k_offsets, k_ranges, q, k)


def attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_freqs: torch.Tensor | None,
    need_q_freqs: bool,
) -> None:
    """Checks what ``attention_backward`` takes in addition to the arguments of ``attention``.

    Raises:
        RuntimeError: With the message of the operation.
    """
    lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    lse_dtype = working_dtype(q.dtype)
    out_shape = (*q.shape[:3], v.shape[3])
    _check_shape("grad_out", grad_out, out_shape)
    _check_shape("out", out, out_shape)
    _check_shape("lse", lse, lse_shape)
    for name, tensor in (("grad_out", grad_out), ("out", out), ("lse", lse)):
        _check_same_device(name, tensor, "q", q)
    _check_same_dtype("grad_out", grad_out, "q", q)
    _check_same_dtype("out", out, "q", q)
    if lse.dtype != lse_dtype:
        _fail(f"lse must be {_dtype(lse_dtype)}, got {_dtype(lse.dtype)}")
    for name, tensor in (("out", out), ("lse", lse)):
        if _is_concrete(tensor) and not tensor.is_contiguous():
            _fail(f"{name} must be contiguous, as the forward returned it")
    if grad_lse is not None:
        _check_shape("grad_lse", grad_lse, lse_shape)
        _check_same_device("grad_lse", grad_lse, "q", q)
        _check_same_dtype("grad_lse", grad_lse, "lse", lse)
    if need_q_freqs and q_freqs is None:
        _fail("need_q_freqs is true, but there are no q_freqs")


def attention_tangents(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    stacked: bool,
) -> Any:
    """Checks the directions of ``attention_jvp`` (``stacked``) and ``attention_double_backward``.

    Returns:
        How many there are of each.

    Raises:
        RuntimeError: With the message of the operation.
    """
    ending = "s" if stacked else ""
    n = None if stacked else 1
    for of, tangent, tensor in (("q", q_tangent, q), ("k", k_tangent, k), ("v", v_tangent, v)):
        if tangent is None:
            continue
        name = f"{of}_tangent{ending}"
        shape = tuple(tensor.shape)
        if stacked:
            _check_rank(name, tangent, 5, "(tangents, batch, tokens, heads, head_dim)")
            n = tangent.shape[0] if n is None else n
            shape = (n, *shape)
        _check_shape(name, tangent, shape)
        _check_same_device(name, tangent, of, tensor)
        _check_same_dtype(name, tangent, of, tensor)
    if q_tangent is None and k_tangent is None and v_tangent is None:
        _fail(f"one of q_tangent{ending}, k_tangent{ending} and v_tangent{ending} must be given, got none")
    return n


def known_value(q: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None) -> bool:
    """Checks the results of the forward that ``attention_jvp`` may be given, and says whether they are.

    Raises:
        RuntimeError: With the message of the operation.
    """
    if (out is None) != (lse is None):
        _fail("out and lse must be given together")
    if out is None or lse is None:
        return False
    attention_backward(out, None, q, v, out, lse, None, False)
    return True


def rope(x_name: str, x: torch.Tensor, freqs: torch.Tensor, freqs_name: str = "freqs") -> None:
    """Checks the arguments of ``rope``, under the names that the caller knows.

    Raises:
        RuntimeError: With the message of the operation.
    """
    _check_rank(x_name, x, 4, "(batch, tokens, heads, head_dim)")
    _check_floating(x_name, x)
    _check_last_axis(x_name, x)
    _check_freqs(freqs_name, freqs, x_name, x)


def rope_backward(grad_out: torch.Tensor, x: torch.Tensor | None, freqs: torch.Tensor, need_freqs: bool) -> None:
    """Checks the arguments of ``rope_backward``.

    Raises:
        RuntimeError: With the message of the operation.
    """
    _check_rank("grad_out", grad_out, 4, "(batch, tokens, heads, head_dim)")
    _check_floating("grad_out", grad_out)
    _check_freqs("freqs", freqs, "grad_out", grad_out)
    if x is None:
        if need_freqs:
            _fail("x must be given when need_freqs is true")
        return
    _check_shape("x", x, grad_out.shape)
    _check_same_device("x", x, "grad_out", grad_out)
    _check_same_dtype("x", x, "grad_out", grad_out)
    _check_last_axis("x", x)


def _known(condition: Any) -> bool:
    """Whether a condition, possibly on symbols, is certainly true. Adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def _same(sizes: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(sizes) == len(expected) and all(_known(a == b) for a, b in zip(sizes, expected, strict=True))


def _is_number(*sizes: Any) -> bool:
    return all(type(size) is int for size in sizes)


def _is_concrete(tensor: torch.Tensor) -> bool:
    return _is_number(*tensor.shape, *tensor.stride())


def _fail(text: str) -> None:
    raise RuntimeError(f"anchor_attention: {text}")


def _shape(sizes: Sequence[Any]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype, str(dtype))


def _check_rank(name: str, tensor: torch.Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank:
        _fail(f"{name} must be {layout}, got {tensor.dim()} axes: {_shape(tensor.shape)}")


def _check_shape(name: str, tensor: torch.Tensor, expected: Sequence[Any], heads_first: bool = False) -> None:
    if tensor.dim() != len(expected) or any(_known(a != b) for a, b in zip(tensor.shape, expected, strict=True)):
        hint = _HEADS_FIRST if heads_first else ""
        _fail(f"{name} must have shape {_shape(expected)}, got {_shape(tensor.shape)}{hint}")


def _check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        _fail(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def _check_same_dtype(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.dtype != other.dtype:
        _fail(f"{name} must have the dtype of {other_name} ({_dtype(other.dtype)}), got {_dtype(tensor.dtype)}")


def _check_floating(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        _fail(f"{name} must be float32, bfloat16, float16 or (on the CPU) float64, got {_dtype(tensor.dtype)}")
    # Shapes may be inferred on "meta" for either.
    if tensor.dtype == torch.float64 and tensor.device.type not in ("cpu", "meta"):
        _fail(f"{name} may be float64 only on the CPU, got it on {tensor.device}")


def _check_last_axis(name: str, tensor: torch.Tensor) -> None:
    if not _is_concrete(tensor) or tensor.numel() == 0 or tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        return
    _fail(f"{name} must be contiguous along its last axis (stride 1), got stride {tensor.stride(-1)}")


def _check_freqs(name: str, freqs: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    batch, tokens, heads, head_dim = other.shape
    _check_rank(name, freqs, 3, "(batch or 1, tokens, head_dim / 2)")
    if _known(head_dim % 2 != 0):
        _fail(f"head_dim must be even to be rotated by {name}, got {head_dim}")
    if _known(freqs.shape[0] != batch) and _known(freqs.shape[0] != 1):
        _fail(f"{name} must have batch size {batch} or 1, got {freqs.shape[0]}")
    expected = (freqs.shape[0], tokens, head_dim // 2)
    _check_shape(name, freqs, expected, _same(freqs.shape[1:2], (heads,)))
    _check_same_device(name, freqs, other_name, other)
    dtype = torch.complex128 if other.dtype == torch.float64 else torch.complex64
    if freqs.dtype != dtype:
        _fail(f"{name} must be {_dtype(dtype)} for {other_name} of {_dtype(other.dtype)}, got {_dtype(freqs.dtype)}")


def _check_table(
    q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int], q: torch.Tensor, k: torch.Tensor
) -> None:
    n_queries, n_keys = q.shape[1], k.shape[1]
    if not _is_number(*q_ranges, *k_offsets, *k_ranges, n_queries, n_keys):
        return
    try:
        torch.ops.anchor_attention.canonical_key_ranges(q_ranges, k_offsets, k_ranges, n_queries, n_keys)
    except (RuntimeError, ValueError) as error:
        heads_first = any(
            n_tokens < max(ranges, default=0) <= tensor.shape[2]
            for n_tokens, ranges, tensor in ((n_queries, q_ranges, q), (n_keys, k_ranges, k))
            if _is_number(tensor.shape[2])
        )
        _fail(f"{error}{_HEADS_FIRST if heads_first else ''}")
