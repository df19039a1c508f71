"""Rules of ``torch.vmap``: the mapped axis becomes part of the batch axis, and one call serves all samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Dims = Sequence[Any]


def attention(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, int]]:
    """The rule of ``attention``, with the arguments that ``torch.library.register_vmap`` passes."""
    q, k, v, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32 = _with_defaults(args)
    q_dim, k_dim, v_dim, *_, freqs_dim, mask_dim, _, _ = _with_defaults(in_dims, dims=True)
    n = info.batch_size
    q = _fold(q, q_dim, n)
    out, lse = torch.ops.anchor_attention.attention(
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


def attention_backward(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """The rule of ``attention_backward``: gradients for each sample, also of what the samples share."""
    *tensors, q_ranges, k_offsets, k_ranges, q_freqs, key_mask, scale, allow_tf32, need_q, need_k, need_v, need_f = args
    n = info.batch_size
    grad_out, grad_lse, q, k, v, out, lse = (
        _fold(tensor, dim, n) for tensor, dim in zip(tensors, in_dims, strict=False)
    )
    freqs_dim, mask_dim = in_dims[10], in_dims[11]
    grads = torch.ops.anchor_attention.attention_backward(
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


def rope(info: Any, in_dims: Dims, x: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rule of ``rope``."""
    n = info.batch_size
    x = _fold(x, in_dims[0], n)
    return _unfold(torch.ops.anchor_attention.rope(x, _fold_freqs(freqs, in_dims[1], n, x.shape[0])), n), 0


def rope_backward(
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
    grad_x, grad_freqs = torch.ops.anchor_attention.rope_backward(
        grad_out, _fold(x, in_dims[1], n), folded_freqs, need_x, need_freqs
    )
    if need_x:
        grad_x = _unfold(grad_x, n)
    if need_freqs:
        grad_freqs = _sum_shared(_unfold(grad_freqs, n), freqs, in_dims[2])
    return (grad_x, grad_freqs), (0 if need_x else None, 0 if need_freqs else None)


def _with_defaults(args: Sequence[Any], dims: bool = False) -> Sequence[Any]:
    # The dispatcher leaves out trailing arguments that have their default.
    defaults = (None, None, None, None if dims else False)
    return (*args, *defaults[len(args) - 6 :])


def _fold(tensor: Any, dim: int | None, n: int) -> Any:
    """(…, n, …) with the mapped axis at ``dim``, or a tensor that all samples share, to (n · batch, …)."""
    if tensor is None:
        return None
    return _flattened(_mapped_first(tensor, dim, n))


def _mapped_first(tensor: torch.Tensor, dim: int | None, n: int) -> torch.Tensor:
    return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _flattened(mapped: torch.Tensor) -> torch.Tensor:
    folded = mapped.flatten(0, 1)
    # The axis that was mapped can have been the last one of memory, which the operations want contiguous.
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def _unfold(tensor: torch.Tensor, n: int) -> torch.Tensor:
    return tensor.view(n, tensor.shape[0] // n, *tensor.shape[1:])


def _fold_freqs(
    freqs: torch.Tensor | None, dim: int | None, n: int, folded_batch: int, separate: bool = False
) -> torch.Tensor | None:
    """Factors (batch or 1, tokens, pairs) of each sample, or of all, to (n · batch or 1, tokens, pairs).

    ``separate``: never 1, so that the gradient of each sample can be told from the others'.
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
