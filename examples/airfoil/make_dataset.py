"""Makes ``data/airfoils.npz``: flow around airfoils of the UIUC database, solved by AeroSandbox's panel method.

Each shape is solved twice, at angles of attack of 0 and 90 degrees: the flow is linear in the free stream, so the two
solutions give every angle. Shapes are taken in a fixed random order until enough are accepted; an interrupted run goes
on where it stopped (every solved shape is a file of its own in ``runs/dataset``).

    python examples/airfoil/make_dataset.py --workers 2
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import panel_flow
from numpy.typing import NDArray
from panel_flow import BOX

HERE = Path(__file__).resolve().parent
DATA_FILE = HERE / "data" / "airfoils.npz"
CACHE = HERE / "runs" / "dataset"

N_SHAPES = 880
SEED = 20
NODES_PER_SIDE = 81
VOLUME_POINTS = 512
# Closer than this the velocity shows the corners of the panels rather than the flow.
MIN_DISTANCE = 0.005

# A cusped trailing edge makes the solver's two sheets coincide, and their difference is then undetermined (strengths of
# 1e4 were seen): every shape gets a gap of at least this, in chords.
MIN_GAP = 0.0025
MAX_GAP = 0.02
THICKNESS = (0.05, 0.30)
# Shapes nearer to each other than this everywhere are one shape under two names.
DUPLICATE_DISTANCE = 1e-3
# Old contours were digitised by hand and carry waves that the solver turns into waves of pressure. Two limits tell them
# from the airfoil's own features: second differences of the surface speed (kinks), and its distance from a running
# cubic fit behind the leading edge (waves).
MAX_KINK = 0.7
MAX_WAVE = 0.05
WAVE_HALF_WINDOW = 6
WAVE_FROM_X = 0.05
# Pressure is equal on both sides of a trailing edge. Where it differs by more than this a few nodes before (x = 0.994),
# the edge is too thin for its panels.
MAX_EDGE_LOAD = 0.2
EDGE_NODE = 4
MAX_RESIDUAL = 1e-6


class Rejected(Exception):
    """A geometry that the data set leaves out; the text is the reason."""


def require_aerosandbox() -> Any:
    """Imports AeroSandbox, or ends the program with one line that says how to get it."""
    try:
        import aerosandbox
    except ImportError as error:
        sys.exit(f"make_dataset.py needs the package aerosandbox ({error}): pip install aerosandbox")
    return aerosandbox


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Sends the process's standard output to nowhere: the solver's log is written by C++ and ignores sys.stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(sink)


def database_names() -> list[str]:
    """Returns the names of the UIUC database in the order in which shapes are considered."""
    folder = Path(require_aerosandbox().__file__).parent / "geometry" / "airfoil" / "airfoil_database"
    names = sorted(path.stem for path in folder.glob("*.dat"))
    return [names[i] for i in np.random.default_rng(SEED).permutation(len(names))]


def load_nodes(name: str) -> NDArray[np.float64]:
    """Returns (N, 2) nodes of a database airfoil: chord from (0, 0) to (1, 0), cosine spacing, open trailing edge.

    Raises:
        Rejected: If the geometry is damaged or out of the range of shapes.
    """
    asb = require_aerosandbox()
    try:
        airfoil = asb.Airfoil(name)
        if airfoil.coordinates is None or len(airfoil.coordinates) < 10:
            raise Rejected("unreadable coordinates")
        airfoil = airfoil.normalize().repanel(n_points_per_side=NODES_PER_SIDE)
    except (ValueError, IndexError, TypeError, ArithmeticError) as error:
        raise Rejected("cannot be repanelled") from error
    nodes = np.array(airfoil.coordinates, dtype=np.float64)
    if nodes.shape != (2 * NODES_PER_SIDE - 1, 2) or not np.isfinite(nodes).all():
        raise Rejected("cannot be repanelled")
    gap = float(np.hypot(*(nodes[0] - nodes[-1])))
    if gap < 1e-6:
        nodes[0] = nodes[-1] = (nodes[0] + nodes[-1]) / 2
    if gap > MAX_GAP:
        raise Rejected(f"trailing edge thicker than {MAX_GAP}")
    if gap < MIN_GAP:
        airfoil = asb.Airfoil(name=name, coordinates=nodes).set_TE_thickness(MIN_GAP)
        nodes = np.array(airfoil.coordinates, dtype=np.float64)
    # What is stored is what is solved: the rounding to float32 comes first.
    nodes = nodes.astype(np.float32).astype(np.float64)

    thickness = float(asb.Airfoil(name=name, coordinates=nodes).max_thickness())
    if not THICKNESS[0] <= thickness <= THICKNESS[1]:
        raise Rejected(f"thickness outside {THICKNESS[0]} to {THICKNESS[1]}")
    panels = np.diff(nodes, axis=0)
    length = np.hypot(*panels.T)
    if length.min() < 1e-5 or nodes[0, 1] <= nodes[-1, 1] or sides_cross(nodes):
        raise Rejected("contour crosses itself")
    turn = np.abs(np.angle(np.exp(1j * np.diff(np.unwrap(np.arctan2(panels[:, 1], panels[:, 0]))))))
    if turn.max() > np.radians(60):
        raise Rejected("contour has a corner")
    return nodes


def sides_cross(nodes: NDArray[np.float64]) -> bool:
    """Whether the upper side of the (N, 2) nodes touches the lower side between the two edges."""
    upper, lower = nodes[:NODES_PER_SIDE][::-1], nodes[NODES_PER_SIDE - 1 :]
    x = np.linspace(0.005, 0.995, 199)
    return bool(np.any(np.interp(x, upper[:, 0], upper[:, 1]) <= np.interp(x, lower[:, 0], lower[:, 1])))


def solve(nodes: NDArray[np.float64], angle_degrees: float) -> NDArray[np.float64]:
    """Returns (N,): AeroSandbox's sheet strengths (the surface speeds) in a unit free stream."""
    asb = require_aerosandbox()
    with silence():
        flow = asb.AirfoilInviscid(
            airfoil=asb.Airfoil(name="body", coordinates=nodes),
            op_point=asb.OperatingPoint(velocity=1.0, alpha=angle_degrees),
        )
    return np.array(flow.airfoils[0].gamma, dtype=np.float64)


def check_solution(nodes: NDArray[np.float64], strengths: NDArray[np.float64]) -> None:
    """Raises Rejected unless the (N, 2) strengths are finite, keep the wall tight and vary smoothly along it."""
    if not np.isfinite(strengths).all():
        raise Rejected("solver failed")
    middle = (nodes[1:] + nodes[:-1]) / 2
    panels = np.diff(nodes, axis=0)
    normal = np.stack((panels[:, 1], -panels[:, 0]), axis=1) / np.hypot(*panels.T)[:, None]
    velocity = panel_flow.induced_velocity(middle, nodes, strengths) + np.eye(2)
    if np.abs(np.einsum("msd,md->ms", velocity, normal)).max() > MAX_RESIDUAL * np.abs(strengths).max():
        raise Rejected("solver failed")
    speed = strengths @ panel_flow.free_stream_weights(np.array([-4.0, 0.0, 4.0, 8.0])).T
    if np.abs(speed[:-2] - 2 * speed[1:-1] + speed[2:]).max() > MAX_KINK:
        raise Rejected("surface speed has kinks")
    pressure = 1 - speed**2
    if np.abs(pressure[EDGE_NODE] - pressure[-1 - EDGE_NODE]).max() > MAX_EDGE_LOAD:
        raise Rejected("trailing edge carries load")
    window = np.arange(-WAVE_HALF_WINDOW, WAVE_HALF_WINDOW + 1)
    smooth = np.linalg.pinv(np.vander(window, 4, increasing=True))[0]
    inner = slice(WAVE_HALF_WINDOW, -WAVE_HALF_WINDOW)
    wave = np.stack([np.convolve(column, smooth, "valid") for column in speed[:, 1:3].T], axis=1) - speed[inner, 1:3]
    if np.abs(wave[nodes[inner, 0] > WAVE_FROM_X]).max() > MAX_WAVE:
        raise Rejected("surface speed has waves")


def volume_points(name: str, nodes: NDArray[np.float64]) -> NDArray[np.float16]:
    """Returns (VOLUME_POINTS, 2) random points outside the body, two thirds of them near it, the rest over the box."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    kept: list[NDArray[np.float16]] = []
    while sum(map(len, kept)) < VOLUME_POINTS:
        uniform = rng.uniform(BOX[::2], BOX[1::2], size=(VOLUME_POINTS // 3 + 1, 2))
        position = rng.uniform(0, len(nodes) - 1, size=2 * VOLUME_POINTS // 3)
        left = position.astype(np.int64)
        share = (position - left)[:, None]
        away = np.exp(rng.uniform(np.log(MIN_DISTANCE), np.log(0.4), size=len(position)))[:, None]
        turn = rng.uniform(0, 2 * np.pi, size=len(position))
        near = nodes[left] * (1 - share) + nodes[left + 1] * share
        near += away * np.stack((np.cos(turn), np.sin(turn)), axis=1)
        # Rounded before the velocity is computed there, so that storing them costs no accuracy.
        points = rng.permutation(np.concatenate((uniform, near))).astype(np.float16)
        exact = points.astype(np.float64)
        outside = ~panel_flow.contains(exact, nodes) & (panel_flow.distance_to_body(exact, nodes) >= MIN_DISTANCE)
        in_box = (exact >= BOX[::2]).all(axis=1) & (exact <= BOX[1::2]).all(axis=1)
        kept.append(points[outside & in_box])
    return np.concatenate(kept)[:VOLUME_POINTS]


def make_shape(name: str) -> dict[str, NDArray[Any]]:
    """Solves one airfoil.

    Returns:
        ``nodes`` (N, 2) float32; ``surface_speed`` (N, 2) float32, the sheet strength for the free streams at 0 and 90
        degrees; ``volume_points`` (M, 2) float16; ``volume_velocity`` (M, 2, 2) float16, what the body adds to the two
        unit free streams (stream, component).

    Raises:
        Rejected: If the geometry or its solution is damaged.
    """
    nodes = load_nodes(name)
    try:
        strengths = np.stack([solve(nodes, 0.0), solve(nodes, 90.0)], axis=1)
    except RuntimeError as error:
        raise Rejected("solver failed") from error
    check_solution(nodes, strengths)
    points = volume_points(name, nodes)
    velocity = panel_flow.induced_velocity(points.astype(np.float64), nodes, strengths)
    return {
        "nodes": nodes.astype(np.float32),
        "surface_speed": strengths.astype(np.float32),
        "volume_points": points,
        "volume_velocity": velocity.astype(np.float16),
    }


def make_or_recall(name: str, cache: Path) -> tuple[str, str]:
    """Solves one airfoil unless its file is in the cache; returns the name and, if it was rejected, the reason."""
    file = cache / f"{name}.npz"
    if not file.exists():
        try:
            arrays = make_shape(name)
        except Rejected as reason:
            arrays = {"rejected": np.array(str(reason))}
        partial = file.with_suffix(f".{os.getpid()}.partial.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(file)
    with np.load(file) as stored:
        return name, str(stored["rejected"]) if "rejected" in stored else ""


def is_duplicate(nodes: NDArray[np.float32], others: list[NDArray[np.float32]]) -> bool:
    """Whether one of the other shapes has all its nodes within DUPLICATE_DISTANCE of these."""
    return bool(others) and bool((np.abs(np.stack(others) - nodes).max(axis=(1, 2)) < DUPLICATE_DISTANCE).any())


def make_dataset(names: list[str], n_shapes: int, workers: int, cache: Path, output: Path) -> dict[str, Any]:
    """Solves airfoils until n_shapes of them are accepted or there are no more, and writes the data set.

    Args:
        names: Airfoils of the database, in the order in which they are considered.
        n_shapes: Number of shapes wanted.
        workers: Number of solver processes.
        cache: Folder of what is solved already.
        output: File of the data set.

    Returns:
        The metadata of the data set.
    """
    from tqdm import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    accepted: list[str] = []
    shapes: list[dict[str, NDArray[Any]]] = []
    nodes: list[NDArray[np.float32]] = []
    rejected: dict[str, list[str]] = {}
    solve_one = functools.partial(make_or_recall, cache=cache)
    with multiprocessing.get_context("spawn").Pool(workers) as pool, tqdm(total=n_shapes, unit="shape") as progress:
        # A short look-ahead: little is solved in vain once there are enough.
        for start in range(0, len(names), 16):
            for name, reason in pool.map(solve_one, names[start : start + 16], chunksize=1):
                if len(accepted) == n_shapes:
                    break
                if not reason:
                    with np.load(cache / f"{name}.npz") as stored:
                        shape = dict(stored)
                    reason = "duplicate of an earlier shape" if is_duplicate(shape["nodes"], nodes) else ""
                if reason:
                    rejected.setdefault(reason, []).append(name)
                    continue
                accepted.append(name)
                shapes.append(shape)
                nodes.append(shape["nodes"])
                progress.update()
            if len(accepted) == n_shapes:
                break
    metadata: dict[str, Any] = {
        "source": "UIUC airfoil database, solved by aerosandbox.AirfoilInviscid at 0 and 90 degrees",
        "aerosandbox": require_aerosandbox().__version__,
        "shapes": len(accepted),
        "seed": SEED,
        "box": BOX,
        "min_distance": MIN_DISTANCE,
        "min_gap": MIN_GAP,
        "rejected_counts": {reason: len(those) for reason, those in sorted(rejected.items())},
        "rejected": {reason: sorted(those) for reason, those in sorted(rejected.items())},
        "rounding": "volume velocity: relative 2^-11 of what the body adds; the rest is float32 or exact",
    }
    arrays = {key: np.stack([shape[key] for shape in shapes]) for key in shapes[0]}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial.npz")
    np.savez_compressed(partial, names=np.array(accepted), metadata=np.array(json.dumps(metadata)), **arrays)
    partial.replace(output)
    return metadata


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the data set of the airfoil example.")
    parser.add_argument("--shapes", type=int, default=N_SHAPES, help="number of accepted shapes")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="parallel solver processes")
    parser.add_argument("--output", type=Path, default=DATA_FILE)
    arguments = parser.parse_args()
    require_aerosandbox()
    metadata = make_dataset(database_names(), arguments.shapes, arguments.workers, CACHE, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.2f} MiB, {metadata['shapes']} shapes")
    for reason, count in metadata["rejected_counts"].items():
        print(f"  left out, {reason}: {count}")


if __name__ == "__main__":
    main()
