"""The second derivative of the attention in plain PyTorch, for devices that have no kernel for it: GPUs.

Exact and of bounded memory, but not fused: scores exist for some rows of queries at a time. The formulas are those of
csrc/kernels/cpu/vector/attention_double_backward_tile.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from . import argument_checks
from ._dtypes import working_dtype

# Limit on the elements of a block's scores.
_BLOCK_SCORES = 1 << 24

Ranges = Sequence[int]
Optional = torch.Tensor | None


def attention_double_backward(
    grad_out: torch.Tensor,
    grad_lse: Optional,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_tangent: Optional,
    k_tangent: Optional,
    v_tangent: Optional,
    q_ranges: Ranges,
    k_offsets: Ranges,
    k_ranges: Ranges,
    key_mask: Optional,
    scale: float | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[torch.Tensor, ...]:
    """The operation ``attention_double_backward``, with its arguments."""
    argument_checks.attention(q, k, v, q_ranges, k_offsets, k_ranges, None, key_mask, scale)
    argument_checks.attention_tangents(q, k, v, q_tangent, k_tangent, v_tangent, stacked=False)
    argument_checks.attention_backward(grad_out, grad_lse, q, v, out, lse, None, False)
    out_tangent, lse_tangent = torch.zeros_like(out), torch.zeros_like(lse)
    grad_q, grad_k, grad_v = (tensor.new_zeros(tensor.shape, dtype=lse.dtype) for tensor in (q, k, v))
    for block in _blocks(q, k, v, q_ranges, k_offsets, k_ranges, key_mask, scale):
        weighted, mean = block.tangent(q_tangent, k_tangent)
        grad_rows = block.of_rows(grad_out)
        moved = weighted @ block.values
        grad_probabilities = grad_rows @ block.values.mT
        centred = grad_probabilities - (grad_probabilities * block.probabilities).sum(-1, keepdim=True)
        if grad_lse is not None:
            centred = centred + grad_lse[:, :, block.rows, None]
        grad_scores = weighted * centred
        if v_tangent is not None:
            value_tangents = block.gathered(v_tangent)
            moved = moved + block.probabilities @ value_tangents
            grad_scores = grad_scores + block.probabilities * (grad_rows @ value_tangents.mT)
        grad_scores = grad_scores - block.probabilities * (grad_rows * moved).sum(-1, keepdim=True)
        out_tangent[:, block.rows] = block.to_rows(moved)
        lse_tangent[:, :, block.rows] = mean.squeeze(-1)
        of_tangents = block.probabilities * centred
        of_q, of_k = grad_scores @ block.keys, grad_scores.mT @ block.queries
        if k_tangent is not None:
            of_q = of_q + of_tangents @ block.gathered(k_tangent)
        if q_tangent is not None:
            of_k = of_k + of_tangents.mT @ block.of_rows(q_tangent)
        grad_q[:, block.rows] = block.to_rows(of_q * block.scale)
        block.add_to_keys(grad_k, of_k * block.scale)
        block.add_to_keys(grad_v, weighted.mT @ grad_rows)
    needs = ((grad_q, need_q), (grad_k, need_k), (grad_v, need_v))
    gradients = [grad.to(q.dtype) if needed else q.new_empty(0) for grad, needed in needs]
    return out_tangent, lse_tangent, *gradients


@dataclass
class _Block:
    """Some queries of a group against all of its keys, heads first, in the working type."""

    rows: slice
    key_ranges: list[tuple[int, int]]
    kept: Optional  # (batch, 1, keys, 1), the keys that the mask keeps
    scale: float
    shared_by: int  # heads of queries per head of keys
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    probabilities: torch.Tensor
    lse: torch.Tensor

    def of_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, self.rows].transpose(1, 2).to(self.queries.dtype)

    @staticmethod
    def to_rows(rows: torch.Tensor) -> torch.Tensor:
        return rows.transpose(1, 2)

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return _gathered(tensor, self.key_ranges, self.kept, self.shared_by, self.queries.dtype)

    def tangent(self, q_tangent: Optional, k_tangent: Optional) -> tuple[torch.Tensor, torch.Tensor]:
        """P · (T − mean), the tangents of the probabilities, and the mean of T in each row; T: those of the scores."""
        scores = torch.zeros_like(self.probabilities)
        if q_tangent is not None:
            scores = self.of_rows(q_tangent) @ self.keys.mT * self.scale
        if k_tangent is not None:
            scores = scores + self.queries @ self.gathered(k_tangent).mT * self.scale
        mean = (self.probabilities * scores).sum(-1, keepdim=True)
        return self.probabilities * (scores - mean), mean

    def add_to_keys(self, sums: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds one range after the other, so that the order of the additions is the same in every run."""
        rows = torch.unflatten(rows, 1, (-1, self.shared_by)).sum(2).transpose(1, 2)
        begin = 0
        for first, last in self.key_ranges:
            sums[:, first:last] += rows[:, begin : begin + last - first]
            begin += last - first


def _gathered(
    tensor: torch.Tensor, key_ranges: list[tuple[int, int]], kept: Optional, shared_by: int, dtype: torch.dtype
) -> torch.Tensor:
    rows = torch.cat([tensor[:, begin:end] for begin, end in key_ranges], dim=1).transpose(1, 2).to(dtype)
    if kept is not None:
        # Masked keys may hold anything, and 0 · NaN is not 0.
        rows = rows.masked_fill(~kept, 0.0)
    return rows.repeat_interleave(shared_by, dim=1)


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: Ranges,
    k_offsets: Ranges,
    k_ranges: Ranges,
    key_mask: Optional,
    scale: float | None,
) -> Iterator[_Block]:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    shared_by = q.shape[2] // max(k.shape[2], 1)
    working = working_dtype(q.dtype)
    bounds = zip(q_ranges[::2], q_ranges[1::2], pairwise(k_offsets), strict=True)
    for q_begin, q_end, (first, last) in bounds:
        key_ranges = [(k_ranges[2 * r], k_ranges[2 * r + 1]) for r in range(first, last)]
        n_keys = sum(end - begin for begin, end in key_ranges)
        if n_keys == 0:
            continue
        kept = None
        if key_mask is not None:
            kept = torch.cat([key_mask[:, begin:end] for begin, end in key_ranges], dim=1)[:, None, :, None]
        keys, values = (_gathered(tensor, key_ranges, kept, shared_by, working) for tensor in (k, v))
        step = max(_BLOCK_SCORES // max(q.shape[0] * q.shape[2] * n_keys, 1), 1)
        for begin in range(q_begin, q_end, step):
            rows = slice(begin, min(begin + step, q_end))
            queries = q[:, rows].transpose(1, 2).to(working)
            scores = queries @ keys.mT * scale
            if kept is not None:
                scores = scores.masked_fill(~kept.mT, -torch.inf)
            lse = torch.logsumexp(scores, dim=-1)
            # Rows without keys have probabilities of 0.
            probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
            yield _Block(rows, key_ranges, kept, scale, shared_by, queries, keys, values, probabilities, lse)


torch.library.impl("anchor_attention::attention_double_backward", "CUDA", attention_double_backward)
