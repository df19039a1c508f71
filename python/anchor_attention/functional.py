"""The functional interface: anchor attention, rotary embedding, merging of partial results."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch

from . import _context, argument_checks, ops
from .key_range_table import KeyRangeTable
from .reference import anchor_attention_reference, rope_reference

BACKENDS = ("fused", "reference")
BACKEND_VARIABLE = "ANCHOR_ATTENTION_BACKEND"


def _checked_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    return name


_context.DEFAULT_BACKEND = _checked_backend(os.environ.get(BACKEND_VARIABLE, _context.DEFAULT_BACKEND))


def __getattr__(name: str) -> Any:
    if name == "_backend":
        return _context.backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the functional calls inside the ``with`` block, those of the modules included, on a back-end.

    ``"fused"`` (the default) is the compiled operation, ``"reference"`` plain PyTorch. The block acts on its own thread
    (its own task under asyncio) and ends with it; in a generator, while the generator runs. The environment variable
    ``ANCHOR_ATTENTION_BACKEND`` chooses for the whole process.

    Raises:
        ValueError: If there is no such back-end.
    """
    with _context.BackendBlock(_checked_backend(name)):
        yield


@overload
def anchor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    *,
    q_freqs: torch.Tensor | None = ...,
    k_freqs: torch.Tensor | None = ...,
    key_mask: torch.Tensor | None = ...,
    scale: float | torch.Tensor | None = ...,
    allow_uncovered: bool = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def anchor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    *,
    q_freqs: torch.Tensor | None = ...,
    k_freqs: torch.Tensor | None = ...,
    key_mask: torch.Tensor | None = ...,
    scale: float | torch.Tensor | None = ...,
    allow_uncovered: bool = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def anchor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    *,
    q_freqs: torch.Tensor | None = None,
    k_freqs: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | torch.Tensor | None = None,
    allow_uncovered: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which every group of queries reads its own ranges of keys.

    For every entry of the table, query i in its range and head h, with K the keys that the entry names and
    ``key_mask`` keeps::

        s_ij   = scale · <R_i q_i, R_j k_j>
        out[i] = Σ_{j∈K} softmax_j(s_ij) v_j        lse[i] = log Σ_{j∈K} exp(s_ij)

    Queries without keys get out 0, lse −inf and zero gradients. Gradients flow to q, k, v and the freqs, also from lse.
    Under ``torch.autocast`` q, k and v are cast to the autocast dtype. float32 is computed to float32's accuracy, on a
    GPU too, unless ``torch.set_float32_matmul_precision`` allows less.

    Args:
        q: (B, Nq, H, D) queries. Any strides with a contiguous last axis are read in place.
        k: (B, Nk, Hk, D) keys, on an axis of their own; likewise. Hk is H or divides it: head h reads head
            h // (H / Hk), in place.
        v: (B, Nk, Hk, Dv) values, whose size may differ from that of queries and keys; likewise. On a GPU D and Dv
            are multiples of 8 up to 256.
        table: Who reads whom.
        q_freqs: (B or 1, Nq, D / 2) complex64 rotary factors, applied to the interleaved pairs of q in float32.
        k_freqs: (B or 1, Nk, D / 2) complex64, likewise for k. With float64 q and k, both are complex128, and complex64
            is converted.
        key_mask: (B, Nk) bool, True where the key exists.
        scale: Factor of the scores; D^-½ when None. A real tensor of one element, which may be learnt, is multiplied
            into q.
        allow_uncovered: Whether the table may leave queries without a key. With False they are an error (and under
            ``torch.compile`` a guard on the table).
        return_lse: Whether to return lse as well.

    Returns:
        out (B, Nq, H, Dv), contiguous, in q's dtype; with ``return_lse`` also lse (B, H, Nq) float32. Dtypes: float32,
        bfloat16, float16; on the CPU also float64 (with complex128 freqs, float64 lse).

    Raises:
        RuntimeError: If a shape, dtype, device, stride or range does not fit; the message names the argument and value.
        ValueError: If an argument is of another type, or a query reads no key where that is not allowed.
    """
    _check_types(table, q=q, k=k, v=v, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask)
    if not torch.compiler.is_compiling() and torch.overrides.has_torch_function((q, k, v)):
        # A subclass of Tensor that stands for something else, as one part of a distributed tensor.
        public: Any = anchor_attention
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = torch.overrides.handle_torch_function(
            public,
            (q, k, v),
            q,
            k,
            v,
            table,
            q_freqs=q_freqs,
            k_freqs=k_freqs,
            key_mask=key_mask,
            scale=scale,
            allow_uncovered=allow_uncovered,
            return_lse=return_lse,
        )
        return result
    if not allow_uncovered:
        table.check_coverage(q.shape[1])
    q, k, v = _autocast(q, k, v)
    if isinstance(scale, torch.Tensor):
        q, scale = _scaled(q, scale), 1.0
    if q.dtype == torch.float64:
        q_freqs, k_freqs = _widened(q_freqs), _widened(k_freqs)
    if _context.backend == "reference":
        return _checked_reference(
            q, k, v, table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask, scale=scale, return_lse=return_lse
        )
    if k_freqs is not None:
        k = _rotated_keys(k, k_freqs)
    allow_tf32 = q.dtype == torch.float32 and _tf32_is_allowed()
    # A tracer takes the operation into its graph.
    is_traced = torch.compiler.is_compiling()
    call: Callable[..., Any] = torch.ops.anchor_attention.attention.default if is_traced else ops.attention
    ranges = table.padded_ranges if is_traced else (table.q_ranges, table.k_offsets, table.k_ranges)
    out, lse = call(q, k, v, *ranges, q_freqs, key_mask, scale, allow_tf32)
    return (out, lse) if return_lse else out


def anchor_attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    q_tangents: torch.Tensor | None = None,
    k_tangents: torch.Tensor | None = None,
    v_tangents: torch.Tensor | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention together with its derivatives along given directions, which share scores and probabilities with it.

    Computes what ``torch.func.jvp`` of :func:`anchor_attention` does, but for several tangents in one pass, and as a
    plain function, which ``torch.compile`` accepts. With directions (a, b, c) of (q, k, v), P the probabilities of a
    row and T = scale · (<a, k> + <q, b>)::

        tangent of out = Σ_j P_j (T_j − r) v_j + P_j c_j        tangent of lse = r = Σ_j P_j T_j

    If q and k are to be rotated, rotate them and their tangents first (:func:`rope`). Results can be differentiated
    once more, in reverse mode. Queries without keys have zero derivatives. Under ``torch.autocast`` all
    tensors are cast to the autocast dtype.

    Args:
        q: (B, Nq, H, D) queries, as :func:`anchor_attention` takes them; k, v, table and key_mask likewise.
        k: (B, Nk, Hk, D) keys.
        v: (B, Nk, Hk, Dv) values.
        table: Who reads whom.
        q_tangents: (n, B, Nq, H, D), one direction after the other, in q's dtype. None stands for zeros; one of the
            three must be given.
        k_tangents: (n, B, Nk, Hk, D).
        v_tangents: (n, B, Nk, Hk, Dv).
        key_mask: (B, Nk) bool, True where the key exists.
        scale: Factor of the scores; D^-½ when None.

    Returns:
        out (B, Nq, H, Dv), lse (B, H, Nq), and the tangents of both, (n, B, Nq, H, Dv) and (n, B, H, Nq); dtypes as
        those of :func:`anchor_attention`.

    Raises:
        RuntimeError: If a shape, dtype, device, stride or range does not fit; the message names the argument and value.
        ValueError: If an argument is of another type.
    """
    tangents = (q_tangents, k_tangents, v_tangents)
    names = ("q_tangents", "k_tangents", "v_tangents")
    _check_types(table, q=q, k=k, v=v, **dict(zip(names, tangents, strict=True)), key_mask=key_mask)
    q, k, v = _autocast(q, k, v)
    q_tangents, k_tangents, v_tangents = (None if tangent is None else _autocast(tangent)[0] for tangent in tangents)
    is_traced = torch.compiler.is_compiling()
    ranges = table.padded_ranges if is_traced else (table.q_ranges, table.k_offsets, table.k_ranges)
    if _context.backend == "reference":
        argument_checks.attention(q, k, v, *ranges, None, key_mask, scale)
        argument_checks.attention_tangents(q, k, v, q_tangents, k_tangents, v_tangents, stacked=True)
        tangents = (q_tangents, k_tangents, v_tangents)
        return _reference_jvp(q, k, v, table, tangents, key_mask=key_mask, scale=scale)
    call: Callable[..., Any] = torch.ops.anchor_attention.attention_jvp.default if is_traced else ops.attention_jvp
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = call(
        q, k, v, None, None, q_tangents, k_tangents, v_tangents, *ranges, key_mask, scale
    )
    return results


def rope(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: multiplies the interleaved pairs (2i, 2i + 1) of x, as complex numbers, by freqs.

    Args:
        x: (B, N, H, D), any strides with a contiguous last axis; D even.
        freqs: (B or 1, N, D / 2) complex64 (for float64 complex128, or complex64 to be converted), arbitrary values,
            usually of modulus 1.

    Returns:
        (B, N, H, D), contiguous; computed in float32 and rounded to x's dtype.

    Raises:
        RuntimeError: If a shape, dtype, device or stride does not fit.

    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    for name, tensor in (("x", x), ("freqs", freqs)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor)!r}")
    if x.dtype == torch.float64 and freqs.dtype == torch.complex64:
        freqs = freqs.to(torch.complex128)
    if _context.backend == "reference":
        if not torch.compiler.is_compiling():
            argument_checks.rope("x", x, freqs)
        return rope_reference(x, freqs)
    call = torch.ops.anchor_attention.rope.default if torch.compiler.is_compiling() else ops.rope
    rotated: torch.Tensor = call(x, freqs)
    return rotated


def merge_attention(
    outs: list[torch.Tensor] | tuple[torch.Tensor, ...], lses: list[torch.Tensor] | tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the attention of the same queries to several sets of keys into the attention to all of them.

    Differentiable, so parts of the keys can live on other devices and still be trained.

    Args:
        outs: Parts (B, Nq, H, Dv).
        lses: Their log-sum-exps (B, H, Nq); −inf where a part had no key.

    Returns:
        (out, lse) of the union (as multisets) of the key sets.

    Raises:
        ValueError: If there is no part, the numbers of outs and lses differ, or a part has another type or shape.
    """
    if isinstance(outs, torch.Tensor) or isinstance(lses, torch.Tensor):
        raise ValueError("outs and lses must be lists or tuples of tensors, one of each for each part, got a tensor")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must have the same length, at least 1, got {len(outs)} and {len(lses)}")
    for name, parts, rank in (("outs", outs, 4), ("lses", lses, 3)):
        for i, part in enumerate(parts):
            if not isinstance(part, torch.Tensor):
                raise ValueError(f"{name}[{i}] must be a torch.Tensor, got {type(part)!r}")
            if part.dim() != rank:
                raise ValueError(f"{name}[{i}] must have {rank} axes, got shape {tuple(part.shape)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        batch, n_queries, heads, head_dim = outs[0].shape
        if out.shape != (batch, n_queries, heads, head_dim) or lse.shape != (batch, heads, n_queries):
            raise ValueError(
                f"outs[{i}] and lses[{i}] must have shapes {(batch, n_queries, heads, head_dim)} and "
                f"{(batch, heads, n_queries)}, got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    stacked = torch.stack(tuple(lses))
    # Where no part has a key, 0 replaces −inf in between: the derivative of logsumexp would be NaN there.
    reachable = (stacked != -torch.inf).any(dim=0)
    lse = torch.logsumexp(torch.where(reachable, stacked, 0.0), dim=0)
    weights = torch.exp(stacked - lse).transpose(-1, -2).unsqueeze(-1)
    out = (torch.stack(tuple(outs)).to(weights.dtype) * weights).sum(0).to(outs[0].dtype)
    return out, torch.where(reachable, lse, -torch.inf)


def _check_types(table: KeyRangeTable, **tensors: torch.Tensor | None) -> None:
    if not isinstance(table, KeyRangeTable):
        kind = f"a tensor of shape {tuple(table.shape)}" if isinstance(table, torch.Tensor) else repr(type(table))
        raise ValueError(
            "table must be a KeyRangeTable, as KeyRangeTable.from_ranges makes of rows and converters.from_dense of a "
            f"mask, got {kind}"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name in ("q", "k", "v")):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor)!r}")


def _scaled(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q times a factor of the scores, which gets its gradient through q."""
    if scale.numel() != 1:
        raise ValueError(
            f"scale must be a number or a tensor of one element, got shape {tuple(scale.shape)}: "
            "multiply q by factors of heads or tokens"
        )
    if scale.is_complex():
        raise ValueError(f"scale must be real, got a tensor of {scale.dtype}")
    # As everywhere in torch, a number in the host's memory may be a factor on a GPU.
    if scale.device != q.device and not scale.is_cpu:
        raise ValueError(f"scale must be on the device of q ({q.device}) or the CPU, got {scale.device}")
    return (q * scale.reshape(())).to(q.dtype)


def _widened(freqs: torch.Tensor | None) -> torch.Tensor | None:
    return freqs.to(torch.complex128) if freqs is not None and freqs.dtype == torch.complex64 else freqs


def _rotated_keys(k: torch.Tensor, k_freqs: torch.Tensor) -> torch.Tensor:
    try:
        return rope(k, k_freqs)
    except RuntimeError as error:
        text = str(error)
        if not text.startswith("anchor_attention: "):
            raise
        # The operation knows them by the names of its own arguments.
        raise RuntimeError(re.sub(r"\bx\b", "k", re.sub(r"\bfreqs\b", "k_freqs", text))) from None


def _checked_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: KeyRangeTable, **keywords: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Refuses what the operation refuses, with the same message."""
    if not torch.compiler.is_compiling():
        q_freqs, k_freqs = keywords["q_freqs"], keywords["k_freqs"]
        ranges = (table.q_ranges, table.k_offsets, table.k_ranges)
        argument_checks.attention(q, k, v, *ranges, q_freqs, keywords["key_mask"], keywords["scale"])
        if k_freqs is not None:
            argument_checks.rope("k", k, k_freqs, "k_freqs")
    return anchor_attention_reference(q, k, v, table, **keywords)


def _reference_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    tangents: tuple[torch.Tensor | None, ...],
    **keywords: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = anchor_attention_reference(q, k, v, table, **keywords, return_lse=True)
        return out, lse

    out, lse = attend(q, k, v)
    moved = []
    for i in range(next(len(tangent) for tangent in tangents if tangent is not None)):
        pairs = zip((q, k, v), tangents, strict=True)
        directions = tuple(torch.zeros_like(x) if tangent is None else tangent[i] for x, tangent in pairs)
        moved.append(torch.func.jvp(attend, (q, k, v), directions)[1])
    out_tangents, lse_tangents = (torch.stack(parts) for parts in zip(*moved, strict=True))
    # The jvp of a constant −inf may come out as anything.
    return out, lse, out_tangents, lse_tangents.masked_fill(lse == -torch.inf, 0.0)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device_type = tensors[0].device.type
    # On "meta", where shapes are inferred, the question itself is an error.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    # As autocast itself does: float64 was asked for on purpose and stays.
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _tf32_is_allowed() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


# As torch.compiler.assume_constant_result does, but without importing the compiler at start-up: the precision is a
# setting of the process, and torch.compile guards on it itself.
_tf32_is_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]
