"""Rotary position embedding of continuous coordinates: frequencies, and the legacy real form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import working_dtype
from .config import RopeFrequencyConfig


class RopeFrequency(nn.Module):
    """Turns coordinates into the rotary factors that the attention modules take as ``freqs``.

    Every axis of the coordinates gets the same number n of frequencies, ``max_wavelength ** (-i / n)`` for i < n. What
    is left of the head (``hidden_dim - 2 * n * input_dim`` dimensions) is not rotated. Method: rotary embeddings of
    Su et al., https://arxiv.org/abs/2104.09864, with one block of pairs per axis.

    Args:
        hidden_dim: Width of one attention head, even; or a config object with these fields.
        input_dim: Number of coordinates.
        max_wavelength: Ratio of the fastest frequency, 1 radian per unit length, to the limit of the slowest ones.
        implementation: ``"complex"`` or, as a legacy form, ``"real"``.

    Raises:
        ValueError: If a field is out of its range.
    """

    omega: Tensor

    def __init__(
        self,
        hidden_dim: Any,
        input_dim: int | None = None,
        max_wavelength: float = 10000.0,
        implementation: str = "complex",
    ) -> None:
        super().__init__()
        if hasattr(hidden_dim, "hidden_dim"):
            given = hidden_dim
            hidden_dim, input_dim = given.hidden_dim, given.input_dim
            max_wavelength = getattr(given, "max_wavelength", max_wavelength)
            implementation = getattr(given, "implementation", implementation)
        elif input_dim is None:
            raise ValueError("input_dim must be the number of coordinates, got None")
        config = RopeFrequencyConfig(
            hidden_dim=hidden_dim, input_dim=input_dim, max_wavelength=max_wavelength, implementation=implementation
        )
        self.hidden_dim = config.hidden_dim
        self.input_dim = config.input_dim
        self.max_wavelength = config.max_wavelength
        self.implementation = config.implementation
        n_frequencies = config.hidden_dim // config.input_dim // 2
        self.padding = config.hidden_dim - 2 * n_frequencies * config.input_dim
        self.register_buffer("omega", self._frequencies(n_frequencies))

    def _frequencies(self, n_frequencies: int, device: torch.device | None = None) -> Tensor:
        exponents = torch.arange(n_frequencies, dtype=torch.float32, device=device) / n_frequencies
        return 1.0 / self.max_wavelength**exponents

    def reset_parameters(self) -> None:
        """Computes the frequencies anew, for example after ``to_empty``."""
        self.omega.copy_(self._frequencies(self.omega.shape[0], self.omega.device))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RopeFrequency:
        was_meta = self.omega.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.omega.is_meta:
            # There were no values to move.
            self.reset_parameters()
        # Angles are frequency times coordinate: in half precision they would be off by radians for distant points.
        if self.omega.dtype not in (torch.float32, torch.float64):
            self.omega = self._frequencies(self.omega.shape[0], self.omega.device)
        return self

    def forward(self, coords: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Computes the factors. Gradients flow to the coordinates.

        Args:
            coords: (..., N, input_dim), any floating-point type; the angles are float32 (float64 after ``.double()``).

        Returns:
            ``"complex"``: (..., N, hidden_dim / 2) complex64, of modulus 1, first the pairs of the first axis, padded
            with 1. ``"real"``: for every axis the angles (..., N, 2 n) in radians, the n frequencies twice.

        Raises:
            ValueError: If the last dimension of ``coords`` is not ``input_dim``.
        """
        if coords.dim() < 1 or coords.shape[-1] != self.input_dim:
            raise ValueError(f"coords must be (..., {self.input_dim}), got shape {tuple(coords.shape)}")
        # An elementwise product is left alone by autocast, and has no TF32 form.
        angles = coords.to(self.omega.dtype).unsqueeze(-1) * self.omega
        if self.implementation == "real":
            return torch.cat((angles, angles), dim=-1).unbind(-2)
        angles = nn.functional.pad(angles.flatten(-2), (0, self.padding // 2))
        return torch.polar(torch.ones_like(angles), angles)

    def extra_repr(self) -> str:
        return (
            f"hidden_dim={self.hidden_dim}, input_dim={self.input_dim}, max_wavelength={self.max_wavelength}, "
            f"implementation={self.implementation!r}"
        )


def rotate_half_rope(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    """Rotates each axis' block of the head by its angles, halves of the block being the pairs.

    Args:
        x: (B, N, H, D).
        angles: For every axis (B or 1, N, block) in radians, blocks even and together at most D wide. Dimensions behind
            the last block stay as they are.

    Returns:
        (B, N, H, D) of x's type, computed in float32 (float64 for float64).

    Raises:
        ValueError: If there is no axis, a block is odd, or the blocks are wider than the head.
    """
    widths = [angle.shape[-1] for angle in angles]
    if not widths or any(width % 2 for width in widths) or sum(widths) > x.shape[-1]:
        raise ValueError(
            f"freqs must be angles of even widths, together at most the head dimension {x.shape[-1]}, got {widths}"
        )
    compute_type = working_dtype(x.dtype)
    *blocks, rest = torch.split(x.to(compute_type), [*widths, x.shape[-1] - sum(widths)], dim=-1)
    rotated = []
    for block, angle in zip(blocks, angles, strict=True):
        angle = angle.to(compute_type).unsqueeze(2)
        first, second = block.chunk(2, dim=-1)
        rotated.append(block * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin())
    return torch.cat((*rotated, rest), dim=-1).to(x.dtype)
