"""A bias of the scores by squared distance, folded into channels of queries and keys."""

from __future__ import annotations

import math

import torch

from ._dtypes import working_dtype


def with_distance_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    strength: float | torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Adds channels to queries and keys that add −strength · ‖x − y‖² to every score.

    The squared distance is a sum of products, ‖x‖² · 1 − 2 <x, y> + 1 · ‖y‖², so n + 2 channels hold all of it, and no
    bias of size Nq × Nk exists. Values keep their size, which may differ from that of queries and keys. Positions are
    taken relative to the mean of the keys' positions, which changes no distance and keeps the products small; in 16-bit
    types they are as coarse as the type.

    If q and k are to be rotated, rotate them first (:func:`rope`). With the results q', k' and scale::

        out = anchor_attention(q', k', v, table, scale=scale)

    Args:
        q: (B, Nq, H, D) queries.
        k: (B, Nk, Hk, D) keys.
        q_positions: (B or 1, Nq, n) coordinates of the queries.
        k_positions: (B or 1, Nk, n) coordinates of the keys.
        strength: Factor of the squared distance: a number, or a tensor of one element, which may be learnt. Below 0,
            distant keys get more weight.
        scale: Factor of the products <q, k>, not of the distances; D^-½ when None. Not 0.

    Returns:
        q' (B, Nq, H, D + n + 2), k' (B, Nk, Hk, D + n + 2) and the scale to call the operation with.

    Raises:
        ValueError: If positions do not fit, strength has several elements, or scale is 0 or not finite.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if isinstance(strength, torch.Tensor) and strength.numel() != 1:
        raise ValueError(f"strength must be a number or a tensor of one element, got shape {tuple(strength.shape)}")
    for name, positions, tensor in (("q_positions", q_positions, q), ("k_positions", k_positions, k)):
        fits = positions.dim() == 3 and positions.shape[0] in (1, tensor.shape[0])
        if not fits or positions.shape[1] != tensor.shape[1] or positions.shape[2] != k_positions.shape[-1]:
            raise ValueError(
                f"{name} must be ({tensor.shape[0]} or 1, {tensor.shape[1]}, {k_positions.shape[-1]}), "
                f"got shape {tuple(positions.shape)}"
            )
    working = working_dtype(q.dtype)
    x, y = q_positions.to(working), k_positions.to(working)
    if y.shape[1] > 0:
        origin = y.mean(dim=(0, 1), keepdim=True)
        x, y = x - origin, y - origin
    factor = strength / scale
    of_queries = (2 * factor * x, -factor * x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1]))
    of_keys = (y, torch.ones_like(y[..., :1]), -factor * y.square().sum(-1, keepdim=True))
    return _with_channels(q, of_queries), _with_channels(k, of_keys), scale


def _with_channels(tensor: torch.Tensor, channels: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Appends the same channels to those of every head."""
    added = torch.cat(channels, dim=-1).to(tensor.dtype).unsqueeze(2)
    return torch.cat([tensor, added.expand(*tensor.shape[:3], -1)], dim=-1)
