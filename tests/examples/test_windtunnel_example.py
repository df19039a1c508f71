"""The wind tunnel example: its bodies, a stored case, and the same case solved anew where OpenFOAM is installed."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "windtunnel"
sys.path.insert(0, str(EXAMPLE))

import bodies  # noqa: E402
import make_cases  # noqa: E402
import openfoam_case  # noqa: E402
import reading  # noqa: E402
import vtk_files  # noqa: E402
from bodies import Body  # noqa: E402
from openfoam_case import Resolution  # noqa: E402

BODY = Body(slant=25.0, length=1.0, height=0.3, ride_height=0.05, speed=30.0, yaw=5.0)
# Solved by the test below, which solves it anew where it can.
STORED = Path(__file__).resolve().parents[1] / "data" / "windtunnel_tiny.npz"


def test_surfaces_are_closed_and_have_the_volume_of_their_body() -> None:
    for body in (BODY, *bodies.plan(8, seed=3)):
        surface = bodies.triangles(body)
        corners = surface.round(9).tolist()
        edges = Counter((tuple(face[i]), tuple(face[(i + 1) % 3])) for face in corners for i in range(3))
        assert all(count == 1 and edges[end, start] == 1 for (start, end), count in list(edges.items()))
        box = bodies.WIDTH * body.height * body.length
        assert 0.85 * box < bodies.volume(surface) < box
        assert surface[..., 2].min() == pytest.approx(body.ride_height)
        assert surface[..., 2].max() == pytest.approx(body.ride_height + body.height)


def test_yaw_turns_the_nose_without_changing_the_body() -> None:
    straight = bodies.triangles(replace(BODY, yaw=0.0))
    turned = bodies.triangles(replace(BODY, yaw=90.0))
    assert bodies.volume(turned) == pytest.approx(bodies.volume(straight))
    np.testing.assert_allclose(turned[..., 1], straight[..., 0], atol=1e-12)


def test_plan_is_a_latin_hypercube_that_its_seed_decides() -> None:
    plan = bodies.plan(10, seed=1)
    assert plan == bodies.plan(10, seed=1) != bodies.plan(10, seed=2)
    for name, (low, high) in bodies.RANGES.items():
        tenths = [int(10 * (getattr(body, name) - low) / (high - low)) for body in plan]
        assert sorted(tenths) == list(range(10)), name


@pytest.mark.parametrize(
    "change", [{"slant": 70.0}, {"length": 0.3}, {"height": 0.2}, {"speed": 0.0}, {"yaw": float("nan")}]
)
def test_impossible_bodies_are_refused_by_name_and_value(change: dict[str, float]) -> None:
    (name, value) = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"^{name} must .*{value}"):
        replace(BODY, **change)


def test_stored_case_holds_a_flow_around_its_body() -> None:
    metadata, flow = make_cases.load(STORED)
    assert Body(**metadata["body"]) == BODY
    assert metadata["resolution"] == asdict(Resolution.tiny())
    assert metadata["solution"]["iterations"] == 30 and not metadata["solution"]["converged"]
    assert set(metadata["solution"]["residuals"]) == {"Ux", "Uy", "Uz", "p", "k", "omega"}
    assert metadata["cells"] == len(flow.velocity)
    _check_flow(flow, BODY)
    # The stored float16 values give the force of the solver's own values.
    kept = metadata["force_coefficients"]
    np.testing.assert_allclose(reading.force(flow, metadata["frontal_area"]), kept, atol=2e-3)


@pytest.mark.skipif(bool(openfoam_case.missing_programs()), reason="OpenFOAM is not installed")
def test_small_case_is_solved_anew_and_its_forces_are_openfoams_own(tmp_path: Path) -> None:
    pytest.importorskip("pyvista")
    line = make_cases.make(
        make_cases.FULL_CASE, BODY, Resolution.tiny(), tmp_path / "data", tmp_path / "runs", keep=True
    )
    assert "30 iterations" in line
    metadata, flow = make_cases.load(tmp_path / "data" / "case_003.npz")
    assert Body(**metadata["body"]) == BODY
    _check_flow(flow, BODY)
    table = tmp_path / "runs" / "case_003" / "postProcessing" / "coefficients" / "0" / "coefficient.dat"
    _, drag, side, lift, *_ = map(float, table.read_text().splitlines()[-1].split())
    # OpenFOAM takes a face's area vector, we its area and normal: warped faces differ.
    np.testing.assert_allclose(metadata["force_coefficients"], [drag, side, lift], atol=0.01)
    # Of this case of the plan the whole mesh is stored.
    cells, body = vtk_files.load_solved(tmp_path / "data" / "full_003")
    again = reading.flow_of(cells, body, BODY.speed)
    assert len(again.velocity) == metadata["cells"]
    np.testing.assert_allclose(
        reading.force(again, metadata["frontal_area"]), metadata["force_coefficients"], atol=1e-4
    )


def test_case_that_fails_is_written_down_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openfoam_case, "PROGRAMS", ("no-such-mesher",))
    line = make_cases.make(3, BODY, Resolution.tiny(), tmp_path / "data", tmp_path / "runs", keep=False)
    assert "case 3 failed" in line and "no-such-mesher" in line
    assert "no-such-mesher" in (tmp_path / "runs" / "failed" / "case_003.txt").read_text()
    assert not (tmp_path / "data").exists()


def test_stored_cases_of_another_plan_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case_000.npz").write_bytes(STORED.read_bytes())
    monkeypatch.setattr(openfoam_case, "PROGRAMS", ())
    monkeypatch.setattr(sys, "argv", ["make_cases.py", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match=r"case_000\.npz is of another plan or resolution"):
        make_cases.main()


def _check_flow(flow: reading.Flow, body: Body) -> None:
    """Closed surface around the body's volume, its normals outward; stagnation at the nose; drag along the wind."""
    area_vectors = flow.surface_normals * flow.surface_areas[:, None]
    assert np.abs(area_vectors.sum(axis=0)).max() < 0.01
    volume = (flow.surface_points * area_vectors).sum() / 3
    assert volume == pytest.approx(bodies.volume(bodies.triangles(body)), rel=0.03)
    stagnation = flow.pressure.argmax()
    assert flow.surface_points[stagnation, 0] < -0.8 * body.length / 2
    assert 0.8 < flow.pressure[stagnation] < 1.3
    assert 0.1 < reading.force(flow, bodies.frontal_area(body))[0] < 1.0
    assert len(flow.velocity) == len(flow.volume_points) == len(flow.volume_pressure)
