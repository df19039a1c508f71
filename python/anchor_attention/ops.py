"""Fake kernels and autograd of ``torch.ops.anchor_attention``; the schemas are in csrc/registration.cpp."""

from __future__ import annotations

from typing import Any

import torch

Grads = tuple[torch.Tensor | None, ...]

# Position of the arguments in the schema of `attention`.
_Q, _K, _V, _FREQS = 0, 1, 2, 6


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("anchor_attention::attention")
def _attention_fake(
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
    batch, n_queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, n_queries), dtype=_lse_dtype(q.dtype))


@torch.library.register_fake("anchor_attention::attention_backward")
def _attention_backward_fake(
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
    def grad(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor:
        return tensor.new_empty(tensor.shape) if needed and tensor is not None else q.new_empty(0)

    return grad(q, need_q), grad(k, need_k), grad(v, need_v), grad(q_freqs, need_q_freqs)


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32 = inputs
    ctx.save_for_backward(q, k, v, *output, q_freqs, key_mask)
    ctx.table = (q_ranges, k_offsets, k_ranges)
    ctx.scale = scale
    ctx.allow_tf32 = allow_tf32
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Grads:
    q, k, v, out, lse, q_freqs, key_mask = ctx.saved_tensors
    # The dispatcher leaves out trailing arguments that have their default, so the tuple may end before the freqs.
    needs = [any(ctx.needs_input_grad[i : i + 1]) for i in (_Q, _K, _V, _FREQS)]
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.anchor_attention.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *ctx.table, q_freqs, key_mask, ctx.scale, ctx.allow_tf32, *needs
    )
    grad_q, grad_k, grad_v, grad_q_freqs = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return grad_q, grad_k, grad_v, None, None, None, grad_q_freqs, None, None, None


@torch.library.register_fake("anchor_attention::rope")
def _rope_fake(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("anchor_attention::rope_backward")
def _rope_backward_fake(
    grad_out: torch.Tensor, x: torch.Tensor | None, freqs: torch.Tensor, need_x: bool, need_freqs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        grad_out.new_empty(grad_out.shape if need_x else (0,)),
        freqs.new_empty(freqs.shape if need_freqs else (0,)),
    )


def _rope_setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    x, freqs = inputs
    ctx.save_for_backward(x if freqs.requires_grad else None, freqs)


def _rope_backward(ctx: Any, grad_out: torch.Tensor) -> Grads:
    x, freqs = ctx.saved_tensors
    grads = torch.ops.anchor_attention.rope_backward(grad_out, x, freqs, *ctx.needs_input_grad)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))


def _no_double_backward(name: str) -> Any:
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        raise RuntimeError(f"anchor_attention::{name} has no second derivative: it can't be differentiated twice")

    return backward


torch.library.register_autograd(
    "anchor_attention::attention", _attention_backward, setup_context=_attention_setup_context
)
torch.library.register_autograd("anchor_attention::rope", _rope_backward, setup_context=_rope_setup_context)
for _name in ("attention_backward", "rope_backward"):
    torch.library.register_autograd(f"anchor_attention::{_name}", _no_double_backward(_name))
