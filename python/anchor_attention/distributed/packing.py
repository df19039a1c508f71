"""Keys and values as they travel: (tokens, B, Hk, D + Dv), so that what was gathered is one token axis, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..key_range_table import Slice
from .sharded_table import ShardedTable


def pack(k: Tensor, v: Tensor, ranges: Sequence[Slice], n_rows: int) -> Tensor:
    """Packs the tokens of the ranges of k (B, N, Hk, D) and v (B, N, Hk, Dv) into (n_rows, B, Hk, D + Dv), padded."""
    packed = k.new_empty(n_rows, k.shape[0], k.shape[2], k.shape[3] + v.shape[3])
    k_rows, v_rows = unpack(packed, k.shape[3])
    place = 0
    for begin, end in ranges:
        stop = place + end - begin
        k_rows[:, place:stop].copy_(k[:, begin:end])
        v_rows[:, place:stop].copy_(v[:, begin:end])
        place = stop
    # Nobody reads the padding, but uninitialised memory must not be sent.
    packed[place:].zero_()
    return packed


def unpack(packed: Tensor, k_width: int) -> tuple[Tensor, Tensor]:
    """(tokens, B, Hk, D + Dv) → views k (B, tokens, Hk, D) and v (B, tokens, Hk, Dv)."""
    rows = packed.transpose(0, 1)
    return rows[..., :k_width], rows[..., k_width:]


def unpack_gradients(packed: Tensor, table: ShardedTable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of gradients of the keys that travelled → gradients of all keys of this process, 0 where none travelled."""
    shape = table.shape
    grad_k = packed.new_zeros(shape.batch, table.n_keys, shape.heads, shape.k_width, dtype=dtype)
    grad_v = packed.new_zeros(shape.batch, table.n_keys, shape.heads, shape.v_width, dtype=dtype)
    k_rows, v_rows = unpack(packed, shape.k_width)
    place = 0
    for begin, end in table.sent[table.processes.rank]:
        stop = place + end - begin
        grad_k[:, begin:end] = k_rows[:, place:stop]
        grad_v[:, begin:end] = v_rows[:, place:stop]
        place = stop
    return grad_k, grad_v
