"""The wind tunnel's surrogate: frames and features, what a guess is worth, a training that learns, whole meshes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "windtunnel"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]
pytest.importorskip("scipy")

import bodies  # noqa: E402
import make_cases  # noqa: E402
import prediction  # noqa: E402
import reading  # noqa: E402
import sampling  # noqa: E402
import scoring  # noqa: E402
import surrogate  # noqa: E402
from bodies import Body  # noqa: E402
from common.branched import ModelConfig  # noqa: E402
from prediction import Setting  # noqa: E402
from reading import Flow  # noqa: E402
from sampling import Case, Frame  # noqa: E402
from surrogate import TrainingConfig  # noqa: E402

STORED = Path(__file__).resolve().parents[1] / "data" / "windtunnel_tiny.npz"
SMALL = ModelConfig(dim=48, num_heads=2, blocks="sj")
FEW = Setting(geometry_points=64, surface_anchors=64, volume_anchors=64)
TRAINING = TrainingConfig(
    seconds=None,
    steps=60,
    batch_size=1,
    geometry_points=64,
    surface_anchors=64,
    volume_anchors=64,
    surface_queries=128,
    volume_queries=128,
)


@pytest.fixture(scope="module")
def case() -> Case:
    metadata, flow = make_cases.load(STORED)
    return sampling.prepare(0, Body(**metadata["body"]), metadata["frontal_area"], flow)


def mirrored(case: Case) -> Case:
    """The same flow, seen in a mirror that stands along the wind."""
    flip = np.array([1.0, -1.0, 1.0], dtype=np.float32)
    vectors = ("surface_points", "surface_normals", "shear", "volume_points", "velocity")
    flow = replace(case.flow, **{name: getattr(case.flow, name) * flip for name in vectors})
    return sampling.prepare(case.number, replace(case.body, yaw=-case.body.yaw), case.frontal_area, flow)


@pytest.mark.parametrize("yaw", [-7.0, 0.0, 4.0])
def test_frame_turns_the_body_straight_and_back(yaw: float) -> None:
    body = Body(slant=20.0, length=1.0, height=0.3, ride_height=0.05, speed=30.0, yaw=yaw)
    corners = bodies.triangles(body).reshape(-1, 3)
    straight = bodies.triangles(replace(body, yaw=0.0)).reshape(-1, 3)
    turned = Frame(yaw).to_body(corners)
    # The body is its own mirror image, but for the order of its corners.
    np.testing.assert_allclose(np.abs(turned), np.abs(straight), atol=1e-12)
    np.testing.assert_allclose(turned[:, 0], straight[:, 0], atol=1e-12)
    np.testing.assert_allclose(Frame(yaw).to_tunnel(turned), corners, atol=1e-12)
    wind = sampling.wind(sampling.condition(30.0, yaw)[None])[0].numpy()
    np.testing.assert_allclose(Frame(yaw).to_tunnel(wind[None])[0], [1, 0, 0], atol=1e-6)


def test_a_mirrored_case_looks_the_same_to_the_model(case: Case) -> None:
    other = mirrored(case)
    assert other.body.yaw == -case.body.yaw != 0
    for branch in case.points:
        # Float32 points of the size of the tunnel.
        torch.testing.assert_close(other.points[branch], case.points[branch], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(other.targets[branch], case.targets[branch], atol=2e-6, rtol=1e-5)
    assert torch.equal(other.condition, case.condition)


def test_features_of_points_on_the_surface_say_so(case: Case) -> None:
    features = case.geometry.volume_features(case.flow.surface_points)
    assert features.shape == (len(case.flow.surface_points), sampling.VOLUME_FEATURES)
    assert features[:, 9:13].abs().max() < 1e-6
    torch.testing.assert_close(features[:, -3:], torch.from_numpy(case.geometry.normals))
    assert case.points["volume"][:, 12].min() > 0.0


def test_forces_of_all_faces_are_those_of_the_flow(case: Case) -> None:
    """The model's loss and the evaluation sum the same forces."""
    surface, areas = case.targets["surface"][None], (case.areas / case.areas.mean())[None]
    mean = surrogate.force(surface, case.points["surface"][None, :, -3:], areas)[0].numpy()
    coefficients = case.geometry.frame.to_tunnel(mean[None])[0] * case.areas.sum().item() / case.frontal_area
    np.testing.assert_allclose(coefficients, reading.force(case.flow, case.frontal_area), atol=1e-4)


def test_scores_tell_what_was_changed(case: Case) -> None:
    perfect = scoring.score(case.flow, case.flow, case.frontal_area)
    assert perfect.pressure == perfect.velocity == perfect.drag_error == 0
    changed = replace(case.flow, pressure=1.1 * case.flow.pressure)
    score = scoring.score(changed, case.flow, case.frontal_area)
    assert score.pressure == pytest.approx(0.1, rel=1e-4) and score.shear == score.velocity == 0
    pressure_alone = replace(case.flow, shear=np.zeros_like(case.flow.shear))
    assert score.drag_error == pytest.approx(0.1 * reading.force(pressure_alone, case.frontal_area)[0], rel=1e-3)


def test_the_nearest_body_guesses_itself_and_its_mirror_image(case: Case) -> None:
    for other in (case, mirrored(case)):
        guess = scoring.nearest([other], case)
        score = scoring.score(guess, case.flow, case.frontal_area)
        assert scoring.distance(other, case) == 0
        assert max(score.pressure, score.shear, score.velocity) < 1e-3
        again = scoring.mean([other, other], case)
        np.testing.assert_allclose(again.velocity, guess.velocity, rtol=1e-6)


def test_neighbours_guess_a_smooth_field_and_not_a_rough_one(case: Case) -> None:
    smooth = 1 + 0.1 * case.geometry.points[:, 0]
    rough = smooth * np.random.default_rng(0).choice([0.5, 1.5], len(smooth))
    errors = []
    for pressure in (smooth, rough):
        targets = {**case.targets, "surface": case.targets["surface"].clone()}
        targets["surface"][:, 0] = torch.from_numpy(pressure)
        guess = scoring.neighbours(replace(case, targets=targets))
        errors.append(scoring.relative_error(guess.pressure, pressure))
    assert errors[0] < 0.02 and errors[1] > 0.4


def test_distance_is_in_units_of_the_plan(case: Case) -> None:
    other = replace(case, body=replace(case.body, slant=case.body.slant + 3.0, yaw=-case.body.yaw - 1.0))
    assert scoring.distance(other, case) == pytest.approx(math.hypot(0.1, 0.1))


def test_too_few_points_are_refused_by_number(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^n must be at most the \d+ points of case 0, got 100000"):
        sampling.sample(case, "volume", 100_000, torch.Generator())
    model = surrogate.TunnelModel(SMALL)
    with pytest.raises(ValueError, match=r"as many as the 100000 that are encoded, got \d+"):
        prediction.predict_case(model, case, replace(FEW, volume_anchors=100_000))


def test_no_stored_case_is_refused_by_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^folder must hold stored cases, got {tmp_path}"):
        sampling.load_cases(tmp_path)


def test_a_short_training_learns_the_flow(case: Case) -> None:
    torch.manual_seed(0)
    untrained = scoring.score(
        prediction.predict_case(surrogate.TunnelModel(SMALL), case, FEW)[0], case.flow, case.frontal_area
    )
    trainer = surrogate.Trainer([case], SMALL, TRAINING)
    losses = [progress.loss for progress in trainer.run()]
    flow, times = prediction.predict_case(trainer.model, case, FEW)
    score = scoring.score(flow, case.flow, case.frontal_area)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert score.pressure < 0.6 * untrained.pressure
    assert score.disturbance < 0.7 * untrained.disturbance
    assert times.points == len(case.flow.pressure) + len(case.flow.velocity)
    # A model that sees the body in its own frame treats the mirror image alike.
    other, _ = prediction.predict_case(trainer.model, mirrored(case), FEW)
    np.testing.assert_allclose(other.velocity * [1, -1, 1], flow.velocity, atol=1e-3)


def test_streamed_cells_do_not_depend_on_their_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = surrogate.TunnelModel(SMALL)
    for head in model.head.values():
        torch.nn.init.normal_(head.weight, std=0.2)
    whole, _ = prediction.predict_case(model, case, FEW)
    monkeypatch.setattr(prediction, "CHUNK_POINTS", 777)
    chunked, _ = prediction.predict_case(model, case, FEW)
    for name in ("pressure", "shear", "velocity", "volume_pressure"):
        np.testing.assert_allclose(getattr(chunked, name), getattr(whole, name), atol=1e-5)


def test_training_resumes_where_it_stopped(case: Case, tmp_path: Path) -> None:
    config = replace(TRAINING, steps=4)
    whole = surrogate.Trainer([case], SMALL, config)
    losses = [progress.loss for progress in whole.run()]
    checkpoint = tmp_path / "checkpoint.pt"
    first = surrogate.Trainer([case], SMALL, config, checkpoint).run()
    resumed_losses = [next(first).loss, next(first).loss]
    first.close()
    resumed_losses += [progress.loss for progress in surrogate.Trainer([case], SMALL, config, checkpoint).run()]
    np.testing.assert_allclose(resumed_losses, losses, rtol=1e-4)


def test_whole_meshes_go_to_paraview_and_back(tmp_path: Path) -> None:
    pyvista = pytest.importorskip("pyvista")
    import vtk_files

    cells = pyvista.ImageData(dimensions=(5, 4, 4), spacing=(0.1, 0.1, 0.1)).cast_to_unstructured_grid()
    # Normals of OpenFOAM's patches point into the body.
    body = pyvista.Box((0.0, 0.4, 0.0, 0.2, 0.0, 0.3)).flip_faces()
    generator = np.random.default_rng(3)
    for mesh, names in ((cells, {"U": 3, "p": 1}), (body, {"p": 1, "wallShearStress": 3})):
        for name, n in names.items():
            mesh.cell_data[name] = generator.standard_normal((mesh.n_cells, n)).squeeze()
    vtk_files.store_solved(cells, body, tmp_path / "solved")
    cells, body = vtk_files.load_solved(tmp_path / "solved")
    speed = 20.0
    solved = reading.flow_of(cells, body, speed)
    assert isinstance(solved, Flow) and solved.surface_areas.sum() == pytest.approx(0.52)
    outward = (solved.surface_points - [0.2, 0.1, 0.15]) * solved.surface_normals
    assert (outward.sum(axis=1) > 0.09).all()

    predicted = replace(solved, velocity=solved.velocity + 0.1, pressure=2 * solved.pressure)
    vtk_files.add_prediction(cells, body, predicted, speed)
    vtk_files.write(cells, body, tmp_path / "out")
    cells, body = pyvista.read(tmp_path / "out.vtu"), pyvista.read(tmp_path / "out.vtp")
    np.testing.assert_allclose(cells["U_error"], 0.1 * speed, atol=1e-5)
    np.testing.assert_allclose(body["p_predicted"], 2 * body["p"], rtol=1e-5)
    np.testing.assert_allclose(body["wallShearStress_error"], 0, atol=1e-6)
    np.testing.assert_allclose(body["cp"], body["p"] / (0.5 * speed**2), rtol=1e-5)


def test_a_whole_run_scores_unseen_bodies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyvista")
    import run_windtunnel

    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    for number in (2, 3, 5):
        shutil.copy(make_cases.DATA / f"case_{number:03d}.npz", data)
    command = ["run_windtunnel.py", "--steps", "3", "--data", str(data), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    try:
        run_windtunnel.main()
    finally:
        torch.set_num_threads(threads)
    metrics = json.loads((output / "metrics.json").read_text())
    assert [row["case"] for row in metrics["cases"]] == [3]
    assert metrics["training"]["steps"] == 3 and metrics["training"]["shapes"] == 2
    for method in run_windtunnel.METHODS:
        assert 0 < metrics["unseen"][method]["pressure"]["mean"] < 1.1
    assert "2 bodies to learn from, 1 unseen" in capsys.readouterr().out
    # A finished training is not made again, one of another length is refused.
    monkeypatch.setattr(sys, "argv", [*command[:2], "4", *command[3:]])
    with pytest.raises(SystemExit, match="is of another training"):
        run_windtunnel.main()


def test_unseen_cases_are_one_in_five_and_hold_the_whole_mesh() -> None:
    seen, unseen = sampling.split(range(make_cases.N_CASES))
    assert len(unseen) == 11 and not set(seen) & set(unseen)
    assert make_cases.FULL_CASE in unseen
    stored = sampling.split([int(path.stem[5:]) for path in make_cases.DATA.glob("case_*.npz")])
    assert min(len(numbers) for numbers in stored) >= 2


def test_shipped_cases_are_what_their_names_say() -> None:
    plan = bodies.plan(make_cases.N_CASES, make_cases.SEED)
    paths = sorted(make_cases.DATA.glob("case_*.npz"))
    for path in paths:
        metadata, flow = make_cases.load(path)
        assert Body(**metadata["body"]) == plan[int(path.stem[5:])]
        assert len(flow.velocity) == make_cases.VOLUME_POINTS
        found = reading.force(flow, metadata["frontal_area"])
        np.testing.assert_allclose(found, metadata["force_coefficients"], atol=5e-3)
    assert sum(path.stat().st_size for path in make_cases.DATA.iterdir()) <= 25e6


def test_readme_shows_the_committed_results() -> None:
    import write_results

    text = (EXAMPLE / "README.md").read_text()
    assert text.endswith(write_results.results_section(*write_results.read_results()))
    for name in write_results.PICTURES:
        assert (EXAMPLE / "results" / name).is_file()
