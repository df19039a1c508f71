"""Training on random cases without end: shapes of the data set at random angles of attack."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import dataset
import torch
from dataset import Cases, Shapes
from model import ModelConfig, flow_condition, make_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import training
from common.training import generator_of_step, relative_errors, rows_of_step


@dataclass(frozen=True)
class TrainingConfig(training.Schedule):
    """How to train: the short training by default. Beside the anchors, as many other points are queries.

    Args:
        mirror: Whether cases are mirrored at random.
    """

    mirror: bool = False

    @classmethod
    def full(cls) -> TrainingConfig:
        """The long training."""
        return cls(seconds=3600.0, steps=4500, mirror=True)


def random_cases(shapes: Shapes, config: TrainingConfig, step: int) -> Cases:
    """Returns the batch of a step: the same in every run, whatever came before."""
    generator = generator_of_step(config, step)
    rows = rows_of_step(len(shapes), config, step)
    low, high = (math.radians(bound) for bound in dataset.TRAINING_ANGLES)
    angle = low + (high - low) * torch.rand(config.batch_size, generator=generator)
    mirrored = torch.rand(config.batch_size, generator=generator) < 0.5 if config.mirror else None
    return dataset.make_cases(shapes, rows, angle, generator, mirrored)


def predict(
    model: training.BranchedModel, cases: Cases, config: TrainingConfig, rank: int = 0, processes: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns predictions and targets by branch: pressure, and the velocity that the body adds to the free stream.

    Of several processes each has its share of every group of tokens.
    """

    def share(points: Tensor) -> Tensor:
        n = points.shape[1]
        return points[:, n * rank // processes : n * (rank + 1) // processes]

    counts = {"surface": config.surface_anchors, "volume": config.volume_anchors}
    anchors = {branch: share(points[:, : counts[branch]]) for branch, points in cases.points.items()}
    queries = {branch: share(points[:, counts[branch] : 2 * counts[branch]]) for branch, points in cases.points.items()}
    prediction = model(share(cases.geometry), anchors, queries, flow_condition(cases.angle))
    target = {
        branch: torch.cat(
            (share(values[:, : counts[branch]]), share(values[:, counts[branch] : 2 * counts[branch]])), 1
        )
        for branch, values in cases.targets.items()
    }
    stream = flow_condition(cases.angle)[:, None]
    return {
        "surface": (prediction["surface"], target["surface"]),
        "volume": (prediction["volume"] - stream, target["volume"] - stream),
    }


def predict_errors(model: training.BranchedModel, cases: Cases, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Returns (B,) twice: relative errors of pressure, and of the velocity that the body adds to the free stream."""
    results = predict(model, cases, config)
    return relative_errors(*results["surface"]), relative_errors(*results["volume"])


class Trainer(training.Trainer):
    """The training of an airfoil model.

    Args:
        shapes: Shapes to train on.
        model_config: Size of the model.
        config: How to train.
        checkpoint: File for the state; read if it is there and was written with the same configurations.
    """

    def __init__(
        self, shapes: Shapes, model_config: ModelConfig, config: TrainingConfig, checkpoint: Path | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        super().__init__(make_model(model_config), len(shapes), config, checkpoint)
        self.shapes, self.cases_config = shapes, config

    def batch_errors(self, step: int) -> dict[str, Tensor]:
        """Returns the mean relative errors of both branches."""
        cases = random_cases(self.shapes, self.cases_config, step)
        surface, volume = predict_errors(self.model, cases, self.cases_config)
        return {"surface": surface.mean(), "volume": volume.mean()}
