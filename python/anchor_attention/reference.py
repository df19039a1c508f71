"""The operation in plain PyTorch: the definition that the fused kernels are held against, and a selectable back-end."""

from __future__ import annotations

import torch

from ._dtypes import working_dtype
from .key_range_table import KeyRangeTable


def rope_reference(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs by complex factors; see :func:`anchor_attention.rope`."""
    working = working_dtype(x.dtype)
    re, im = x[..., ::2].to(working), x[..., 1::2].to(working)
    cos, sin = freqs.real.to(working).unsqueeze(2), freqs.imag.to(working).unsqueeze(2)
    return torch.stack((re * cos - im * sin, re * sin + im * cos), dim=-1).flatten(-2).to(x.dtype)


def anchor_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: KeyRangeTable,
    *,
    q_freqs: torch.Tensor | None = None,
    k_freqs: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with per-group key ranges, group by group; see :func:`anchor_attention.anchor_attention`.

    Computes in float32 (float64 for float64) from q, k and v as they are, and rounds the output once.
    """
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if q_freqs is not None:
        q = rope_reference(q, q_freqs)
    if k_freqs is not None:
        k = rope_reference(k, k_freqs)
    working = working_dtype(q.dtype)
    shared_by = q.shape[2] // max(k.shape[2], 1)
    if shared_by > 1:
        k, v = k.repeat_interleave(shared_by, dim=2), v.repeat_interleave(shared_by, dim=2)
    queries, keys, values = (tensor.to(working).transpose(1, 2) for tensor in (q, k, v))
    # By pieces of the query axis, none of them written in place: every transformation of torch.func applies.
    outs, lses = [], []
    covered = 0

    def append_rows_without_keys(end: int) -> None:
        # Zeros that hang on the queries: with an empty table, too, the output can be differentiated.
        zeros = queries[:, :, covered:end, :1].masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
        outs.append(zeros.repeat(1, 1, 1, v.shape[-1]))
        lses.append(zeros.squeeze(-1) - torch.inf)

    for (q_begin, q_end), key_ranges in sorted(table.entries()):
        if not key_ranges or q_begin == q_end:
            continue
        append_rows_without_keys(q_begin)
        covered = q_end
        rows = slice(q_begin, q_end)
        index = torch.cat([torch.arange(begin, end, device=q.device) for begin, end in key_ranges])
        group_keys, group_values = keys[:, :, index], values[:, :, index]
        if key_mask is not None:
            # What is masked may hold anything, and 0 · NaN is not 0.
            dropped = ~key_mask[:, None, index, None]
            group_keys, group_values = group_keys.masked_fill(dropped, 0.0), group_values.masked_fill(dropped, 0.0)
        scores = queries[:, :, rows] @ group_keys.transpose(-1, -2) * scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, index], -torch.inf)
        # A row without keys has scores of −inf. Zeros there, and results put right, keep NaN out of derivatives
        # of every order.
        alone = (scores == -torch.inf).all(-1)
        scores = scores.masked_fill(alone.unsqueeze(-1), 0.0)
        group_lse = torch.logsumexp(scores, dim=-1)
        group_out = torch.exp(scores - group_lse.unsqueeze(-1)) @ group_values
        outs.append(group_out.masked_fill(alone.unsqueeze(-1), 0.0))
        lses.append(group_lse.masked_fill(alone, -torch.inf))
    append_rows_without_keys(queries.shape[2])
    out = torch.cat(outs, dim=2).transpose(1, 2).contiguous().to(q.dtype)
    return (out, torch.cat(lses, dim=2)) if return_lse else out
