"""Keys and values that travel around a ring of processes, each of which computes with one block at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dtypes import working_dtype
from .collectives import send_on, wait
from .gathered import GRADIENTS, KEYS
from .packing import pack, unpack, unpack_gradients
from .sharded_table import ShardedTable

_attention = torch.ops.anchor_attention.attention.default
_attention_backward = torch.ops.anchor_attention.attention_backward.default


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: ShardedTable,
    q_freqs: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of all processes, of which never more than two blocks are here.

    The derivative is exact: with the global out and lse, each block gives its own part of the gradients, which are
    summed in float32 and travel with the block. Method: Liu et al., Ring Attention, arXiv:2310.01889.

    Args:
        q: (B, Nq, H, D), and k, v and table as for :func:`sharded_attention`, keys rotated.
        k: Keys of this process.
        v: Values of this process.
        table: What was agreed on.
        q_freqs: (B or 1, Nq, D / 2) rotary factors.
        key_mask: (B, processes · width) bool of the keys of all processes.
        scale: Factor of the scores.
        allow_tf32: As for the operation.

    Returns:
        out (B, Nq, H, Dv) and lse (B, H, Nq).
    """
    out, lse = _Ring.apply(q, k, v, table, q_freqs, key_mask, scale, allow_tf32)  # type: ignore[no-untyped-call]
    return out, lse


def _mask_of(key_mask: Tensor | None, table: ShardedTable, source: int) -> Tensor | None:
    if key_mask is None:
        return None
    begin = source * table.width
    return key_mask[:, begin : begin + table.n_sent(source)]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: ShardedTable,
        q_freqs: Tensor | None,
        key_mask: Tensor | None,
        scale: float | None,
        allow_tf32: bool,
    ) -> tuple[Tensor, Tensor]:
        processes, shape = table.processes, table.shape
        wide = working_dtype(q.dtype)
        n_local = table.n_sent(processes.rank)
        packed = block = pack(k, v, table.sent[processes.rank], n_local)
        out = q.new_zeros(*q.shape[:3], shape.v_width, dtype=wide)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)
        for step in range(processes.size):
            source = (processes.rank - step) % processes.size
            incoming = _started(block, table, step, KEYS)
            entries = table.blocks[source]
            if entries.k_ranges:
                ranges = (entries.q_ranges, entries.k_offsets, entries.k_ranges)
                mask = _mask_of(key_mask, table, source)
                part = _attention(q, *unpack(block, shape.k_width), *ranges, q_freqs, mask, scale, allow_tf32)
                out, lse = _merged(out, lse, *part)
            if incoming is not None:
                block = wait(incoming, KEYS)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, packed, out, lse, q_freqs, key_mask)
        ctx.table, ctx.scale, ctx.allow_tf32 = table, scale, allow_tf32
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        table: ShardedTable = ctx.table
        processes, shape = table.processes, table.shape
        q, block, out, lse, q_freqs, key_mask = ctx.saved_tensors
        # Every process takes part in the ring, even one whose result nobody used.
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        need_q, need_q_freqs = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        wide = working_dtype(q.dtype)
        grad_q = torch.zeros_like(q, dtype=wide) if need_q else None
        grad_freqs = torch.zeros_like(q_freqs) if need_q_freqs else None
        sums = block.new_zeros(block.shape, dtype=wide)
        arriving: Tensor | None = None
        for step in range(processes.size):
            source = (processes.rank - step) % processes.size
            incoming = _started(block, table, step, KEYS)
            entries = table.blocks[source]
            parts = None
            if entries.k_ranges:
                ranges = (entries.q_ranges, entries.k_offsets, entries.k_ranges)
                mask = _mask_of(key_mask, table, source)
                part_q, *parts, part_freqs = _attention_backward(
                    grad_out, grad_lse, q, *unpack(block, shape.k_width), out, lse, *ranges, q_freqs, mask, ctx.scale,
                    ctx.allow_tf32, need_q, True, True, need_q_freqs,
                )  # fmt: skip
                grad_q = grad_q + part_q if grad_q is not None else None
                grad_freqs = grad_freqs + part_freqs if grad_freqs is not None else None
            if arriving is not None:
                sums = wait(arriving, GRADIENTS)
            if parts is not None:
                for rows, part in zip(unpack(sums, shape.k_width), parts, strict=True):
                    rows.add_(part)
            if processes.size > 1:
                # After the last step the sums return to their process, the next one in the ring.
                arriving = send_on(sums, table.n_sent((source - 1) % processes.size), processes, GRADIENTS)
            if incoming is not None:
                block = wait(incoming, KEYS)
        if arriving is not None:
            sums = wait(arriving, GRADIENTS)
        grad_k, grad_v = unpack_gradients(sums, table, shape.dtype)
        return None if grad_q is None else grad_q.to(q.dtype), grad_k, grad_v, None, grad_freqs, None, None, None


def _started(block: Tensor, table: ShardedTable, step: int, what: str) -> Tensor | None:
    """Sends a block on, unless it has been everywhere. Meanwhile the process computes with it."""
    processes = table.processes
    if step == processes.size - 1:
        return None
    return send_on(block, table.n_sent((processes.rank - step - 1) % processes.size), processes, what)


def _merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the attention to more keys into the attention to those before, by their log-sum-exps."""
    total = torch.logaddexp(lse, part_lse)
    # Rows without a key yet: any finite number keeps the weights 0.
    finite = torch.where(total == -torch.inf, 0.0, total)
    weights, part_weights = (torch.exp(x - finite).transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse))
    return out * weights + part * part_weights, total
