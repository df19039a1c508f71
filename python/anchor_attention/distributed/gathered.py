"""Keys and values of all processes, gathered on every one; gradients summed in float32 and scattered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dtypes import working_dtype
from .collectives import gather, scatter_sum, sum_all, wait
from .packing import pack, unpack, unpack_gradients
from .sharded_table import ShardedTable

KEYS = "keys and values of the other processes"
GRADIENTS = "gradients of keys and values"
MASKS = "key masks of the other processes"


class Gathering:
    """Keys and values on their way: started by the constructor, waited for by :meth:`finish`.

    What is computed in between overlaps with the transfer, and its gradient with that of the gradients.

    Args:
        k: (B, Nk, Hk, D) keys of this process.
        v: (B, Nk, Hk, Dv) values.
        table: What was agreed on.

    Raises:
        ProcessError: If another process fails.
    """

    def __init__(self, k: Tensor, v: Tensor, table: ShardedTable) -> None:
        self._table = table
        # A compiler orders transfers and computations itself, and takes no notes between derivatives into its graph.
        self._split = not torch.compiler.is_compiling()
        self._sums: list[Tensor] = []
        if self._split:
            self._gathered = _Start.apply(k, v, table, self._sums)  # type: ignore[no-untyped-call]
        else:
            self._keys = _Gather.apply(k, v, table)  # type: ignore[no-untyped-call]

    def finish(self) -> tuple[Tensor, Tensor]:
        """Returns k (B, processes · width, Hk, D) and v (B, processes · width, Hk, Dv): views of one tensor."""
        if self._split:
            k, v = _Finish.apply(self._gathered, self._table, self._sums)  # type: ignore[no-untyped-call]
        else:
            k, v = self._keys
        return k, v


def gather_mask(key_mask: Tensor | None, k: Tensor, table: ShardedTable) -> Tensor | None:
    """(B, Nk) masks of every process → (B, processes · width) bool, padded with False; ``None`` if nobody has one."""
    if not table.masked or table.width == 0:
        return None
    if key_mask is None:
        key_mask = k.new_ones(k.shape[:2], dtype=torch.bool)
    local = key_mask.new_zeros(table.width, k.shape[0], dtype=torch.uint8)
    place = 0
    for begin, end in table.sent[table.processes.rank]:
        local[place : place + end - begin] = key_mask[:, begin:end].t()
        place += end - begin
    everywhere = wait(gather(local, table.processes, MASKS), MASKS)
    return everywhere.t().contiguous().to(torch.bool)


def sum_gradients(k: Tensor, v: Tensor, table: ShardedTable) -> tuple[Tensor, Tensor]:
    """Keys and values that every process holds, as they are; their gradients are summed over the processes."""
    k, v = _SumGradients.apply(k, v, table)  # type: ignore[no-untyped-call]
    return k, v


def _started(k: Tensor, v: Tensor, table: ShardedTable) -> Tensor:
    packed = pack(k, v, table.sent[table.processes.rank], table.width)
    # Where nobody reads anything nothing travels: the number of rows, 0, is already right.
    return gather(packed, table.processes, KEYS) if table.width else packed


def _packed_gradients(grads: tuple[Tensor | None, Tensor | None], table: ShardedTable, like: Any) -> Tensor:
    """Gradients of gathered keys and values → (processes · width, B, Hk, D + Dv) in the type of the sums."""
    shape = table.shape
    n_rows = table.processes.size * table.width
    packed = torch.empty(
        n_rows, shape.batch, shape.heads, shape.k_width + shape.v_width, dtype=working_dtype(shape.dtype), device=like
    )
    for rows, grad in zip(unpack(packed, shape.k_width), grads, strict=True):
        rows.zero_() if grad is None else rows.copy_(grad)
    return packed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, table: ShardedTable) -> tuple[Tensor, Tensor]:
        ctx.table, ctx.device = table, k.device
        gathered = _started(k, v, table)
        if table.width:
            gathered = wait(gathered, KEYS)
        return unpack(gathered, table.shape.k_width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_k: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        table = ctx.table
        packed = _packed_gradients((grad_k, grad_v), table, ctx.device)
        if table.width:
            packed = wait(scatter_sum(packed, table.processes, GRADIENTS), GRADIENTS)
        return *unpack_gradients(packed, table, table.shape.dtype), None


class _Start(torch.autograd.Function):
    """The first half of ``_Gather``. ``sums`` holds what the derivative of the second half has started."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, table: ShardedTable, sums: list[Tensor]) -> Tensor:
        ctx.table, ctx.sums = table, sums
        return _started(k, v, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.sums.pop()
        if ctx.table.width:
            packed = wait(packed, GRADIENTS)
        return *unpack_gradients(packed, ctx.table, ctx.table.shape.dtype), None, None


class _Finish(torch.autograd.Function):
    """The second half of ``_Gather``."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, table: ShardedTable, sums: list[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.table, ctx.sums, ctx.device = table, sums, gathered.device
        ctx.set_materialize_grads(False)
        if table.width:
            gathered = wait(gathered, KEYS)
        return unpack(gathered, table.shape.k_width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_k: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        table = ctx.table
        packed = _packed_gradients((grad_k, grad_v), table, ctx.device)
        ctx.sums.append(scatter_sum(packed, table.processes, GRADIENTS) if table.width else packed)
        # The gradient itself is in `sums`, of another shape and not yet there: this one only has the right shape.
        shape = (table.processes.size * table.width, *packed.shape[1:])
        return packed.new_zeros((), dtype=table.shape.dtype).expand(shape), None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, table: ShardedTable) -> tuple[Tensor, Tensor]:
        ctx.table = table
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        table = ctx.table
        packed = torch.cat((grad_k, grad_v), dim=-1).to(working_dtype(grad_k.dtype))
        packed = wait(sum_all(packed, table.processes, GRADIENTS), GRADIENTS)
        width = table.shape.k_width
        return packed[..., :width].to(grad_k.dtype), packed[..., width:].to(grad_v.dtype), None
