"""A small anchored-branch transformer for the flow around airfoils: pressure along the contour, velocity around it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anchor_attention import physics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import branched
from common.branched import BRANCHES, BranchedModel, KVCache, Problem

__all__ = ["BRANCHES", "AirfoilModel", "KVCache", "ModelConfig", "flow_condition", "make_model"]

SURFACE_FEATURES = 6
VOLUME_FEATURES = 2
# Where the velocity comes from: the last layer; a stream function, differentiated exactly; a stream function,
# differentiated by central differences.
VELOCITIES = ("direct", "stream_function", "stream_function_differences")
# Chords. A step of 1e-2 blurs the fastest rotation, which turns by a radian on it; 1e-4 loses float32's digits.
DIFFERENCE_STEP = 1e-3


@dataclass(frozen=True)
class ModelConfig(branched.ModelConfig):
    """Size of the model; the short training's by default.

    Args:
        velocity: Where the velocity comes from, one of :data:`VELOCITIES`.
    """

    velocity: str = "direct"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.velocity not in VELOCITIES:
            raise ValueError(f"velocity must be one of {', '.join(VELOCITIES)}, got {self.velocity!r}")

    @classmethod
    def full(cls) -> ModelConfig:
        """The model of the long training."""
        return cls(dim=128, num_heads=4)


def flow_condition(angle: Tensor) -> Tensor:
    """Returns (B, 2): the direction of the free stream for (B,) angles of attack in radians."""
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


class AirfoilModel(BranchedModel):
    """Predicts pressure coefficient and velocity for a body at an angle of attack.

    Args:
        config: Size of the model.

    Inputs are dictionaries by branch of (B, N, features) float32, :data:`SURFACE_FEATURES` wide for ``"surface"`` and
    :data:`VOLUME_FEATURES` for ``"volume"``; the first two features are the coordinates in chords. The condition is
    :func:`flow_condition`. Outputs are dictionaries by branch: ``"surface"`` (B, N, 1), the pressure coefficient, and
    ``"volume"`` (B, N, 2), the velocity in units of the free stream.
    """

    def __init__(self, config: ModelConfig) -> None:
        problem = Problem(
            n_coordinates=2,
            n_embedded=2,
            n_conditions=2,
            surface_features=SURFACE_FEATURES,
            volume_features=VOLUME_FEATURES,
            surface_outputs=1,
            volume_outputs=2 if config.velocity == "direct" else 1,
            surface_frequencies=8,
            volume_frequencies=7,
            # The fastest frequency turns by a radian in a 100th of a chord. Faster ones leave grain in the fields,
            # slower ones blur the velocity near the wall; the features of the contour points resolve the leading edge.
            rope_wavelength=300.0,
            rope_scale=100.0,
        )
        super().__init__(config, problem)

    def finish(self, outputs: dict[str, Tensor], condition: Tensor) -> dict[str, Tensor]:
        """Adds the free stream to the velocity."""
        if "volume" in outputs:
            outputs["volume"] = outputs["volume"] + condition[:, None]
        return outputs


class StreamFunctionModel(AirfoilModel):
    """Predicts a stream function beside the pressure, and of it the velocity: (∂ψ/∂y, −∂ψ/∂x), without divergence.

    Points are differentiated as queries against the anchors, which stay where they are. An anchor's velocity is that of
    a query in its place. Inputs and outputs are those of :class:`AirfoilModel`.
    """

    def forward(
        self, geometry: Tensor, anchors: Mapping[str, Tensor], queries: Mapping[str, Tensor], condition: Tensor
    ) -> dict[str, Tensor]:
        """As :meth:`BranchedModel.forward`: one pass of anchors and contour, then the points of the volume."""
        others = {branch: points for branch, points in queries.items() if branch != "volume"}
        outputs, caches = self.predict_and_encode(geometry, anchors, others, condition)
        points = [group["volume"] for group in (anchors, queries) if "volume" in group]
        return outputs | self.decode({"volume": torch.cat(points, dim=1)}, condition, caches)

    def decode(self, queries: Mapping[str, Tensor], condition: Tensor, caches: list[KVCache]) -> dict[str, Tensor]:
        """As :meth:`BranchedModel.decode`; the velocity is a derivative by the coordinates of the queries."""
        others = {branch: points for branch, points in queries.items() if branch != "volume"}
        outputs = super().decode(others, condition, caches) if others else {}
        if "volume" in queries:
            by_x, by_y = self._slopes(queries["volume"], condition, caches).unbind(-1)
            outputs["volume"] = condition[:, None] + torch.stack([by_y, -by_x], dim=-1)
        return outputs

    def stream_function(self, points: Tensor, condition: Tensor, caches: list[KVCache]) -> Tensor:
        """What the body adds to the stream function at points, (B, N, 2) -> (B, N, 1), in chords times free stream."""
        return super().decode({"volume": points}, condition, caches)["volume"]

    def finish(self, outputs: dict[str, Tensor], condition: Tensor) -> dict[str, Tensor]:
        """The free stream is added to the velocity, and not to the stream function."""
        return outputs

    def _slopes(self, points: Tensor, condition: Tensor, caches: list[KVCache]) -> Tensor:
        """(B, N, 2): the stream function's derivatives. Two tangents, so a loss is reverse over forward."""

        def decoder(points: Tensor) -> Tensor:
            return self.stream_function(points, condition, caches)

        if self.config.velocity == "stream_function":
            return physics.jacobian(decoder, points)[1].squeeze(-2)
        steps = DIFFERENCE_STEP * torch.eye(2, dtype=points.dtype)
        shifted = points[:, None] + torch.cat([steps, -steps])[:, None]
        ahead, behind = decoder(shifted.flatten(1, 2)).unflatten(1, shifted.shape[1:3]).chunk(2, dim=1)
        slopes: Tensor = (ahead - behind).squeeze(-1).transpose(1, 2) / (2 * DIFFERENCE_STEP)
        return slopes


def make_model(config: ModelConfig) -> AirfoilModel:
    """The model of a configuration."""
    return AirfoilModel(config) if config.velocity == "direct" else StreamFunctionModel(config)
