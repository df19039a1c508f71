"""Rules of ``torch.vmap``: the mapped axis becomes part of the batch axis, and one call serves all samples.

Each rule is given the function to call: outside the dispatcher that is the differentiable function, which the enclosing
transforms see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[..., Any]
Dims = Sequence[Any]


def attention(call: Call, info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
    """The rule of ``attention``, with the arguments that ``torch.library.register_vmap`` passes."""
    q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32 = _with_defaults(
        args, 6, None, None, None, False
    )
    q_dim, k_dim, v_dim, *_, freqs_dim, mask_dim, _, _ = _with_defaults(in_dims, 6, None, None, None, None)
    n = info.batch_size
    q = _fold(q, q_dim, n)
    out, lse = call(
        q,
        _fold(k, k_dim, n),
        _fold(v, v_dim, n),
        q_ranges,
        k_offsets,
        k_ranges,
        _fold_freqs(q_freqs, freqs_dim, n, q.shape[0]),
        _fold(key_mask, mask_dim, n),
        scale,
        allow_tf32,
    )
    return (_unfold(out, n), _unfold(lse, n)), (0, 0)


def attention_backward(
    call: Call, info: Any, in_dims: Dims, *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """The rule of ``attention_backward``: gradients for each sample, even of tensors that the samples share."""
    *tensors, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32, need_q, need_k, need_v, need_f = args
    n = info.batch_size
    grad_out, grad_lse, q, k, v, out, lse = (
        _fold(tensor, dim, n) for tensor, dim in zip(tensors, in_dims, strict=False)
    )
    freqs_dim, mask_dim = in_dims[10], in_dims[11]
    grads = call(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out.contiguous(),
        lse.contiguous(),
        q_ranges,
        k_offsets,
        k_ranges,
        _fold_freqs(q_freqs, freqs_dim, n, q.shape[0], separate=need_f),
        _fold(key_mask, mask_dim, n),
        scale,
        allow_tf32,
        need_q,
        need_k,
        need_v,
        need_f,
    )
    needs = (need_q, need_k, need_v, need_f)
    unfolded = [_unfold(grad, n) if needed else grad for grad, needed in zip(grads, needs, strict=True)]
    if need_f:
        unfolded[3] = _sum_shared(unfolded[3], q_freqs, freqs_dim)
    return tuple(unfolded), tuple(0 if needed else None for needed in needs)


def attention_jvp(
    call: Call, info: Any, in_dims: Dims, *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """The rule of ``attention_jvp``: mapped tangents of shared tensors become further tangents of one call."""
    q, k, v, out, lse, *rest = _with_defaults(args, 11, None, None)
    tangents, table, (key_mask, scale) = rest[:3], rest[3:6], rest[6:]
    dims = _with_defaults(in_dims, 11, None, None)
    n, tangent_dims, mask_dim = info.batch_size, dims[5:8], dims[11]
    if all(dim is None for dim in (*dims[:5], mask_dim)):
        more = [_fold(tangent, dim, n) for tangent, dim in zip(tangents, tangent_dims, strict=True)]
        results = call(q, k, v, out, lse, *more, *table, key_mask, scale)
        return (*results[:2], *(_unfold(result, n) for result in results[2:])), (None, None, 0, 0)
    q, k, v, out, lse = (_fold(tensor, dim, n) for tensor, dim in zip((q, k, v, out, lse), dims, strict=False))
    if out is not None and lse is not None:
        out, lse = out.contiguous(), lse.contiguous()
    folded = [
        None if tangent is None else _flattened(_mapped_first(tangent, dim, n).transpose(0, 1), 1)
        for tangent, dim in zip(tangents, tangent_dims, strict=True)
    ]
    results = call(q, k, v, out, lse, *folded, *table, _fold(key_mask, mask_dim, n), scale)
    moved = tuple(result.view(len(result), n, -1, *result.shape[2:]) for result in results[2:])
    if out is not None:
        return (*results[:2], *moved), (None, None, 1, 1)
    return (_unfold(results[0], n), _unfold(results[1], n), *moved), (0, 0, 1, 1)


def attention_double_backward(
    call: Call, info: Any, in_dims: Dims, *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """The rule of ``attention_double_backward``: results for each sample, even for tensors that the samples share."""
    n, mask_dim = info.batch_size, in_dims[13]
    tensors = [_fold(tensor, dim, n) for tensor, dim in zip(args[:10], in_dims, strict=False)]
    tensors[5:7] = (tensor.contiguous() for tensor in tensors[5:7])
    results = call(*tensors, *args[10:13], _fold(args[13], mask_dim, n), *args[14:])
    needs = (True, True, *args[15:18])
    unfolded = tuple(_unfold(result, n) if need else result for result, need in zip(results, needs, strict=True))
    return unfolded, tuple(0 if need else None for need in needs)


def rope(call: Call, info: Any, in_dims: Dims, x: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rule of ``rope``."""
    n = info.batch_size
    x = _fold(x, in_dims[0], n)
    return _unfold(call(x, _fold_freqs(freqs, in_dims[1], n, x.shape[0])), n), 0


def rope_backward(
    call: Call,
    info: Any,
    in_dims: Dims,
    grad_out: torch.Tensor,
    x: torch.Tensor | None,
    freqs: torch.Tensor,
    need_x: bool,
    need_freqs: bool,
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """The rule of ``rope_backward``."""
    n = info.batch_size
    grad_out = _fold(grad_out, in_dims[0], n)
    folded_freqs = _fold_freqs(freqs, in_dims[2], n, grad_out.shape[0], separate=need_freqs)
    grad_x, grad_freqs = call(grad_out, _fold(x, in_dims[1], n), folded_freqs, need_x, need_freqs)
    if need_x:
        grad_x = _unfold(grad_x, n)
    if need_freqs:
        grad_freqs = _sum_shared(_unfold(grad_freqs, n), freqs, in_dims[2])
    return (grad_x, grad_freqs), (0 if need_x else None, 0 if need_freqs else None)


def _with_defaults(args: Sequence[Any], n_required: int, *defaults: Any) -> Sequence[Any]:
    """The arguments, the last of which have defaults: the dispatcher leaves those out."""
    return (*args, *defaults[len(args) - n_required :])


def _fold(tensor: Any, dim: int | None, n: int) -> Any:
    """(…, n, …) with the mapped axis at ``dim``, or a tensor that all samples share, to (n · batch, …)."""
    if tensor is None:
        return None
    return _flattened(_mapped_first(tensor, dim, n))


def _mapped_first(tensor: torch.Tensor, dim: int | None, n: int) -> torch.Tensor:
    return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _flattened(mapped: torch.Tensor, axis: int = 0) -> torch.Tensor:
    folded = mapped.flatten(axis, axis + 1)
    # The mapped axis may have been the last one in memory, and the operations need a contiguous last axis.
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def _unfold(tensor: torch.Tensor, n: int) -> torch.Tensor:
    return tensor.view(n, tensor.shape[0] // n, *tensor.shape[1:])


def _fold_freqs(
    freqs: torch.Tensor | None, dim: int | None, n: int, folded_batch: int, separate: bool = False
) -> torch.Tensor | None:
    """Factors (batch or 1, tokens, pairs) of each sample, or of all, to (n · batch or 1, tokens, pairs).

    ``separate``: never 1, so that the gradients of the samples stay separate.
    """
    if freqs is None or (dim is None and freqs.shape[0] == 1 and not separate):
        return freqs
    mapped = _mapped_first(freqs, dim, n)
    if mapped.shape[1] == 1:
        mapped = mapped.expand(n, folded_batch // n, -1, -1)
    return _flattened(mapped)


def _sum_shared(grad: torch.Tensor, freqs: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Gradients (n, batch, tokens, pairs), summed to (n, 1, tokens, pairs) if a sample's batch shares its factors."""
    batch = (freqs if dim is None else freqs.movedim(dim, 0)[0]).shape[0]
    return grad.sum(1, keepdim=True) if batch == 1 else grad
