"""Formulas for ``torch.utils.flop_counter``, based on the area of the table, not on the number of tokens.

A key that ``key_mask`` drops is counted, because a formula sees only shapes. The recomputation of the scores in the
backward is not counted, as for torch's own unfused attention: these are the operations of the model.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def _scores(q_shape: Sequence[int], q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int]) -> int:
    """Scores of all heads over all groups of queries and their keys."""
    keys = [end - begin for begin, end in zip(k_ranges[::2], k_ranges[1::2], strict=True)]
    queries = [end - begin for begin, end in zip(q_ranges[::2], q_ranges[1::2], strict=True)]
    area = sum(n * sum(keys[first:last]) for n, (first, last) in zip(queries, pairwise(k_offsets), strict=True))
    batch, _, heads, _ = q_shape
    return area * batch * heads


def _attention(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * (q_shape[3] + v_shape[3]) * _scores(q_shape, q_ranges, k_offsets, k_ranges)


def _attention_backward(
    grad_out_shape: Sequence[int],
    grad_lse_shape: Sequence[int] | None,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    out_shape_: Sequence[int],
    lse_shape: Sequence[int],
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    q_freqs_shape: Sequence[int] | None,
    key_mask_shape: Sequence[int] | None,
    scale: float | None,
    allow_tf32: bool,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_q_freqs: bool,
    **kwargs: Any,
) -> int:
    # The gradient of the scores serves those of queries and keys.
    wants_q = need_q or need_q_freqs
    widths = (need_v + (wants_q or need_k)) * v_shape[3] + (wants_q + need_k) * q_shape[3]
    return 2 * widths * _scores(q_shape, q_ranges, k_offsets, k_ranges)


def _tangent_widths(q_shape: Any, k_shape: Any, v_shape: Any, head_dim: int, value_dim: int) -> int:
    """Total width of the products for one tangent of the output. Shapes are those of directions, or None."""
    moves_scores = q_shape is not None or k_shape is not None
    of_scores = (q_shape is not None) + (k_shape is not None)
    return of_scores * head_dim + (moves_scores + (v_shape is not None)) * value_dim


def _attention_jvp(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    known_out_shape: Sequence[int] | None,
    lse_shape: Sequence[int] | None,
    q_tangents_shape: Sequence[int] | None,
    k_tangents_shape: Sequence[int] | None,
    v_tangents_shape: Sequence[int] | None,
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    shapes = (q_tangents_shape, k_tangents_shape, v_tangents_shape)
    n = next((shape[0] for shape in shapes if shape is not None), 0)
    value = 0 if known_out_shape is not None else q_shape[3] + v_shape[3]
    widths = value + n * _tangent_widths(*shapes, q_shape[3], v_shape[3])
    return 2 * widths * _scores(q_shape, q_ranges, k_offsets, k_ranges)


def _attention_double_backward(
    grad_out_shape: Sequence[int],
    grad_lse_shape: Sequence[int] | None,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    known_out_shape: Sequence[int],
    lse_shape: Sequence[int],
    q_tangent_shape: Sequence[int] | None,
    k_tangent_shape: Sequence[int] | None,
    v_tangent_shape: Sequence[int] | None,
    q_ranges: Sequence[int],
    k_offsets: Sequence[int],
    k_ranges: Sequence[int],
    key_mask_shape: Sequence[int] | None,
    scale: float | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    **kwargs: Any,
) -> int:
    moves_q, moves_k, moves_v = (shape is not None for shape in (q_tangent_shape, k_tangent_shape, v_tangent_shape))
    widths = _tangent_widths(q_tangent_shape, k_tangent_shape, v_tangent_shape, q_shape[3], v_shape[3])
    widths += (need_q or need_k) * (1 + moves_v) * v_shape[3]
    widths += (need_q * (1 + moves_k) + need_k * (1 + moves_q)) * q_shape[3]
    widths += (need_v and (moves_q or moves_k)) * v_shape[3]
    return 2 * widths * _scores(q_shape, q_ranges, k_offsets, k_ranges)


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for operation, formula in (
        (torch.ops.anchor_attention.attention, _attention),
        (torch.ops.anchor_attention.attention_backward, _attention_backward),
        (torch.ops.anchor_attention.attention_jvp, _attention_jvp),
        (torch.ops.anchor_attention.attention_double_backward, _attention_double_backward),
    ):
        if operation not in flop_registry:
            register_flop_formula(operation)(formula)


class _ThenRegister(Loader):
    """Loads the counter's module as its own loader does, and then registers the formulas."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _WhenImported(MetaPathFinder):
    """Waits for the counter to be imported: that takes 0.3 s where Triton is installed, which it imports in turn."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register() -> None:
    """Registers the formulas: at once where the counter has been imported, else as soon as it is."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
