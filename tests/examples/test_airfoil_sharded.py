"""The demo's training with every case spread over processes: the loss curve of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "airfoil"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]

import dataset  # noqa: E402
from model import ModelConfig  # noqa: E402
from sharded import ShardedTrainer  # noqa: E402
from training import Trainer, TrainingConfig  # noqa: E402

from tests.distributed.processes import processes  # noqa: E402

STEPS = 12
CONFIG = TrainingConfig(steps=STEPS, seconds=None, surface_anchors=13, volume_anchors=10, batch_size=2)
MODEL = ModelConfig(dim=24, num_heads=2)


def losses(mesh: Any = None) -> list[float]:
    torch.set_num_threads(1)
    shapes, _ = dataset.load(EXAMPLE / "data" / "airfoils.npz")
    seen, _ = dataset.split(shapes)
    trainer = Trainer(seen, MODEL, CONFIG) if mesh is None else ShardedTrainer(seen, MODEL, CONFIG, None, mesh)
    return [progress.loss for progress in trainer.run()]


def test_the_loss_curve_is_that_of_one_process() -> None:
    with processes(2) as pool:
        curves = pool.run(losses, 2)
    expected = losses()
    assert abs(expected[-1] - expected[0]) > 0.05
    assert curves[0] == curves[1]
    # Rounding of float32 in the first step; every step of the optimisers multiplies what differs by a small factor.
    assert abs(curves[0][0] - expected[0]) < 1e-5
    torch.testing.assert_close(curves[0], expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_demo_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLE / "run.py"), "--steps", "3", "--pictures", "1", "--grid", "24", "16"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, timeout=600)
    assert (tmp_path / "metrics.json").is_file() and (tmp_path / "checkpoint.pt").is_file()


def test_clocks_are_no_common_end() -> None:
    shapes, _ = dataset.load(EXAMPLE / "data" / "airfoils.npz")
    with pytest.raises(ValueError, match=r"seconds must be None in several processes, whose clocks differ, got 5"):
        ShardedTrainer(shapes, MODEL, TrainingConfig(steps=3, seconds=5.0), None, None)  # type: ignore[arg-type]
