"""Anchor attention of the queries of this process to the keys of a group of processes."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _context, functional
from .gathered import Gathering, gather_mask, sum_gradients
from .ring import ring_attention
from .sharded_table import ShardedTable


@overload
def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: ShardedTable,
    *,
    q_freqs: Tensor | None = ...,
    k_freqs: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    scale: float | Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: ShardedTable,
    *,
    q_freqs: Tensor | None = ...,
    k_freqs: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    scale: float | Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: ShardedTable,
    *,
    q_freqs: Tensor | None = None,
    k_freqs: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`anchor_attention.anchor_attention` with the keys of all processes, each of which must call it.

    What travels depends on the table's case:

    - replicated: nothing forward; the gradients of k and v are summed over the processes, each of which gets the sum.
    - gathered: every process gets the keys and values that are read; the gradients of all are summed and returned to
      the process that holds the keys.
    - ring: blocks of keys and values go round, and partial results are merged by their log-sum-exps; in the backward
      the blocks go round again with their gradients.

    Gradients are summed in float32 (float64 for float64), in an order that depends only on the number of processes.
    Only first derivatives in reverse mode are supported.

    Args:
        q: (B, Nq, H, D) queries of this process, Nq of any size on each.
        k: (B, Nk, Hk, D) keys of this process, as they were agreed on; all keys where they are replicated.
        v: (B, Nk, Hk, Dv) values.
        table: What the processes have agreed on, see :meth:`ShardedTable.agree`.
        q_freqs: (B or 1, Nq, D / 2) complex64 rotary factors of the queries of this process.
        k_freqs: (B or 1, Nk, D / 2) complex64 factors of its keys, which are rotated before they travel.
        key_mask: (B, Nk) bool, True where a key of this process exists.
        scale: Factor of the scores; D^-½ when None.
        return_lse: Whether to return lse as well.

    Returns:
        out (B, Nq, H, Dv) in q's dtype, and with ``return_lse`` lse (B, H, Nq), of the queries of this process.

    Raises:
        ValueError: If the table is not a :class:`ShardedTable`, or k, v and key_mask are not what was agreed on.
        RuntimeError: As :func:`anchor_attention.anchor_attention`.
        ProcessError: If another process fails, has ended or does not answer in time.
    """
    if not isinstance(table, ShardedTable):
        raise ValueError(f"table must be a ShardedTable, as ShardedTable.agree makes it, got {type(table).__name__}")
    functional._check_types(table.local, q=q, k=k, v=v, q_freqs=q_freqs, k_freqs=k_freqs, key_mask=key_mask)
    q, k, v = functional._autocast(q, k, v)
    table.check(k, v, key_mask)
    if k_freqs is not None:
        # Before they travel: factors would have to travel as well.
        k = functional._rotated_keys(k, functional._widened(k_freqs) if k.dtype == torch.float64 else k_freqs)  # type: ignore[arg-type]
    if table.case == "ring":
        return _ring(q, k, v, table, q_freqs, key_mask, scale, return_lse)
    if table.case == "replicated":
        k, v = sum_gradients(k, v, table)
    else:
        gathering = Gathering(k, v, table)
        key_mask = gather_mask(key_mask, k, table)
        k, v = gathering.finish()
    call: Any = functional.anchor_attention
    result: Tensor | tuple[Tensor, Tensor] = call(
        q, k, v, table.gathered, q_freqs=q_freqs, key_mask=key_mask, scale=scale, return_lse=return_lse
    )
    return result


def _ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: ShardedTable,
    q_freqs: Tensor | None,
    key_mask: Tensor | None,
    scale: float | Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if _context.backend != "fused":
        raise ValueError(f"the ring needs the back-end 'fused', got {_context.backend!r}: choose case='gathered'")
    if isinstance(scale, Tensor):
        q, scale = functional._scaled(q, scale), 1.0
    if q.dtype == torch.float64:
        q_freqs = functional._widened(q_freqs)
    allow_tf32 = q.dtype == torch.float32 and functional._tf32_is_allowed()
    out, lse = ring_attention(q, k, v, table, q_freqs, gather_mask(key_mask, k, table), scale, allow_tf32)
    return (out, lse) if return_lse else out
