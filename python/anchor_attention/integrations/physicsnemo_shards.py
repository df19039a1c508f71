"""Anchor attention of PhysicsNeMo's ShardTensors, whose shards may have any sizes."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor

from ..distributed.dtensors import attention_of_shards
from ..functional import anchor_attention


def register_shard_tensor() -> None:
    """Lets :func:`anchor_attention.anchor_attention` take ShardTensors of PhysicsNeMo, from this call on.

    q, k and v (B, N, H, D) may be sharded as :func:`anchor_attention.distributed.dtensor_attention` describes: alike on
    batch or heads, or q on the tokens with keys that are sharded on theirs or replicated. Shards of tokens may differ
    in size and be empty. Plain tensors beside a ShardTensor count as replicated, as everywhere in PhysicsNeMo. The
    table is that of all queries and all keys, and freqs and mask are whole. The result is a ShardTensor with the shards
    of q. Nothing is redistributed; first derivatives in reverse mode are supported.

    Raises:
        ImportError: If PhysicsNeMo is not installed, or has no ShardTensor for this torch.
    """
    shard_tensor = getattr(importlib.import_module("physicsnemo.domain_parallel"), "ShardTensor", None)
    if shard_tensor is None:
        raise ImportError("physicsnemo.domain_parallel has no ShardTensor for this version of torch")
    shard_tensor.register_function_handler(anchor_attention, partial(_attention, shard_tensor))


def _attention(shard_tensor: Any, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    q, k, v, table = args
    options = dict(kwargs)
    if options.pop("return_lse"):
        raise ValueError("return_lse must be False for ShardTensors, got True")
    if isinstance(options["scale"], Tensor):
        raise ValueError("scale must be a number for ShardTensors, got a tensor: multiply it into q")
    if not options.pop("allow_uncovered"):
        table.check_coverage(q.shape[1])
    for name in ("q_freqs", "k_freqs", "key_mask"):
        if hasattr(options[name], "placements"):
            options[name] = options[name].full_tensor()
    out = attention_of_shards(q, k, v, table, **options)
    # A plain q among ShardTensors has come as a DTensor, which is replicated.
    shapes = {
        dimension: tuple((*shape[:3], v.shape[3]) for shape in q._spec.sharding_shapes()[dimension])
        for dimension, place in enumerate(q.placements)
        if place.is_shard()
    }
    return shard_tensor.from_local(out, q.device_mesh, q.placements, sharding_shapes=shapes)
