"""The surrogate: an anchored-branch transformer for a body in the wind, and its training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import sampling
import torch
from sampling import SURFACE_FEATURES, VOLUME_FEATURES, Batch, Case
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import training
from common.branched import BranchedModel, ModelConfig, Problem
from common.training import generator_of_step, relative_errors, rows_of_step


class TunnelModel(BranchedModel):
    """Predicts the flow around a body in its own frame (:class:`sampling.Frame`).

    Args:
        config: Size of the model.

    Inputs are by branch (B, N, features) float32, as :class:`sampling.Geometry` makes them, and a condition (B, 2).
    Outputs are by branch (B, N, 4): ``"surface"`` pressure coefficient and shear stress times
    :data:`sampling.SHEAR_SCALE`, ``"volume"`` velocity over the wind's and pressure coefficient.
    """

    def __init__(self, config: ModelConfig) -> None:
        problem = Problem(
            n_coordinates=3,
            # The distances from the six sides of the body's box as well: bodies of all sizes are alike in them.
            n_embedded=9,
            n_conditions=2,
            surface_features=SURFACE_FEATURES,
            volume_features=VOLUME_FEATURES,
            surface_outputs=4,
            volume_outputs=4,
            surface_frequencies=6,
            volume_frequencies=5,
            # From a radian in 3 cm, twice a cell at the body, to one in the length of the tunnel.
            rope_wavelength=200.0,
            rope_scale=30.0,
        )
        super().__init__(config, problem)

    def finish(self, outputs: dict[str, Tensor], condition: Tensor) -> dict[str, Tensor]:
        """Adds the wind to the velocity."""
        if "volume" in outputs:
            undisturbed = torch.nn.functional.pad(sampling.wind(condition), (0, 1))
            outputs["volume"] = outputs["volume"] + undisturbed[:, None]
        return outputs


@dataclass(frozen=True)
class TrainingConfig(training.Schedule):
    """How to train.

    Args:
        geometry_points: Points of the body that say what it looks like.
        surface_queries: Points of the body beside its anchors.
        volume_queries: Points around it beside the anchors.
        force_weight: Weight of the error of the force on the points of a sample.
    """

    seconds: float | None = 480.0
    steps: int | None = 2000
    batch_size: int = 2
    surface_anchors: int = 128
    volume_anchors: int = 128
    geometry_points: int = 128
    surface_queries: int = 256
    volume_queries: int = 256
    force_weight: float = 0.5


def quantities(surface: Tensor, volume: Tensor, undisturbed: Tensor) -> dict[str, Tensor]:
    """Splits outputs or targets of both branches, (B, N, 4) each; the velocity without the wind, (B, 3)."""
    return {
        "pressure": surface[..., :1],
        "shear": surface[..., 1:],
        "velocity": volume[..., :3] - undisturbed[:, None],
        "volume_pressure": volume[..., 3:],
    }


def force(surface: Tensor, normals: Tensor, areas: Tensor) -> Tensor:
    """Returns (B, 3): the mean of the stress, weighted by the areas.

    Args:
        surface: (B, N, 4) outputs or targets of the surface branch.
        normals: (B, N, 3).
        areas: (B, N) in units of their mean.
    """
    stress = surface[..., 1:] / sampling.SHEAR_SCALE - surface[..., :1] * normals
    return (areas[..., None] * stress).mean(dim=1)


def split_points(points: dict[str, Tensor], anchors: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns anchors and queries: the first points of each branch, and the others."""
    return (
        {branch: those[:, : anchors[branch]] for branch, those in points.items()},
        {branch: those[:, anchors[branch] :] for branch, those in points.items()},
    )


class Trainer(training.Trainer):
    """The training of a :class:`TunnelModel`.

    Args:
        cases: Cases to learn from.
        model_config: Size of the model.
        config: How to train.
        checkpoint: File for the state; read if it is there and was written with the same configurations.
    """

    def __init__(
        self, cases: list[Case], model_config: ModelConfig, config: TrainingConfig, checkpoint: Path | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        super().__init__(TunnelModel(model_config), len(cases), config, checkpoint)
        self.cases, self.cases_config = cases, config

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step: the same in every run, whatever came before."""
        config = self.cases_config
        counts = {
            "surface": config.surface_anchors + config.surface_queries,
            "volume": config.volume_anchors + config.volume_queries,
        }
        rows = rows_of_step(len(self.cases), config, step).tolist()
        generator = generator_of_step(config, step)
        return sampling.draw([self.cases[row] for row in rows], config.geometry_points, counts, generator)

    def batch_errors(self, step: int) -> dict[str, Tensor]:
        """Returns the relative errors of a step's batch, and that of the force, which is relative to its size."""
        batch = self.batch(step)
        config = self.cases_config
        counts = {"surface": config.surface_anchors, "volume": config.volume_anchors}
        prediction = self.model(batch.geometry, *split_points(batch.points, counts), batch.condition)
        undisturbed = sampling.wind(batch.condition)
        predicted = quantities(prediction["surface"], prediction["volume"], undisturbed)
        target = quantities(batch.targets["surface"], batch.targets["volume"], undisturbed)
        errors = {name: relative_errors(predicted[name], target[name]).mean() for name in target}
        if config.force_weight:
            normals = batch.points["surface"][..., -3:]
            off = force(prediction["surface"] - batch.targets["surface"], normals, batch.areas)
            scale = force(batch.targets["surface"], normals, batch.areas).norm(dim=1)
            errors["force"] = config.force_weight * (off.norm(dim=1) / scale).mean()
        return errors
