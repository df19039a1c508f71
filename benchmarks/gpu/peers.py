"""Peers of the operation that only a GPU has: each back-end of torch on its own, and libraries where they are found."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anchor_attention import KeyRangeTable
from anchor_attention.benchmark import NotSupportedError
from anchor_attention.benchmark.operation import OperationInputs, operation_contestant
from anchor_attention.benchmark.peers import Attention, select

from .stages import KERNELS_VARIABLE

Contestant = Callable[[OperationInputs], tuple[Tensor, ...]]

BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SM80 = "anchor_attention_sm80"
LIBRARIES = {
    "flash_attention_4": "flash_attn.cute",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn",
}


def with_backend(backend: SDPBackend, contestant: Contestant) -> Contestant:
    """The same calls of ``scaled_dot_product_attention``, answered by one back-end or refused."""

    def restricted(inputs: OperationInputs) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return contestant(inputs)

    return restricted


def on_sm80_kernels(contestant: Contestant) -> Contestant:
    """Ours, on the kernels for every architecture, where the device has kernels of its own."""

    def pinned(inputs: OperationInputs) -> tuple[Tensor, ...]:
        os.environ[KERNELS_VARIABLE] = "sm80"
        try:
            return contestant(inputs)
        finally:
            del os.environ[KERNELS_VARIABLE]

    return pinned


def library_contestant(name: str, table: KeyRangeTable, passes: str, masked: bool) -> Contestant:
    """One call per group of a library's dense attention, on views.

    Args:
        name: One of :data:`LIBRARIES`.
        table: Who reads whom.
        passes: What is timed.
        masked: Whether some keys are padding.

    Raises:
        NotSupportedError: If the library is not there, or can't do this.
    """
    if masked:
        raise NotSupportedError("has no mask of keys")
    try:
        dense: Any = importlib.import_module(LIBRARIES[name]).flash_attn_func
    except (ImportError, AttributeError, OSError) as error:
        raise NotSupportedError(f"{LIBRARIES[name]} can't be imported: {error}") from error
    return operation_contestant(per_group(dense, table), passes)


def per_group(dense: Callable[[Tensor, Tensor, Tensor], Any], table: KeyRangeTable) -> Attention:
    """An attention of q (B, Nq, H, D), k and v (B, Nk, H, D), made of one dense call for each group."""
    entries = table.entries()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts, position = [], 0
        for (begin, end), ranges in entries:
            if position < begin:
                parts.append(q.new_zeros(q.shape[0], begin - position, *q.shape[2:]))
            part = dense(q[:, begin:end], select(k, ranges), select(v, ranges))
            # Some versions return lse beside the output.
            parts.append(part[0] if isinstance(part, tuple) else part)
            position = end
        if position < q.shape[1]:
            parts.append(q.new_zeros(q.shape[0], q.shape[1] - position, *q.shape[2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return attention
