"""Autograd of ``torch.ops.anchor_attention``; the schemas are in csrc/registration.cpp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import fake, flops, vmap  # noqa: F401
from .interrupts import raised_by_a_signal

flops.register()

Grads = tuple[torch.Tensor | None, ...]


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32 = inputs
    ctx.save_for_backward(q, k, v, *output, q_freqs, key_mask)
    ctx.table = (q_ranges, k_offsets, k_ranges)
    ctx.scale = scale
    ctx.allow_tf32 = allow_tf32
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Grads:
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    q, k, v, out, lse, q_freqs, key_mask = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    need_q, need_k, need_v, _, _, _, need_q_freqs, _, _, _ = ctx.needs_input_grad
    needs = (need_q, need_k, need_v, need_q_freqs)
    grads = attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *ctx.table, q_freqs, key_mask, ctx.scale, ctx.allow_tf32, *needs
    )
    grad_q, grad_k, grad_v, grad_q_freqs = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return grad_q, grad_k, grad_v, None, None, None, grad_q_freqs, None, None, None


def _rope_setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    x, freqs = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, freqs)


def _rope_backward(ctx: Any, grad_out: torch.Tensor) -> Grads:
    x, freqs = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = rope_backward(grad_out, x, freqs, *needs)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> Grads:
    name = type(ctx).__name__.removesuffix("Backward").removesuffix("Generated")
    raise RuntimeError(f"anchor_attention::{name} has no second derivative: it can't be differentiated twice")


def _is_recorded(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    # Forward mode: the function says that it has none, where the operation alone would lose the tangents.
    return torch.autograd.forward_ad._current_level >= 0


def _make_differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Grads], rule: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers the derivative of an operation and its rule of ``torch.vmap``.

    Not by ``torch.library.register_autograd``, which is slow to call, and whose function ``torch.func`` refuses for
    want of ``setup_context``.

    Returns:
        The operation for calls that are not traced. It takes all arguments of the schema, by position. ``torch.func``
        sees the function before the dispatcher sees the operation, and most of the dispatcher's time is saved.
    """
    operation = getattr(torch.ops.anchor_attention, name).default
    defaults = tuple(argument.default_value for argument in operation._schema.arguments)

    def forward(*args: Any) -> Any:
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return operation(*args)
        except RuntimeError as error:
            raised = raised_by_a_signal(error)
            if raised is None:
                raise
        raise raised from None

    members = {"forward": forward, "setup_context": setup_context, "backward": backward, "vmap": rule}
    function: Any = type(
        name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()}
    )

    # What Function.apply comes to outside of torch.func, without its looking up the signature of `forward` in every
    # call, which takes ten microseconds.
    record = super(torch.autograd.Function, function).apply

    def autograd_kernel(*args: Any) -> Any:
        if not _is_recorded(args):
            return forward(*args)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"torch.func can't differentiate torch.ops.anchor_attention.{name}: "
                "call the function of the package anchor_attention, outside of torch.compile"
            )
        # The dispatcher leaves out trailing arguments that have their default.
        return record(*args, *defaults[len(args) :])

    def call(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return record(*args) if _is_recorded(args) else forward(*args)

    _library.impl(name, autograd_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_vmap(f"anchor_attention::{name}", rule, lib=_library)
    return call


_library = torch.library.Library("anchor_attention", "FRAGMENT")  # type: ignore[no-untyped-call]
attention = _make_differentiable("attention", _attention_setup_context, _attention_backward, vmap.attention)
rope = _make_differentiable("rope", _rope_setup_context, _rope_backward, vmap.rope)
attention_backward = _make_differentiable(
    "attention_backward", _nothing_to_save, _no_second_derivative, vmap.attention_backward
)
rope_backward = _make_differentiable("rope_backward", _nothing_to_save, _no_second_derivative, vmap.rope_backward)
