"""What a user of PyTorch would call for the same patterns, to be timed and checked beside anchor attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..functional import anchor_attention
from ..key_range_table import KeyRangeTable, Slice

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# scaled_dot_product_attention converts a boolean mask to the inputs' dtype: above this size, mostly the transfer of the
# mask would be timed.
MAX_DENSE_SCORES = 2**26


class NotSupportedError(Exception):
    """A peer does not support the case, as is sometimes seen only in its first call; the message says why."""


class PreparedPeer(NamedTuple):
    """An attention function of q (B, Nq, H, D), k and v (B, Nk, H, D), and the seconds that its masks took to make."""

    attention: Attention
    build_seconds: float


def prepare_peer(
    name: str,
    table: KeyRangeTable,
    n_queries: int,
    n_keys: int,
    *,
    key_mask: Tensor | None = None,
    backward: bool = False,
    device: str | torch.device = "cpu",
) -> PreparedPeer:
    """Makes a contestant for one table. What depends on the table alone is done here, outside any timing.

    Args:
        name: One of :data:`PEERS`.
        table: Who reads whom. A group reads no key twice.
        n_queries: Length of the query axis.
        n_keys: Length of the key axis.
        key_mask: (B, Nk) bool, True where the key exists. Every query must keep a key.
        backward: Whether gradients will be asked for.
        device: Where it will run.

    Raises:
        ValueError: If there is no such peer.
        NotSupportedError: If the peer can't do this. One that is compiled in its first call may say so only then.
    """
    if name not in PEERS:
        raise ValueError(f"name must be one of {sorted(PEERS)}, got {name!r}")
    begin = time.perf_counter()
    attention = PEERS[name](table, n_queries, n_keys, key_mask, backward, torch.device(device))
    return PreparedPeer(attention, time.perf_counter() - begin)


def attend_slices(q: Tensor, entries: list[tuple[Slice, Tensor, Tensor, Tensor | None]]) -> Tensor:
    """One call of ``scaled_dot_product_attention`` per entry, on views.

    Args:
        q: (B, Nq, H, D).
        entries: In the order of the query axis: query range, its k and v (B, Nk of the range, H, D), and their mask
            (B, Nk of the range) or ``None``.

    Returns:
        (B, Nq, H, D); 0 where no entry's range is.
    """
    parts, position = [], 0
    for (begin, end), k, v, mask in entries:
        if position < begin:
            parts.append(q.new_zeros(q.shape[0], begin - position, *q.shape[2:]))
        parts.append(
            scaled_dot_product_attention(
                q[:, begin:end].transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=None if mask is None else mask[:, None, None, :],
            ).transpose(1, 2)
        )
        position = end
    if position < q.shape[1]:
        parts.append(q.new_zeros(q.shape[0], q.shape[1] - position, *q.shape[2:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def select(tensor: Tensor, ranges: list[Slice]) -> Tensor:
    """The ranges of axis 1, one after the other: a view where there is one."""
    parts = [tensor[:, begin:end] for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _anchor_attention(
    table: KeyRangeTable, n_queries: int, n_keys: int, key_mask: Tensor | None, backward: bool, device: torch.device
) -> Attention:
    return partial(anchor_attention, table=table, key_mask=key_mask)


def _eager(
    table: KeyRangeTable, n_queries: int, n_keys: int, key_mask: Tensor | None, backward: bool, device: torch.device
) -> Attention:
    """Concatenates each group's queries and keys, batches groups of equal shape, and splits the result again."""
    entries = table.entries()
    by_shape: dict[Slice, list[int]] = {}
    for g, ((begin, end), ranges) in enumerate(entries):
        by_shape.setdefault((end - begin, sum(stop - start for start, stop in ranges)), []).append(g)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
        outs: dict[int, Tensor] = {}
        for group in by_shape.values():
            packed_q = torch.cat([queries[:, :, slice(*entries[g][0])] for g in group])
            packed_k, packed_v = (
                torch.cat([torch.cat([tensor[:, :, slice(*r)] for r in entries[g][1]], dim=2) for g in group])
                for tensor in (keys, values)
            )
            mask = None
            if key_mask is not None:
                mask = torch.cat([select(key_mask, entries[g][1]) for g in group])[:, None, None, :]
            out = scaled_dot_product_attention(packed_q, packed_k, packed_v, attn_mask=mask)
            outs.update(zip(group, out.chunk(len(group)), strict=True))
        parts, position = [], 0
        for g, ((begin, end), _) in enumerate(entries):
            if position < begin:
                parts.append(queries.new_zeros(*queries.shape[:2], begin - position, queries.shape[3]))
            parts.append(outs[g])
            position = end
        if position < n_queries:
            parts.append(queries.new_zeros(*queries.shape[:2], n_queries - position, queries.shape[3]))
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    return attention


def _sdpa_per_pattern(
    table: KeyRangeTable, n_queries: int, n_keys: int, key_mask: Tensor | None, backward: bool, device: torch.device
) -> Attention:
    """One call per group on views; copies only where a group's keys are not one run."""
    entries = table.entries()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_slices(
            q,
            [
                (query, select(k, ranges), select(v, ranges), None if key_mask is None else select(key_mask, ranges))
                for query, ranges in entries
            ],
        )

    return attention


def _dense_mask(
    table: KeyRangeTable, n_queries: int, n_keys: int, key_mask: Tensor | None, backward: bool, device: torch.device
) -> Attention:
    batch = 1 if key_mask is None else key_mask.shape[0]
    if batch * n_queries * n_keys > MAX_DENSE_SCORES:
        raise NotSupportedError(f"a mask of {batch} × {n_queries} × {n_keys} is too large")
    mask = table.to_dense(n_queries, n_keys).to(device)
    if not mask.any(dim=1).all():
        raise NotSupportedError("a query without keys, whose result is not defined here")
    if key_mask is not None:
        mask = (mask & key_mask[:, None, :])[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)

    return attention


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast("Callable[..., Tensor]", torch.compile(flex_attention))


def _flex_attention(
    table: KeyRangeTable, n_queries: int, n_keys: int, key_mask: Tensor | None, backward: bool, device: torch.device
) -> Attention:
    if key_mask is not None:
        raise NotSupportedError("a mask per sample would need a mask program per call")
    if backward and device.type == "cpu":
        raise NotSupportedError("no backward on the CPU")
    from torch._dynamo.exc import BackendCompilerFailed

    block_mask: Any = table.to_block_mask(n_queries, n_keys, device=device)
    flex_attention = _compiled_flex_attention()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
        try:
            return flex_attention(queries, keys, values, block_mask=block_mask).transpose(1, 2)
        except BackendCompilerFailed as error:
            # Of a C++ compiler's many lines, the one that tells.
            reason = next((line for line in str(error).splitlines() if "error: " in line), str(error))
            raise NotSupportedError(f"torch can't compile it here: {reason.rpartition('error: ')[2]}") from error

    return attention


OURS = "anchor_attention"
PEERS: dict[str, Callable[[KeyRangeTable, int, int, Tensor | None, bool, torch.device], Attention]] = {
    OURS: _anchor_attention,
    "eager": _eager,
    "sdpa_per_pattern": _sdpa_per_pattern,
    "dense_mask": _dense_mask,
    "flex_attention": _flex_attention,
}
