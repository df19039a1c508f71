"""The airfoil example: its data against the solver and against physics, its model, training, streaming and program."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "airfoil"
sys.path.insert(0, str(EXAMPLE))

import dataset  # noqa: E402
import evaluation  # noqa: E402
import make_dataset  # noqa: E402
import panel_flow  # noqa: E402
import run  # noqa: E402
import update_readme  # noqa: E402
from model import BRANCHES, AirfoilModel, ModelConfig, flow_condition, make_model  # noqa: E402
from training import Trainer, TrainingConfig, random_cases  # noqa: E402

TINY = ModelConfig(dim=32, num_heads=2, blocks="scj")
TINY_TRAINING = TrainingConfig(seconds=None, steps=6, batch_size=2, surface_anchors=12, volume_anchors=16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(dataset.DATA_FILE) as file:
        return dict(file)


def a_few(shapes: dataset.Shapes) -> list[int]:
    return np.random.default_rng(0).choice(len(shapes), size=6, replace=False).tolist()


def flow(shapes: dataset.Shapes, row: int) -> tuple[np.ndarray, np.ndarray]:
    return shapes.nodes[row].double().numpy(), shapes.surface_speed[row].double().numpy()


def wall_normals(nodes: np.ndarray) -> np.ndarray:
    panels = np.diff(nodes, axis=0)
    return np.stack((panels[:, 1], -panels[:, 0]), axis=1) / np.hypot(*panels.T)[:, None]


def random_model(config: ModelConfig = TINY) -> AirfoilModel:
    torch.manual_seed(0)
    model = make_model(config).eval()
    for parameter in model.parameters():
        # Zero-initialised heads and modulations would hide differences.
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def test_data_set_is_small_and_complete(stored: dict[str, np.ndarray]) -> None:
    n_shapes, n_nodes, n_points = len(stored["names"]), 2 * make_dataset.NODES_PER_SIDE - 1, make_dataset.VOLUME_POINTS
    assert dataset.DATA_FILE.stat().st_size <= 10e6
    assert n_shapes >= 300 and len(set(stored["names"].tolist())) == n_shapes
    expected = {
        "nodes": ((n_shapes, n_nodes, 2), np.float32),
        "surface_speed": ((n_shapes, n_nodes, 2), np.float32),
        "volume_points": ((n_shapes, n_points, 2), np.float16),
        "volume_velocity": ((n_shapes, n_points, 2, 2), np.float16),
    }
    for key, (shape, dtype) in expected.items():
        assert stored[key].shape == shape and stored[key].dtype == dtype
        assert np.isfinite(stored[key]).all()
    metadata = json.loads(str(stored["metadata"]))
    assert metadata["shapes"] == n_shapes
    assert {reason: len(names) for reason, names in metadata["rejected"].items()} == metadata["rejected_counts"]
    rejected = {name for names in metadata["rejected"].values() for name in names}
    assert rejected.isdisjoint(stored["names"].tolist())


def test_no_shape_is_both_seen_and_unseen(shapes: dataset.Shapes) -> None:
    seen, unseen = dataset.split(shapes)
    assert set(seen.names).isdisjoint(unseen.names) and len(seen) + len(unseen) == len(shapes)
    distance = torch.stack([(seen.nodes - nodes).abs().amax(dim=(1, 2)).min() for nodes in unseen.nodes])
    assert distance.min() >= make_dataset.DUPLICATE_DISTANCE


def test_volume_points_are_outside_and_keep_their_distance(shapes: dataset.Shapes) -> None:
    for row in a_few(shapes):
        nodes, points = shapes.nodes[row].numpy(), shapes.volume_points[row].numpy()
        assert not panel_flow.contains(points, nodes).any()
        assert panel_flow.distance_to_body(points, nodes).min() >= make_dataset.MIN_DISTANCE


def test_velocity_is_tangential_at_the_wall(shapes: dataset.Shapes) -> None:
    for row in a_few(shapes):
        nodes, speed = flow(shapes, row)
        middle = (nodes[1:] + nodes[:-1]) / 2
        velocity = panel_flow.induced_velocity(middle, nodes, speed) + np.eye(2)
        normal = np.einsum("msc,mc->ms", velocity, wall_normals(nodes))
        # Strengths are rounded to float32, and a unit of strength on every panel induces a few units at most.
        assert np.abs(normal).max() <= 16 * 2.0**-24 * np.abs(speed).max() + make_dataset.MAX_RESIDUAL


def test_circulation_and_flux_around_the_body(shapes: dataset.Shapes) -> None:
    x0, x1, y0, y1 = panel_flow.BOX
    position, weight = np.polynomial.legendre.leggauss(64)
    for row in a_few(shapes):
        nodes, speed = flow(shapes, row)
        circulation, flux = np.zeros(2), np.zeros(2)
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])
        for begin, end in itertools.pairwise(corners):
            edge = (end - begin) / 2
            velocity = panel_flow.induced_velocity(begin + edge + position[:, None] * edge, nodes, speed)
            circulation += np.einsum("m,msc,c->s", weight, velocity, edge)
            flux += np.einsum("m,msc,c->s", weight, velocity, (edge[1], -edge[0]))
        lengths = np.hypot(*np.diff(nodes, axis=0).T)
        enclosed = ((speed[1:] + speed[:-1]) / 2 * lengths[:, None]).sum(axis=0)
        source = speed[0] * np.hypot(*(nodes[0] - nodes[-1]))
        # A clockwise sheet gives negative circulation on a counter-clockwise path.
        np.testing.assert_allclose(circulation, -enclosed, rtol=0, atol=1e-9)
        np.testing.assert_allclose(flux, source, rtol=0, atol=1e-9)


def test_pressure_and_kutta_condition(shapes: dataset.Shapes) -> None:
    generator = torch.Generator().manual_seed(0)
    for angle in (*dataset.TEST_ANGLES, *dataset.TRAINING_ANGLES):
        rows = torch.arange(len(shapes))
        cases = dataset.make_cases(shapes, rows, torch.full((len(shapes),), angle).deg2rad(), generator)
        pressure = cases.targets["surface"]
        assert pressure.max() <= 1
        # Every body has a stagnation point: within a panel of it the pressure is nearly 1.
        assert pressure.amax(dim=1).min() > 0.9
    torch.testing.assert_close(shapes.surface_speed[:, 0], -shapes.surface_speed[:, -1], rtol=1e-6, atol=1e-6)


def test_stored_velocity_is_that_of_the_sheet(shapes: dataset.Shapes) -> None:
    for row in a_few(shapes):
        nodes, speed = flow(shapes, row)
        exact = panel_flow.induced_velocity(shapes.volume_points[row].numpy(), nodes, speed)
        error = np.abs(shapes.volume_velocity[row].numpy() - exact)
        # float16 keeps 11 bits, and 2^-24 below its normal range; the strengths behind are float32.
        assert (error <= 2.0**-11 * np.abs(exact) + 2.0**-24 + 16 * 2.0**-24 * np.abs(speed).max()).all()


def test_superposition_and_velocity_agree_with_the_solver(shapes: dataset.Shapes) -> None:
    import aerosandbox as asb

    row, angle = a_few(shapes)[0], 5.0
    nodes, speed = flow(shapes, row)
    with make_dataset.silence():
        direct = asb.AirfoilInviscid(
            airfoil=asb.Airfoil(name="body", coordinates=nodes),
            op_point=asb.OperatingPoint(velocity=1.0, alpha=angle),
        )
    rounding = 2.0**-24 * np.abs(speed).max()
    strengths = np.array(direct.airfoils[0].gamma)
    assert np.abs(speed @ panel_flow.free_stream_weights(angle) - strengths).max() <= 2 * rounding + 1e-6
    points = shapes.volume_points[row]
    exact = np.stack(direct.calculate_velocity(*points.double().numpy().T), axis=1)
    ours = evaluation.exact_velocity(shapes, row, angle, points).numpy()
    assert np.abs(ours - exact).max() <= 16 * rounding + 1e-6


def test_contains_agrees_with_the_winding_number(shapes: dataset.Shapes) -> None:
    points = np.random.default_rng(1).uniform((-0.05, -0.2), (1.05, 0.2), size=(500, 2))
    for row in a_few(shapes):
        nodes = shapes.nodes[row].double().numpy()
        offset = nodes[None] - points[:, None]
        angle = np.arctan2(offset[..., 1], offset[..., 0])
        turn = np.diff(angle, axis=1, append=angle[:, :1])
        winding = np.round((turn - 2 * np.pi * np.round(turn / (2 * np.pi))).sum(axis=1) / (2 * np.pi))
        assert (panel_flow.contains(points, nodes) == (winding != 0)).all()


def test_mirrored_cases_are_flows(shapes: dataset.Shapes) -> None:
    row = a_few(shapes)[1]
    nodes, speed = flow(shapes, row)
    angle = torch.tensor([math.radians(6.0)])
    cases = dataset.make_cases(
        shapes, torch.tensor([row]), angle, torch.Generator().manual_seed(0), mirrored=torch.tensor([True])
    )
    flip = np.array([1.0, -1.0])
    mirrored_nodes, mirrored_speed = nodes[::-1] * flip, speed[::-1] * -flip
    np.testing.assert_allclose(
        cases.geometry[0].numpy(), dataset.surface_features(mirrored_nodes.astype(np.float32))[::-1], atol=1e-5
    )
    weights = panel_flow.free_stream_weights(math.degrees(float(cases.angle[0])))
    assert weights[1] < 0
    points = cases.points["volume"][0].numpy()
    induced = panel_flow.induced_velocity(points, mirrored_nodes, mirrored_speed)
    exact = np.einsum("msc,s->mc", induced, weights) + weights
    np.testing.assert_allclose(cases.targets["volume"][0].numpy(), exact, atol=2.0**-11 * np.abs(induced).max() + 1e-6)


@pytest.mark.slow
def test_regenerated_shapes_are_the_shipped_ones(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    names = stored["names"][:3].tolist()
    output = tmp_path / "airfoils.npz"
    metadata = make_dataset.make_dataset(names, len(names), 1, tmp_path / "cache", output)
    assert metadata["shapes"] == len(names) and metadata["rejected"] == {}
    with np.load(output) as file:
        anew = dict(file)
    assert anew["names"].tolist() == names
    for key, atol in {"nodes": 1e-6, "volume_points": 0.0}.items():
        np.testing.assert_allclose(anew[key], stored[key][:3], rtol=0, atol=atol)
    for key, rtol in {"surface_speed": 1e-4, "volume_velocity": 2.0**-10}.items():
        scale = np.abs(stored[key][:3]).max().astype(np.float64)
        difference = np.abs(anew[key].astype(np.float64) - stored[key][:3].astype(np.float64))
        assert (difference <= rtol * np.maximum(np.abs(stored[key][:3].astype(np.float64)), 1e-3 * scale)).all()

    # An interrupted run has some of the files: it solves the others and ends with the same bytes.
    first = output.read_bytes()
    (tmp_path / "cache" / f"{names[1]}.npz").unlink()
    untouched = (tmp_path / "cache" / f"{names[0]}.npz").stat().st_mtime_ns
    make_dataset.make_dataset(names, len(names), 1, tmp_path / "cache", output)
    assert output.read_bytes() == first
    assert (tmp_path / "cache" / f"{names[0]}.npz").stat().st_mtime_ns == untouched


def test_rejected_shapes_are_rejected_for_their_reason(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    rejected = json.loads(str(stored["metadata"]))["rejected"]
    reason = next(reason for reason in rejected if reason.startswith("thickness"))
    assert make_dataset.make_or_recall(rejected[reason][0], tmp_path) == (rejected[reason][0], reason)
    nodes = stored["nodes"][0].astype(np.float64)
    with pytest.raises(make_dataset.Rejected, match="solver failed"):
        make_dataset.check_solution(nodes, stored["surface_speed"][0] * 1.01)
    assert make_dataset.is_duplicate(stored["nodes"][3] + np.float32(5e-4), list(stored["nodes"][:5]))
    assert not make_dataset.is_duplicate(stored["nodes"][5], list(stored["nodes"][:5]))


def test_equal_neighbouring_nodes_are_refused() -> None:
    nodes = np.array([[1.0, 0.1], [0.0, 0.0], [0.0, 0.0], [1.0, -0.1]])
    with pytest.raises(ValueError, match="nodes must be distinct from their neighbours, got equal nodes at 1"):
        panel_flow.induced_velocity(np.zeros((1, 2)), nodes, np.ones((4, 2)))


@pytest.mark.parametrize("letters", ["", "sx"])
def test_unknown_blocks_are_refused(letters: str) -> None:
    with pytest.raises(ValueError, match=f"blocks must be a string of the letters s, c and j, got '{letters}'"):
        ModelConfig(blocks=letters)


def test_streaming_equals_one_pass(shapes: dataset.Shapes) -> None:
    model = random_model()
    row, angle = a_few(shapes)[2], 3.0
    radians = torch.tensor([angle]).deg2rad()
    points = torch.rand(203, 2, generator=torch.Generator().manual_seed(2))
    cases = dataset.make_cases(
        shapes, torch.tensor([row]), radians, torch.Generator().manual_seed(evaluation.ANCHOR_SEED)
    )
    anchors = {
        "surface": cases.points["surface"][:, : evaluation.SURFACE_ANCHORS],
        "volume": cases.points["volume"][:, : evaluation.VOLUME_ANCHORS],
    }
    with torch.no_grad():
        queries = {"surface": cases.geometry, "volume": points[None]}
        one_pass = model(cases.geometry, anchors, queries, flow_condition(radians))
    velocity = one_pass["volume"][0, evaluation.VOLUME_ANCHORS :]
    pressure = one_pass["surface"][0, evaluation.SURFACE_ANCHORS :, 0]
    assert velocity.std() > 0.01 and pressure.std() > 0.01
    for chunk_size in (1, 64, 1000):
        streamed = evaluation.stream(model, shapes, row, angle, points, chunk_size)
        torch.testing.assert_close(streamed.velocity, velocity, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(streamed.pressure, pressure, rtol=1e-4, atol=1e-4)


def test_queries_change_nothing_but_themselves(shapes: dataset.Shapes) -> None:
    model = random_model()
    cases = random_cases(shapes, TINY_TRAINING, 0)
    anchors = {branch: points[:, :20] for branch, points in cases.points.items()}
    queries = {branch: points[:, 20:40] for branch, points in cases.points.items()}
    with torch.no_grad():
        alone = model(cases.geometry, anchors, {}, flow_condition(cases.angle))
        together = model(cases.geometry, anchors, queries, flow_condition(cases.angle))
        fewer = model(cases.geometry, anchors, {"volume": queries["volume"][:, 5:]}, flow_condition(cases.angle))
    for branch in BRANCHES:
        torch.testing.assert_close(together[branch][:, :20], alone[branch], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fewer["volume"][:, 20:], together["volume"][:, 25:], rtol=1e-4, atol=1e-4)


def test_batches_depend_on_the_step_alone_and_visit_every_shape(shapes: dataset.Shapes) -> None:
    few = shapes.subset(0, 10)
    config = replace(TINY_TRAINING, batch_size=4)
    seen = torch.cat([random_cases(few, config, step).geometry for step in range(5)])
    for epoch in seen.split(10):
        for shape in few.surface_features:
            assert sum(torch.equal(shape, geometry) for geometry in epoch) == 1
    once, again = random_cases(few, config, 3), random_cases(few, config, 3)
    assert torch.equal(once.points["volume"], again.points["volume"])
    assert not torch.equal(once.angle, random_cases(few, config, 4).angle)


def test_a_resumed_training_equals_an_uninterrupted_one(shapes: dataset.Shapes, tmp_path: Path) -> None:
    few = shapes.subset(0, 10)
    whole = Trainer(few, TINY, TINY_TRAINING)
    losses = [progress.loss for progress in whole.run()]
    checkpoint = tmp_path / "checkpoint.pt"
    interrupted = Trainer(few, TINY, TINY_TRAINING, checkpoint)
    steps = interrupted.run()
    resumed_losses = [next(steps).loss for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    resumed = Trainer(few, TINY, TINY_TRAINING, checkpoint)
    assert resumed.step == 3
    resumed_losses += [progress.loss for progress in resumed.run()]
    assert resumed_losses == losses and resumed.done == 1
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    with pytest.raises(ValueError, match="is of another training"):
        Trainer(few, TINY, replace(TINY_TRAINING, batch_size=3), checkpoint)


@pytest.mark.slow
def test_training_learns(shapes: dataset.Shapes) -> None:
    config = replace(TINY_TRAINING, steps=60, batch_size=4)
    losses = [progress.loss for progress in Trainer(shapes.subset(0, 8), TINY, config).run()]
    # The free stream alone is an error of 1 in the velocity that the body adds, and about 1 in the pressure.
    assert losses[0] > 0.9 and np.mean(losses[-5:]) < 0.75


def test_a_training_needs_an_end() -> None:
    with pytest.raises(ValueError, match="seconds or steps must be given, got None for both"):
        TrainingConfig(seconds=None, steps=None)


def test_baselines_are_right_where_the_answer_is_known(shapes: dataset.Shapes) -> None:
    few = shapes.subset(0, 5)
    same = evaluation.baseline_errors(few, few)["nearest_shape"]
    assert same["surface"].max() == 0
    assert same["volume"].max() < 2.0**-11
    alone = evaluation.baseline_errors(few.subset(0, 1), few)
    for branch in BRANCHES:
        torch.testing.assert_close(alone["training_mean"][branch], alone["nearest_shape"][branch])
        assert alone["nearest_shape"][branch][1:].min() > 0


def test_missing_packages_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("matplotlib", "tqdm"):
        with monkeypatch.context() as patch:
            patch.setattr(run.importlib.util, "find_spec", lambda name, m=missing: None if name == m else object())
            with pytest.raises(SystemExit, match=f"^run.py needs {missing}: pip install {missing}$"):
                run.require_packages()
    monkeypatch.setitem(sys.modules, "aerosandbox", None)
    with pytest.raises(SystemExit, match=r"^make_dataset\.py needs the package aerosandbox .*: pip install \w+$"):
        make_dataset.require_aerosandbox()


def start_program(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE / "run.py"), "--threads", "1", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ.copy(),
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def small_data(stored: dict[str, np.ndarray], folder: Path) -> Path:
    arrays: dict[str, Any] = {key: value[:12] for key, value in stored.items() if key != "metadata"}
    np.savez(folder / "small.npz", metadata=stored["metadata"], **arrays)
    return folder / "small.npz"


@pytest.mark.slow
def test_program_from_training_to_pictures(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    data, output = small_data(stored, tmp_path), tmp_path / "out"
    arguments = ("--data", data, "--output", output, "--steps", "3", "--grid", "48", "32", "--pictures", "1")
    program = start_program(*arguments)
    text, _ = program.communicate(timeout=300)
    assert program.returncode == 0, text
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 3
    for quantity in ("pressure", "velocity"):
        for method in ("model", "training_mean", "nearest_shape"):
            errors = metrics["relative_l2_error_unseen"][quantity][method]
            assert 0 < errors["median"] <= errors["worst"] and len(errors["by_angle"]) == len(dataset.TEST_ANGLES)
    (streamed,) = metrics["streaming"]
    assert 1000 < streamed["query_points"] < 48 * 32 and streamed["points_per_second"] > 0
    assert (output / "best.png").read_bytes().startswith(b"\x89PNG")

    program = start_program(*arguments[:5], "4", *arguments[6:])
    text, _ = program.communicate(timeout=300)
    assert program.returncode != 0 and "is of another training" in text and "--restart" in text


@pytest.mark.slow
def test_interrupted_program_goes_on(stored: dict[str, np.ndarray], tmp_path: Path) -> None:
    data, output = small_data(stored, tmp_path), tmp_path / "out"
    program = start_program("--data", data, "--output", output, "--steps", "100000")
    assert program.stdout is not None
    seen = ""
    deadline = time.monotonic() + 300
    try:
        # The bar is drawn ten times a second: fast steps are not all seen.
        while not re.search(r"step ([2-9]|\d\d+),", seen) and time.monotonic() < deadline:
            seen += program.stdout.read(16)
        program.send_signal(signal.SIGINT)
        text, _ = program.communicate(timeout=300)
    finally:
        program.kill()
    assert program.returncode == 130 and "the same command goes on from there" in text
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] >= 2


def test_missing_data_set_is_one_line(tmp_path: Path) -> None:
    program = start_program("--data", tmp_path / "none.npz")
    text, _ = program.communicate(timeout=300)
    assert program.returncode == 1 and "run.py finds no data set at" in text and "Traceback" not in text


def test_readme_quotes_the_committed_results() -> None:
    folder = EXAMPLE / "results"
    metrics = {mode: json.loads((folder / mode / "metrics.json").read_text()) for mode in update_readme.RUNS}
    assert (EXAMPLE / "README.md").read_text().endswith(update_readme.results_section(metrics))
    pictures = list(folder.glob("*/*.png"))
    assert pictures and max(picture.stat().st_size for picture in pictures) < 300_000
    for mode in ("short", "full"):
        assert min(field["query_points"] for field in metrics[mode]["streaming"]) >= 100_000
        errors = metrics[mode]["relative_l2_error_unseen"]
        assert errors["pressure"]["model"]["mean"] <= 0.15 and errors["velocity"]["model"]["mean"] <= 0.025
