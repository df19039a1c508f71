"""Outputs together with their derivatives with respect to the coordinates of the queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from .sources import ONLY

Decode = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class WithJacobian:
    """A ``decode`` for :func:`stream` that returns the values and their first derivatives with respect to coordinates.

    Every output becomes two: itself, and, under its name with ``"_jacobian"``, (B, n, C · d), the derivatives of its
    first channel with respect to all coordinates, then those of the second one, and so on. An output without a name is
    then called ``"values"``, and its derivatives ``"jacobian"``. All d derivatives are exact and share one pass, where
    finite differences would need 2 · d more queries.

    Args:
        decode: As :func:`stream` takes it. Outputs of a query depend on that query alone.
        n_coordinates: d, the number of coordinates: they are the first features of a query, of every branch.
    """

    decode: Decode
    n_coordinates: int

    def __post_init__(self) -> None:
        if self.n_coordinates < 1:
            raise ValueError(f"n_coordinates must be at least 1, got {self.n_coordinates}")

    def __call__(self, cache: Any, queries: Any) -> dict[str, Tensor]:
        named = dict(queries) if isinstance(queries, Mapping) else {ONLY: queries}
        for name, chunk in named.items():
            if chunk.shape[-1] < self.n_coordinates:
                raise ValueError(
                    f"queries {name!r} must have at least {self.n_coordinates} features, which are their coordinates, "
                    f"got shape {tuple(chunk.shape)}"
                )

        def outputs_at(named: dict[str, Tensor]) -> dict[str, Tensor]:
            result = self.decode(cache, named if isinstance(queries, Mapping) else named[ONLY])
            return dict(result) if isinstance(result, Mapping) else {ONLY: result}

        def along(axis: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            # Branches don't read each other's queries: one direction serves all of them.
            directions = {}
            for name, chunk in named.items():
                padding = axis.new_zeros(chunk.shape[-1] - self.n_coordinates)
                directions[name] = torch.cat([axis, padding]).to(chunk.dtype).expand(chunk.shape)
            result: Any = jvp(outputs_at, (named,), (directions,))
            values, slopes = result
            return values, slopes

        device = next(iter(named.values())).device
        out_dims: Any = (None, -1)
        values, slopes = vmap(along, out_dims=out_dims)(torch.eye(self.n_coordinates, device=device))
        outputs = {name or "values": value for name, value in values.items()}
        return outputs | {f"{name}_jacobian" if name else "jacobian": s.flatten(-2) for name, s in slopes.items()}
