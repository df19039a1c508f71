"""The functional interface: anchor attention, rotary embedding, merging of partial results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch

from . import _context, ops
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
    scale: float | None = ...,
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
    scale: float | None = ...,
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
    scale: float | None = None,
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
        k: (B, Nk, H, D) keys, on an axis of their own; likewise.
        v: (B, Nk, H, D) values; likewise.
        table: Who reads whom.
        q_freqs: (B or 1, Nq, D / 2) complex64 rotary factors, applied to the interleaved pairs of q in float32.
        k_freqs: (B or 1, Nk, D / 2) complex64, likewise for k.
        key_mask: (B, Nk) bool, True where the key exists.
        scale: Factor of the scores; D^-½ when None.
        return_lse: Whether to return lse as well.

    Returns:
        out (B, Nq, H, D), contiguous, in q's dtype; with ``return_lse`` also lse (B, H, Nq) float32. Dtypes: float32,
        bfloat16, float16; on the CPU also float64 (with complex128 freqs, float64 lse).

    Raises:
        RuntimeError: If a shape, dtype, device, stride or range does not fit; the text names the argument and value.
    """
    q, k, v = _autocast(q, k, v)
    if _context.backend == "reference":
        return anchor_attention_reference(
            q, k, v, table, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask, scale=scale, return_lse=return_lse
        )
    if k_freqs is not None:
        k = rope(k, k_freqs)
    allow_tf32 = q.dtype == torch.float32 and _tf32_is_allowed()
    # A tracer takes the operation into its graph.
    call = torch.ops.anchor_attention.attention.default if torch.compiler.is_compiling() else ops.attention
    out, lse = call(q, k, v, table.q_ranges, table.k_offsets, table.k_ranges, q_freqs, key_mask, scale, allow_tf32)
    return (out, lse) if return_lse else out


def rope(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding: multiplies the interleaved pairs (2i, 2i + 1) of x, as complex numbers, by freqs.

    Args:
        x: (B, N, H, D), any strides with a contiguous last axis; D even.
        freqs: (B or 1, N, D / 2) complex64 (complex128 for float64), arbitrary values, usually of modulus 1.

    Returns:
        (B, N, H, D), contiguous; computed in float32 and rounded to x's dtype.

    Raises:
        RuntimeError: If a shape, dtype, device or stride does not fit.

    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    if _context.backend == "reference":
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
        outs: Parts (B, Nq, H, D).
        lses: Their log-sum-exps (B, H, Nq); −inf where a part had no key.

    Returns:
        (out, lse) of the union (as multisets) of the key sets.

    Raises:
        ValueError: If there is no part or the numbers of outs and lses differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many, at least one, got {len(outs)} and {len(lses)}")
    stacked = torch.stack(tuple(lses))
    lse = torch.logsumexp(stacked, dim=0)
    reachable = lse > -torch.inf
    weights = torch.exp(stacked - torch.where(reachable, lse, 0.0))
    weights = weights.transpose(-1, -2).unsqueeze(-1)
    out = (torch.stack(tuple(outs)).to(weights.dtype) * weights).sum(0).to(outs[0].dtype)
    return out, lse


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
