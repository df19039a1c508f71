"""Training: a schedule that follows steps or wall-clock time, checkpoints that resume."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .branched import BranchedModel
from .muon import Muon

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        seconds: Wall-clock time of training at most, or ``None`` for no limit.
        steps: Number of steps at most, or ``None`` for no limit; one of the two is needed. The learning rate follows
            whichever of the two is nearer to its end: a machine that is too slow for the steps ends with a smaller
            training, not with an unfinished one.
        batch_size: Cases per step.
        surface_anchors: Anchors among the points of the body.
        volume_anchors: Anchors among the points around it.
        learning_rate: Peak learning rate of the matrices inside the blocks (Muon).
        adam_learning_rate: Peak learning rate of everything else (AdamW).
        weight_decay: Decoupled weight decay of the matrices.
        warmup: Share of the training in which the learning rate rises.
        seed: Seed of initialisation and batches.
    """

    seconds: float | None = 300.0
    steps: int | None = 1500
    batch_size: int = 4
    surface_anchors: int = 48
    volume_anchors: int = 64
    learning_rate: float = 0.02
    adam_learning_rate: float = 4e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds is None and self.steps is None:
            raise ValueError("seconds or steps must be given, got None for both")

    def limited(self, steps: int | None, seconds: float | None) -> Self:
        """Returns the same training within the limits that a command line gave, ``None`` for one that it did not."""
        if steps is not None:
            return replace(self, steps=steps, seconds=seconds)
        if seconds is not None:
            return replace(self, seconds=seconds, steps=None)
        return self

    def progress(self, step: int, seconds: float) -> float:
        """Share of the training that is done, at most 1."""
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_time = seconds / self.seconds if self.seconds is not None else 0.0
        return min(max(by_steps, by_time), 1.0)


@dataclass(frozen=True)
class Progress:
    """What one step reports: ``loss`` is the mean of the batch's relative ``errors`` by quantity."""

    step: int
    share: float
    loss: float
    errors: Mapping[str, float]
    learning_rate: float


def rows_of_step(n_cases: int, config: Schedule, step: int) -> Tensor:
    """Returns (batch_size,) int64: rows that run through random permutations, so that all are seen equally often."""
    first = step * config.batch_size
    rows = torch.empty(config.batch_size, dtype=torch.int64)
    for epoch in range(first // n_cases, (first + config.batch_size - 1) // n_cases + 1):
        order = torch.randperm(
            n_cases, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + 500_000 + epoch)
        )
        begin, end = max(first, epoch * n_cases), min(first + config.batch_size, (epoch + 1) * n_cases)
        rows[begin - first : end - first] = order[begin - epoch * n_cases : end - epoch * n_cases]
    return rows


def generator_of_step(config: Schedule, step: int) -> torch.Generator:
    """Returns the generator of a step's random numbers: the same in every run, whatever came before."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


def relative_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns (B,): the relative L2 error of each case."""
    errors: Tensor = (prediction - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
    return errors


class Trainer:
    """Model, optimisers and their state on the way through a training. A subclass has the batches: ``batch_errors``.

    Args:
        model: The model, initialised.
        n_cases: Number of cases to train on: a checkpoint of another number is refused.
        config: How to train.
        checkpoint: File for the state; read if it is there and was written with the same configurations.
        checkpoint_seconds: Time between two writes.
    """

    def __init__(
        self,
        model: BranchedModel,
        n_cases: int,
        config: Schedule,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 20.0,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.checkpoint_seconds = checkpoint_seconds
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.signature = {"model": asdict(model.config), "training": asdict(config), "shapes": n_cases}
        self.model = model
        blocks = (self.model.geometry_blocks, self.model.read_geometry, self.model.blocks, self.model.decoders)
        matrices = {p for module in blocks for p in module.parameters() if p.dim() == 2}
        matrices -= {p for name, p in self.model.named_parameters() if "modulation" in name}
        others = [p for p in self.model.parameters() if p not in matrices]
        ordered = [p for p in self.model.parameters() if p in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(ordered, lr=config.learning_rate, weight_decay=config.weight_decay),
            torch.optim.AdamW(others, lr=config.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.peaks = (config.learning_rate, config.adam_learning_rate)
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)

    @property
    def done(self) -> float:
        """Share of the training that is done."""
        return self.config.progress(self.step, self.seconds)

    def run(self) -> Iterator[Progress]:
        """Trains to the end, one item a step. Whoever stops early leaves a checkpoint behind."""
        started, at_start = time.monotonic(), self.seconds
        cpu_started, cpu_at_start = time.process_time(), self.cpu_seconds
        written = started
        self.model.train()
        try:
            while self.done < 1:
                yield self._train_step()
                now = time.monotonic()
                self.seconds = at_start + now - started
                self.cpu_seconds = cpu_at_start + time.process_time() - cpu_started
                if now - written > self.checkpoint_seconds:
                    self.save()
                    written = now
        finally:
            self.save()

    def _train_step(self) -> Progress:
        share = self.done
        factor = min(share / self.config.warmup, 1.0) if self.config.warmup else 1.0
        factor = max(factor, 1e-2) * (1 - share)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * peak
            optimizer.zero_grad(set_to_none=True)
        errors = self.batch_errors(self.step)
        loss = torch.stack(list(errors.values())).sum()
        self.differentiate(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        values = {name: error.item() for name, error in errors.items()}
        return Progress(self.step, share, sum(values.values()) / len(values), values, factor)

    def differentiate(self, loss: Tensor) -> None:
        """Leaves the gradient of the loss at the parameters."""
        loss.backward()

    def batch_errors(self, step: int) -> dict[str, Tensor]:
        """Returns the errors of a step's batch by quantity, scalars whose sum is the loss."""
        raise NotImplementedError(f"{type(self).__name__} must implement batch_errors")

    def save(self) -> None:
        """Writes the checkpoint: to another file first, so that an interruption never leaves half of one."""
        if self.checkpoint is None:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(f".{os.getpid()}.partial")
        torch.save(
            {
                "signature": self.signature,
                "step": self.step,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            partial,
        )
        partial.replace(self.checkpoint)

    def _load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["signature"] != self.signature:
            raise ValueError(f"checkpoint {path} is of another training: {state['signature']} is not {self.signature}")
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)


def train_with_bar(trainer: Any, describe: Callable[[Progress], str], silent: bool = False) -> None:
    """Runs a training to its end under a progress bar.

    Args:
        trainer: A :class:`Trainer`.
        describe: What the bar says of a step.
        silent: Whether there is no bar.
    """
    from tqdm import tqdm

    if trainer.step:
        print(f"going on at step {trainer.step}, {trainer.done:.0%} done ({trainer.checkpoint})")
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} % [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=100.0, initial=100 * trainer.done, desc="training", bar_format=form, disable=silent) as bar:
        for progress in trainer.run():
            bar.set_postfix_str(describe(progress), refresh=False)
            bar.update(100 * trainer.done - bar.n)
