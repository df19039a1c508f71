"""Anchor attention of DTensors: where they are sharded says what travels."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..functional import anchor_attention
from ..key_range_table import KeyRangeTable, Slice
from .attention import sharded_attention
from .collectives import processes_of
from .sharded_table import GATHER_LIMIT, ShardedTable, key_shape, union

BATCH, TOKENS, HEADS = 0, 1, 2


class _Cut(NamedTuple):
    """Which part of an axis is here: of parts with these sizes, number ``rank``."""

    sizes: tuple[int, ...]
    rank: int = 0

    def own_bounds(self) -> Slice:
        begin = sum(self.sizes[: self.rank])
        return begin, begin + self.sizes[self.rank]

    def own(self) -> slice:
        return slice(*self.own_bounds())


def dtensor_attention(
    q: DTensor,
    k: DTensor,
    v: DTensor,
    table: KeyRangeTable,
    *,
    q_freqs: Tensor | None = None,
    k_freqs: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    case: str | None = None,
    gather_limit: int = GATHER_LIMIT,
) -> DTensor:
    """:func:`anchor_attention.anchor_attention` of DTensors. Nothing is redistributed that the caller has not sharded.

    On each dimension of their mesh q, k and v may be sharded on the batch, or on the heads, all three alike: then
    nothing travels. On one dimension q may be sharded on the tokens, with keys that are sharded on theirs (gathered, or
    in a ring) or replicated. Sizes follow from the shapes: nothing is agreed on.

    Args:
        q: (B, Nq, H, D).
        k: (B, Nk, Hk, D).
        v: (B, Nk, Hk, Dv), with the placements of k.
        table: All queries and all keys.
        q_freqs: (B or 1, Nq, D / 2) complex64, whole and the same on every process, and so are k_freqs and key_mask.
        k_freqs: (B or 1, Nk, D / 2) complex64.
        key_mask: (B, Nk) bool.
        scale: Factor of the scores; D^-½ when None.
        case: As for :meth:`ShardedTable.agree`.
        gather_limit: As there.

    Returns:
        (B, Nq, H, Dv), with the placements of q.

    Raises:
        ValueError: If one is no DTensor, their meshes differ, or the sharding is not one of these.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, DTensor):
            raise ValueError(f"{name} must be a DTensor, got {type(tensor).__name__}: anchor_attention takes tensors")
    out = attention_of_shards(
        q,
        k,
        v,
        table,
        q_freqs=q_freqs,
        k_freqs=k_freqs,
        key_mask=key_mask,
        scale=scale,
        case=case,
        gather_limit=gather_limit,
    )
    shape = torch.Size((*q.shape[:3], v.shape[3]))
    stride = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False, shape=shape, stride=stride)


def attention_of_shards(
    q: Any,
    k: Any,
    v: Any,
    table: KeyRangeTable,
    *,
    q_freqs: Tensor | None = None,
    k_freqs: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    case: str | None = None,
    gather_limit: int = GATHER_LIMIT,
) -> Tensor:
    """The rows of :func:`dtensor_attention` that are here, of DTensors or of tensors that know their own shards' sizes.

    Raises:
        ValueError: If the meshes of q, k and v differ, or the sharding is not one of these.
    """
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device_mesh != q.device_mesh:
            raise ValueError(f"{name} must be on the mesh of q, {q.device_mesh}, got {tensor.device_mesh}")
    mesh = q.device_mesh
    shared = _shared_dimension(q, k, v)
    batch, queries, keys = _cut(q, BATCH), _cut(q, TOKENS), _cut(k, TOKENS)
    if any(_cut(tensor, BATCH) != batch for tensor in (k, v)) or _cut(v, TOKENS) != keys:
        _refuse(q, k, v)
    if any(len(set(_cut(tensor, HEADS).sizes)) > 1 for tensor in (q, k, v)):
        _refuse(q, k, v)
    replicated = shared is not None and k.placements[shared] == Replicate()
    # For replicated keys `sharded_attention` sums the gradients itself.
    local_q: Tensor = q.to_local()
    local_k: Tensor = k.to_local()
    local_v: Tensor = v.to_local()
    q_freqs, k_freqs = (
        None if freqs is None else (freqs if freqs.shape[0] == 1 else freqs[batch.own()])[:, cut.own()]
        for freqs, cut in ((q_freqs, queries), (k_freqs, keys))
    )
    mask = None if key_mask is None else key_mask[batch.own(), keys.own()]
    options: dict[str, Any] = {"q_freqs": q_freqs, "k_freqs": k_freqs, "key_mask": mask, "scale": scale}
    if shared is None:
        out: Tensor = anchor_attention(local_q, local_k, local_v, table, **options)
        return out
    processes = processes_of(mesh.get_group(shared))
    sharded = ShardedTable.of_counts(
        _rows(table, queries.own_bounds()),
        list(keys.sizes) * processes.size if replicated else list(keys.sizes),
        processes,
        key_shape(local_k, local_v),
        masked=mask is not None,
        reads=union([key for _, keys in table.entries() for key in keys]),
        case="replicated" if replicated else case,
        gather_limit=gather_limit,
    )
    out = sharded_attention(local_q, local_k, local_v, sharded, **options)
    return out


def _shared_dimension(q: Any, k: Any, v: Any) -> int | None:
    """The dimension of the mesh on which q is sharded on the tokens, if there is one."""
    seen: set[int] = set()
    shared = None
    for dimension, places in enumerate(zip(q.placements, k.placements, v.placements, strict=True)):
        of_q, of_k, of_v = places
        axis = of_q.dim if isinstance(of_q, Shard) else None
        fits = of_k == of_v and not any(isinstance(place, Partial) for place in places) and axis not in seen
        if axis == TOKENS:
            fits = fits and of_k in (Replicate(), Shard(TOKENS))
            shared = dimension
        else:
            fits = fits and of_q == of_k and axis in (None, BATCH, HEADS)
        if not fits:
            _refuse(q, k, v)
        if axis is not None:
            seen.add(axis)
    return shared


def _refuse(q: Any, k: Any, v: Any) -> NoReturn:
    placements: tuple[tuple[Placement, ...], ...] = (q.placements, k.placements, v.placements)
    raise ValueError(
        "q, k and v must be sharded alike on batch or heads, which the mesh must divide, or q on tokens beside k and v "
        f"on tokens or replicated, each axis on one dimension of the mesh, got placements {placements}"
    )


def _cut(tensor: Any, axis: int) -> _Cut:
    mesh: DeviceMesh = tensor.device_mesh
    for dimension, place in enumerate(tensor.placements):
        if place == Shard(axis):
            return _Cut(_sizes(tensor, axis, dimension), mesh.get_local_rank(dimension))
    return _Cut((tensor.shape[axis],))


def _sizes(tensor: Any, axis: int, dimension: int) -> tuple[int, ...]:
    """Of the parts of an axis along a dimension of the mesh."""
    shapes = getattr(tensor._spec, "sharding_shapes", None)
    if shapes is not None:
        # Without an argument it keeps what the processes have told each other.
        return tuple(shape[axis] for shape in shapes()[dimension])
    # A DTensor is cut as torch.chunk cuts: all parts are as large as the first one, except at the end of the axis.
    size, parts = tensor.shape[axis], tensor.device_mesh.size(dimension)
    step = -(-size // parts)
    return tuple(min((rank + 1) * step, size) - min(rank * step, size) for rank in range(parts))


def _rows(table: KeyRangeTable, own: Slice) -> KeyRangeTable:
    """The table of some queries, on an axis of their own."""
    q_ranges: list[int] = []
    k_offsets = [0]
    k_ranges: list[int] = []
    for (begin, end), keys in table.entries():
        first, last = max(begin, own[0]), min(end, own[1])
        if first < last:
            q_ranges.extend((first - own[0], last - own[0]))
            k_ranges.extend(bound for key in keys for bound in key)
            k_offsets.append(len(k_ranges) // 2)
    return KeyRangeTable(q_ranges, k_offsets, k_ranges)
