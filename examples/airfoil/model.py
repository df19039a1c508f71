"""A small anchored-branch transformer for the flow around airfoils: pressure along the contour, velocity around it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import branched
from common.branched import BRANCHES, BranchedModel, KVCache, Problem

__all__ = ["BRANCHES", "AirfoilModel", "KVCache", "ModelConfig", "flow_condition"]

SURFACE_FEATURES = 6
VOLUME_FEATURES = 2


@dataclass(frozen=True)
class ModelConfig(branched.ModelConfig):
    """Size of the model; the short training's by default."""

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
            volume_outputs=2,
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
