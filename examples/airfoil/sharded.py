"""Training in which every case is spread over several processes: under ``torchrun`` each has its share of the points.

The loss and its gradient are those of one process, and so is the training: same batches, same loss curve.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from dataset import Shapes
from model import AirfoilModel, ModelConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from training import Trainer, TrainingConfig, predict, random_cases

from anchor_attention.distributed import SequenceParallelAttention


class ShardedTrainer(Trainer):
    """The training of an :class:`AirfoilModel` in several processes.

    Args:
        shapes: Shapes to train on.
        model_config: Size of the model.
        config: How to train: by steps alone.
        checkpoint: As for :class:`Trainer`; the first process writes it.
        mesh: The processes.
    """

    def __init__(
        self,
        shapes: Shapes,
        model_config: ModelConfig,
        config: TrainingConfig,
        checkpoint: Path | None,
        mesh: DeviceMesh,
    ) -> None:
        if config.seconds is not None:
            raise ValueError(f"seconds must be None in several processes, whose clocks differ, got {config.seconds}")
        super().__init__(shapes, model_config, config, checkpoint)
        self.mesh = mesh
        parallelize_module(self.model, mesh, SequenceParallelAttention())

    def batch_errors(self, step: int) -> dict[str, Tensor]:
        """Returns the mean relative errors of both branches, of all points; the gradient is that of this share."""
        cases = random_cases(self.shapes, self.cases_config, step)
        shares = predict(self.model, cases, self.cases_config, self.mesh.get_local_rank(), self.mesh.size())
        errors = {}
        for branch, (prediction, target) in shares.items():
            squares = (prediction - target).square().flatten(1).sum(1)
            scale = self._total(target.square().flatten(1).sum(1))
            # The value of all processes, with the derivative by what this one adds to it.
            everywhere = squares + (self._total(squares.detach()) - squares.detach())
            errors[branch] = (everywhere / scale).sqrt().mean()
        return errors

    def differentiate(self, loss: Tensor) -> None:
        """Every process has its part of the gradient, of which the sum is the gradient."""
        loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        flat = self._total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def save(self) -> None:
        """Writes the checkpoint, which is the same on every process."""
        if self.mesh.get_local_rank() == 0:
            super().save()

    def _total(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=self.mesh.get_group())
        return total


def start(shapes: Shapes, model_config: ModelConfig, config: TrainingConfig, checkpoint: Path | None) -> ShardedTrainer:
    """Joins the processes that ``torchrun`` has started."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tokens",))
    return ShardedTrainer(shapes, model_config, config, checkpoint, mesh)


def finish(trainer: ShardedTrainer) -> bool:
    """Leaves the processes. The first one goes on, with a model of its own that takes whole cases."""
    goes_on = trainer.mesh.get_local_rank() == 0
    model = AirfoilModel(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    trainer.model = model
    dist.destroy_process_group()
    return goes_on
