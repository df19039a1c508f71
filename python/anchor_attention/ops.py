"""Autograd of ``torch.ops.anchor_attention``, forward and reverse; the schemas are in csrc/registration.cpp.

Derivatives of derivatives are operations, too (docs/derivatives.md): the derivative of the attention's tangent, and
that of its gradient, is the second derivative, ``attention_double_backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import fake, flops, vmap  # noqa: F401
from .interrupts import raised_by_a_signal

flops.register()

Grads = tuple[torch.Tensor | None, ...]


def _save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    # Only if needed: what is saved for forward mode lives as long as the context.
    if _has_forward_mode():
        ctx.save_for_forward(*tensors)


def _has_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, without wrappers of a level that has ended, as when the function from ``torch.func.vjp`` runs.

    Function.apply would remove them, but it is not what records our calls.
    """
    unwrap = torch._C._functorch.unwrap_if_dead
    return tuple(None if tensor is None else unwrap(tensor) for tensor in ctx.saved_tensors)


def _primals(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, without their tangents, which would turn a tangent into an unwanted second derivative."""
    if torch._C._are_functorch_transforms_active():
        # The levels of torch.func separate them.
        return _saved(ctx)
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return tuple(None if tensor is None else unpack(tensor).primal for tensor in ctx.saved_tensors)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Tangents and gradients come in any layout, expanded ones included."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sum(*terms: torch.Tensor | None) -> torch.Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _tangent(tensor: torch.Tensor | None, like: torch.Tensor, needed: bool) -> torch.Tensor:
    """The tangent of an output: zeros if nothing moves it, empty if it is not needed."""
    return like.new_zeros(like.shape if needed else 0) if tensor is None else tensor


def _only(results: tuple[torch.Tensor, ...], needs: tuple[bool, ...]) -> Grads:
    return tuple(result if needed else None for result, needed in zip(results, needs, strict=True))


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32 = inputs
    _save(ctx, q, k, v, *output, q_freqs, key_mask)
    ctx.table = (q_ranges, k_offsets, k_ranges)
    ctx.scale = scale
    ctx.allow_tf32 = allow_tf32
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> Grads:
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    q, k, v, out, lse, q_freqs, key_mask = _saved(ctx)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    need_q, need_k, need_v, _, _, _, need_q_freqs, _, _, _ = ctx.needs_input_grad
    needs = (need_q, need_k, need_v, need_q_freqs)
    if q_freqs is not None and (torch.is_grad_enabled() or _has_forward_mode()):
        # The gradient may be differentiated in turn: then the rotation is a step of its own, with its own derivatives.
        rotated = rope(q, q_freqs)
        needs = (need_q or need_q_freqs, need_k, need_v, False)
        grads = attention_backward(
            grad_out, grad_lse, rotated, k, v, out, lse, *ctx.table, None, key_mask, ctx.scale, ctx.allow_tf32, *needs
        )
        grad_rotated, grad_k, grad_v, _ = _only(grads, needs)
        grad_q = grad_q_freqs = None
        if grad_rotated is not None:
            of_rotation = rope_backward(grad_rotated, q, q_freqs, need_q, need_q_freqs)
            grad_q, grad_q_freqs = _only(of_rotation, (need_q, need_q_freqs))
    else:
        grads = attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *ctx.table, q_freqs, key_mask, ctx.scale, ctx.allow_tf32, *needs
        )
        grad_q, grad_k, grad_v, grad_q_freqs = _only(grads, needs)
    return grad_q, grad_k, grad_v, None, None, None, grad_q_freqs, None, None, None


def _attention_tangent(ctx: Any, *input_tangents: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, out, lse, q_freqs, key_mask = _primals(ctx)
    q_tangent, k_tangent, v_tangent, _, _, _, freqs_tangent, _, _, _ = input_tangents
    if q_freqs is not None:
        q_tangent = _rotation_tangent(q, q_freqs, q_tangent, freqs_tangent)
        q = rope(q, q_freqs)
    # To the CPU's kernels, whose sums are more exact, an output that was rounded to 16 bits is not what they centre on.
    known = (None, None) if q.dtype.itemsize == 2 and q.device.type == "cpu" else (out, lse)
    tangents = (None if tangent is None else tangent.unsqueeze(0) for tangent in (q_tangent, k_tangent, v_tangent))
    _, _, out_tangents, lse_tangents = attention_jvp(q, k, v, *known, *tangents, *ctx.table, key_mask, ctx.scale)
    return out_tangents.squeeze(0), lse_tangents.squeeze(0)


def _attention_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q_freqs, key_mask, ctx.scale, ctx.allow_tf32 = inputs[10:14]
    ctx.rotates = q_freqs is not None
    if ctx.rotates:
        return
    _save(ctx, *inputs[:7], key_mask)
    ctx.table = inputs[7:10]
    ctx.needs = inputs[14:17]
    ctx.set_materialize_grads(False)


def _refuse_rotation(ctx: Any) -> None:
    if ctx.rotates:
        raise RuntimeError(
            "anchor_attention::attention_backward with q_freqs has no derivative of its own: call it with rotated q, "
            "or differentiate the functions of the package anchor_attention"
        )


def _attention_second(
    ctx: Any, saved: tuple[Any, ...], *directions: torch.Tensor | None, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, ...]:
    """The second derivative along directions of q, k and v."""
    grad_out, grad_lse, q, k, v, out, lse, key_mask = saved
    results: tuple[torch.Tensor, ...] = attention_double_backward(
        grad_out, grad_lse, q, k, v, out, lse, *directions, *ctx.table, key_mask, ctx.scale, *needs
    )
    return results


# out and lse are functions of q, k and v: what depends on them is part of the derivative with respect to q, k and v.
def _attention_double_backward(ctx: Any, *grads: torch.Tensor | None) -> Grads:
    _refuse_rotation(ctx)
    directions = grads[:3]
    if all(direction is None for direction in directions):
        return (None,) * 18
    needs = tuple(ctx.needs_input_grad[2:5])
    out_tangent, lse_tangent, *second = _attention_second(ctx, _saved(ctx), *directions, needs=needs)
    has_grad_lse = ctx.saved_tensors[1] is not None
    return (out_tangent, lse_tangent if has_grad_lse else None, *_only(tuple(second), needs), *(None,) * 13)


def _attention_backward_tangent(ctx: Any, *input_tangents: Any) -> Grads:
    _refuse_rotation(ctx)
    grad_out_tangent, grad_lse_tangent, *directions = input_tangents[:5]
    saved = _primals(ctx)
    grad_out, _, q, k, v, out, lse, key_mask = saved
    linear: Grads = (None, None, None)
    second: Grads = (None, None, None)
    if grad_out_tangent is not None or grad_lse_tangent is not None:
        if grad_out_tangent is None:
            grad_out_tangent = torch.zeros_like(grad_out)
        results = attention_backward(
            grad_out_tangent, grad_lse_tangent, q, k, v, out, lse, *ctx.table, None, key_mask, ctx.scale,
            ctx.allow_tf32, *ctx.needs, False,
        )  # fmt: skip
        linear = _only(results[:3], ctx.needs)
    if any(direction is not None for direction in directions):
        second = _only(_attention_second(ctx, saved, *directions, needs=ctx.needs)[2:], ctx.needs)
    gradients = zip(linear, second, (q, k, v), ctx.needs, strict=True)
    return *(_tangent(_sum(*terms), like, needed) for *terms, like, needed in gradients), q.new_zeros(0)


def _attention_jvp_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, out, lse, *tangents, q_ranges, k_offsets, k_ranges, key_mask, scale = inputs
    ctx.returns_value = out is None
    _save(ctx, q, k, v, *(output[:2] if ctx.returns_value else (out, lse)), *tangents, key_mask)
    ctx.table = (q_ranges, k_offsets, k_ranges)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _attention_jvp_backward(
    ctx: Any,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_out_tangents: torch.Tensor | None,
    grad_lse_tangents: torch.Tensor | None,
) -> Grads:
    q, k, v, out, lse, *tangents, key_mask = _saved(ctx)
    needs = tuple(ctx.needs_input_grad[:3])
    tangent_needs = tuple(ctx.needs_input_grad[5:8])
    sums: Grads = (None, None, None)
    of_tangents: list[Grads] = []

    def gradients(of_out: torch.Tensor | None, of_lse: torch.Tensor | None, needs: tuple[bool, ...]) -> Grads:
        of_out = torch.zeros_like(out) if of_out is None else of_out
        arguments = (of_out, of_lse, q, k, v, out, lse, *ctx.table, None, key_mask, ctx.scale, False, *needs, False)
        return _only(attention_backward(*arguments)[:3], needs)

    if ctx.returns_value and (grad_out is not None or grad_lse is not None) and any(needs):
        sums = gradients(grad_out, grad_lse, needs)
    if grad_out_tangents is not None or grad_lse_tangents is not None:
        for i in range(next(len(tangent) for tangent in tangents if tangent is not None)):
            of_out = torch.zeros_like(out) if grad_out_tangents is None else grad_out_tangents[i]
            of_lse = None if grad_lse_tangents is None else grad_lse_tangents[i]
            if any(needs):
                directions = (None if tangent is None else tangent[i] for tangent in tangents)
                second = attention_double_backward(
                    of_out, of_lse, q, k, v, out, lse, *directions, *ctx.table, key_mask, ctx.scale, *needs
                )
                sums = tuple(_sum(*terms) for terms in zip(sums, _only(second[2:], needs), strict=True))
            if any(tangent_needs):
                of_tangents.append(gradients(of_out, of_lse, tangent_needs))
    stacked = [
        torch.stack([grads[j] for grads in of_tangents]) if needed and of_tangents else None  # type: ignore[misc]
        for j, needed in enumerate(tangent_needs)
    ]
    return (*sums, None, None, *stacked, *(None,) * 5)


def _no_further_forward_mode(ctx: Any, *tangents: Any) -> Grads:
    raise RuntimeError(
        "anchor_attention: forward mode can't be applied to forward mode: use jvp of grad, or grad of jvp, or "
        'use_backend("reference")'
    )


def _rotation_tangent(
    x: torch.Tensor, freqs: torch.Tensor, x_tangent: torch.Tensor | None, freqs_tangent: torch.Tensor | None
) -> torch.Tensor | None:
    of_x = None if x_tangent is None else rope(_readable(x_tangent), freqs)
    return _sum(of_x, None if freqs_tangent is None else rope(x, freqs_tangent))


def _rope_setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    x, freqs = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, freqs)
    if _has_forward_mode():
        ctx.save_for_forward(x, freqs)
    ctx.set_materialize_grads(False)


def _rope_backward(ctx: Any, grad_out: torch.Tensor | None) -> Grads:
    if grad_out is None:
        return None, None
    x, freqs = _saved(ctx)
    needs = ctx.needs_input_grad
    return _only(rope_backward(grad_out, x, freqs, *needs), needs)


def _rope_tangent(ctx: Any, x_tangent: torch.Tensor | None, freqs_tangent: torch.Tensor | None) -> Any:
    x, freqs = _primals(ctx)
    return _rotation_tangent(x, freqs, x_tangent, freqs_tangent)


def _rope_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, need_x, need_freqs = inputs
    _save(ctx, *tensors)
    ctx.needs = (need_x, need_freqs)
    ctx.set_materialize_grads(False)


# grad_x = grad_out · conj(freqs) and grad_freqs = Σ grad_out · conj(x) are linear in each of their factors.
def _rope_double_backward(ctx: Any, of_x: torch.Tensor | None, of_freqs: torch.Tensor | None) -> Grads:
    grad_out, x, freqs = _saved(ctx)
    need_grad_out, need_x, need_freqs = ctx.needs_input_grad[:3]
    of_grad_out = by_x = by_freqs = None
    if need_grad_out and (of_x is not None or of_freqs is not None):
        rotated = None if of_x is None else rope(_readable(of_x), freqs)
        of_grad_out = _sum(rotated, None if of_freqs is None else rope(x, of_freqs))
    if need_x and of_freqs is not None:
        by_x = rope_backward(grad_out, None, of_freqs, True, False)[0]
    if need_freqs and of_x is not None:
        by_freqs = rope_backward(grad_out, _readable(of_x), freqs, False, True)[1]
    return of_grad_out, by_x, by_freqs, None, None


def _rope_backward_tangent(ctx: Any, *input_tangents: Any) -> Grads:
    grad_out, x, freqs = _primals(ctx)
    grad_out_tangent, x_tangent, freqs_tangent = input_tangents[:3]
    need_x, need_freqs = ctx.needs
    of_x: list[torch.Tensor] = []
    of_freqs: list[torch.Tensor] = []
    if grad_out_tangent is not None:
        grad_x, grad_freqs = rope_backward(grad_out_tangent, x, freqs, need_x, need_freqs)
        of_x, of_freqs = [grad_x], [grad_freqs]
    if need_x and freqs_tangent is not None:
        of_x.append(rope_backward(grad_out, None, freqs_tangent, True, False)[0])
    if need_freqs and x_tangent is not None:
        of_freqs.append(rope_backward(grad_out, _readable(x_tangent), freqs, False, True)[1])
    return (
        _tangent(_sum(*of_x) if need_x else None, grad_out, need_x),
        _tangent(_sum(*of_freqs) if need_freqs else None, freqs, need_freqs),
    )


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    pass


def _no_third_derivative(ctx: Any, *grads: Any) -> Grads:
    raise RuntimeError(
        "anchor_attention::attention_double_backward can't be differentiated: there is no third derivative; "
        'use_backend("reference") has derivatives of every order'
    )


def _is_recorded(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                return True
    return torch.autograd.forward_ad._current_level >= 0


def _make_differentiable(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Grads],
    jvp: Callable[..., Grads],
    rule: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers the derivatives of an operation and its rule of ``torch.vmap``.

    ``torch.library.register_autograd`` is not used: it is slow to call, and ``torch.func`` refuses its function, which
    lacks ``setup_context``.

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

    def mapped(*args: Any) -> Any:
        return rule(call, *args)

    def mapped_operation(*args: Any) -> Any:
        return rule(operation, *args)

    members = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": jvp,
        "vmap": mapped,
    }
    function: Any = type(
        name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()}
    )

    # What Function.apply does outside torch.func, except for looking up the signature of `forward` in every call,
    # which takes ten microseconds.
    record = super(torch.autograd.Function, function).apply

    def autograd_kernel(*args: Any) -> Any:
        if not _is_recorded(args):
            return forward(*args)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"torch.func can't differentiate torch.ops.anchor_attention.{name}: "
                "call the function of the package anchor_attention, outside torch.compile"
            )
        # The dispatcher leaves out trailing arguments that have their default.
        return record(*args, *defaults[len(args) :])

    def call(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return record(*args) if _is_recorded(args) else forward(*args)

    _library.impl(name, autograd_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_vmap(f"anchor_attention::{name}", mapped_operation, lib=_library)
    return call


_library = torch.library.Library("anchor_attention", "FRAGMENT")  # type: ignore[no-untyped-call]
attention = _make_differentiable(
    "attention", _attention_setup_context, _attention_backward, _attention_tangent, vmap.attention
)
attention_backward = _make_differentiable(
    "attention_backward",
    _attention_backward_setup_context,
    _attention_double_backward,
    _attention_backward_tangent,
    vmap.attention_backward,
)
attention_jvp = _make_differentiable(
    "attention_jvp",
    _attention_jvp_setup_context,
    _attention_jvp_backward,
    _no_further_forward_mode,
    vmap.attention_jvp,
)
attention_double_backward = _make_differentiable(
    "attention_double_backward",
    _nothing_to_save,
    _no_third_derivative,
    _no_third_derivative,
    vmap.attention_double_backward,
)
rope = _make_differentiable("rope", _rope_setup_context, _rope_backward, _rope_tangent, vmap.rope)
rope_backward = _make_differentiable(
    "rope_backward",
    _rope_backward_setup_context,
    _rope_double_backward,
    _rope_backward_tangent,
    vmap.rope_backward,
)
