"""The airfoil example's stream function: its divergence, its training, and the comparison with other models."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.examples.test_airfoil_example import EXAMPLE, TINY, TINY_TRAINING, random_model, small_data

sys.path.insert(0, str(EXAMPLE))

import dataset
import evaluation
import run_derivatives
from model import VELOCITIES, AirfoilModel, ModelConfig, flow_condition
from training import Trainer, random_cases

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_velocity_of_a_stream_function_has_no_divergence(shapes: dataset.Shapes) -> None:
    rms = {}
    for velocity in VELOCITIES:
        model = random_model(replace(TINY, velocity=velocity))
        rms[velocity] = run_derivatives.derivatives_on_unseen(model, shapes.subset(0, 1))
        assert rms[velocity]["gradient"] > 0.01 and rms[velocity]["vorticity"] > 1e-3
    exact = rms["stream_function"]
    # Its two terms are the same second derivative, of some dozen roundings.
    assert exact["divergence"] <= 64 * torch.finfo(torch.float32).eps * exact["gradient"]
    assert rms["direct"]["divergence"] > 0.01 * rms["direct"]["gradient"]


def test_both_derivatives_of_a_stream_function_agree(shapes: dataset.Shapes) -> None:
    cases = random_cases(shapes, TINY_TRAINING, 0)
    anchors = {branch: points[:, :20] for branch, points in cases.points.items()}
    queries = {branch: points[:, 20:40] for branch, points in cases.points.items()}
    exact, differences = (random_model(replace(TINY, velocity=velocity)).double() for velocity in VELOCITIES[1:])

    def predict(model: AirfoilModel) -> dict[str, torch.Tensor]:
        double = [{branch: points.double() for branch, points in group.items()} for group in (anchors, queries)]
        with torch.no_grad():
            return model(cases.geometry.double(), *double, flow_condition(cases.angle).double())

    found, expected = predict(exact), predict(differences)
    torch.testing.assert_close(found["surface"], expected["surface"], rtol=0, atol=1e-12)
    assert found["volume"].shape == (2, 40, 2)
    # step² / 6 of the third derivative, whose fastest part turns by a radian in a 100th.
    torch.testing.assert_close(found["volume"], expected["volume"], rtol=0, atol=0.01)
    assert (found["volume"] - flow_condition(cases.angle)[:, None]).abs().max() > 0.1


@pytest.mark.parametrize("velocity", VELOCITIES[1:])
def test_a_stream_function_trains_and_streams(shapes: dataset.Shapes, velocity: str) -> None:
    few, config = shapes.subset(0, 4), replace(TINY, velocity=velocity)
    trainer = Trainer(few, config, replace(TINY_TRAINING, steps=2))
    embedding = trainer.model.embedding["volume"].mlp[0].weight
    before = embedding.detach().clone()
    assert all(math.isfinite(progress.loss) for progress in trainer.run())
    # The head begins with zeros: what is before it has a gradient from the second step on.
    assert trainer.model.head["volume"].weight.abs().max() > 0 and not torch.equal(embedding, before)
    points = torch.rand(50, 2)
    streamed = [evaluation.stream(trainer.model, few, 0, 3.0, points, chunk).velocity for chunk in (7, 50)]
    torch.testing.assert_close(*streamed, rtol=1e-4, atol=1e-4)


def test_unknown_velocities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"velocity must be one of direct, .* got 'curl'"):
        ModelConfig(velocity="curl")


@pytest.mark.slow
def test_comparison_of_derivatives(tmp_path: Path) -> None:
    with np.load(dataset.DATA_FILE) as file:
        data, output = small_data(dict(file), tmp_path), tmp_path / "out"
    run_derivatives.main(["--data", str(data), "--output", str(output), "--steps", "2", "--grid", "24", "16"])
    results = json.loads((output / "derivatives.json").read_text())
    assert set(results["models"]) == set(VELOCITIES)
    assert (output / "derivatives.md").read_text() == run_derivatives.markdown(results)
    assert (output / "derivatives.png").read_bytes().startswith(b"\x89PNG")


def test_readme_quotes_the_committed_comparison_of_derivatives() -> None:
    folder = EXAMPLE / "results" / "derivatives"
    results = json.loads((folder / "derivatives.json").read_text())
    table = run_derivatives.markdown(results)
    assert (folder / "derivatives.md").read_text() == table and table in (EXAMPLE / "README.md").read_text()
    rms = {velocity: row["rms"] for velocity, row in results["models"].items()}
    assert rms["stream_function"]["divergence"] < 1e-4 * rms["direct"]["divergence"]
    assert (folder / "derivatives.png").stat().st_size < 300_000
