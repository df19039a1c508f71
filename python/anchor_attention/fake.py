"""Fake kernels of ``torch.ops.anchor_attention``: what comes out of tensors without data."""

from __future__ import annotations

import torch

from . import argument_checks
from ._dtypes import working_dtype


@torch.library.register_fake("anchor_attention::attention")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: list[int],
    k_offsets: list[int],
    k_ranges: list[int],
    q_freqs: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    allow_tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    argument_checks.attention(q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale)
    batch, n_queries, heads, _ = q.shape
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((batch, heads, n_queries), dtype=working_dtype(q.dtype))


@torch.library.register_fake("anchor_attention::attention_backward")
def _attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_ranges: list[int],
    k_offsets: list[int],
    k_ranges: list[int],
    q_freqs: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float | None,
    allow_tf32: bool,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_q_freqs: bool,
) -> tuple[torch.Tensor, ...]:
    argument_checks.attention(q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale)
    argument_checks.attention_backward(grad_out, grad_lse, q, v, out, lse, q_freqs, need_q_freqs)

    def grad(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor:
        return tensor.new_empty(tensor.shape) if needed and tensor is not None else q.new_empty(0)

    return grad(q, need_q), grad(k, need_k), grad(v, need_v), grad(q_freqs, need_q_freqs)


@torch.library.register_fake("anchor_attention::attention_jvp")
def _attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    q_tangents: torch.Tensor | None,
    k_tangents: torch.Tensor | None,
    v_tangents: torch.Tensor | None,
    q_ranges: list[int],
    k_offsets: list[int],
    k_ranges: list[int],
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    new_out, new_lse = _attention(q, k, v, q_ranges, k_offsets, k_ranges, None, key_mask, scale)
    n = argument_checks.attention_tangents(q, k, v, q_tangents, k_tangents, v_tangents, stacked=True)
    tangents = (new_out.new_empty((n, *new_out.shape)), new_lse.new_empty((n, *new_lse.shape)))
    if argument_checks.known_value(q, v, out, lse):
        return new_out.new_empty(0), new_lse.new_empty(0), *tangents
    return new_out, new_lse, *tangents


@torch.library.register_fake("anchor_attention::attention_double_backward")
def _attention_double_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    q_ranges: list[int],
    k_offsets: list[int],
    k_ranges: list[int],
    key_mask: torch.Tensor | None,
    scale: float | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[torch.Tensor, ...]:
    argument_checks.attention(q, k, v, q_ranges, k_offsets, k_ranges, None, key_mask, scale)
    argument_checks.attention_tangents(q, k, v, q_tangent, k_tangent, v_tangent, stacked=False)
    argument_checks.attention_backward(grad_out, grad_lse, q, v, out, lse, None, False)
    needs = ((q, need_q), (k, need_k), (v, need_v))
    gradients = [tensor.new_empty(tensor.shape if needed else (0,)) for tensor, needed in needs]
    return q.new_empty((*q.shape[:3], v.shape[3])), lse.new_empty(lse.shape), *gradients


@torch.library.register_fake("anchor_attention::rope")
def _rope(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    argument_checks.rope("x", x, freqs)
    return x.new_empty(x.shape)


@torch.library.register_fake("anchor_attention::rope_backward")
def _rope_backward(
    grad_out: torch.Tensor, x: torch.Tensor | None, freqs: torch.Tensor, need_x: bool, need_freqs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    argument_checks.rope_backward(grad_out, x, freqs, need_freqs)
    return (
        grad_out.new_empty(grad_out.shape if need_x else (0,)),
        freqs.new_empty(freqs.shape if need_freqs else (0,)),
    )
