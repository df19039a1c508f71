"""Makes the data set: a seeded family of bodies, meshed and solved by OpenFOAM, one ``data/case_NNN.npz`` each.

    apt-get install openfoam                 # Debian's package, version 1912
    pip install pyvista
    python examples/windtunnel/make_cases.py --workers 2

Stored cases are not solved again: an interrupted run goes on where it stopped. A case that fails is named in
``runs/failed`` and passed over; delete its file there to try again. Every case is solved by one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bodies
import numpy as np
import openfoam_case
import reading
import vtk_files
from bodies import Body
from openfoam_case import Resolution, Solution
from reading import Flow

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
RUNS = HERE / "runs"
N_CASES = 56
SEED = 20
VOLUME_POINTS = 12288
# An unseen case of the plan whose whole mesh is stored, too.
FULL_CASE = 3


def store(path: Path, body: Body, resolution: Resolution, solution: Solution, flow: Flow, seed: int) -> None:
    """Writes one case: every face of the body and a random sample of cells.

    Positions are float32 (float16 is 2 mm apart at the tunnel's end), everything else float16.
    """
    n_cells = len(flow.volume_points)
    rows = np.random.default_rng(seed).permutation(n_cells)[:VOLUME_POINTS]
    area = bodies.frontal_area(body)
    metadata = {
        "body": asdict(body),
        "resolution": asdict(resolution),
        "solution": asdict(solution),
        "cells": n_cells,
        "frontal_area": area,
        "force_coefficients": reading.force(flow, area).tolist(),
    }
    arrays: dict[str, Any] = {"metadata": json.dumps(metadata)}
    for name, values in asdict(flow).items():
        chosen = values[rows] if name in ("volume_points", "velocity", "volume_pressure") else values
        kind = np.float32 if name in ("surface_points", "surface_areas", "volume_points") else np.float16
        arrays[name] = chosen.astype(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], Flow]:
    """Returns a stored case: its metadata, and its flow in float32."""
    with np.load(path) as arrays:
        metadata: dict[str, Any] = json.loads(str(arrays["metadata"]))
        return metadata, Flow(**{name: arrays[name].astype(np.float32) for name in Flow.__dataclass_fields__})


def make(number: int, body: Body, resolution: Resolution, data: Path, runs: Path, keep: bool) -> str:
    """Makes one case and returns a line about it; a failure is written to a file of its own and returned as well."""
    folder = runs / f"case_{number:03d}"
    try:
        openfoam_case.write(folder, body, resolution)
        solution = openfoam_case.solve(folder)
        cells, surface = reading.meshes(folder)
        flow = reading.flow_of(cells, surface, body.speed)
        if number == FULL_CASE:
            vtk_files.store_solved(cells, surface, data / f"full_{number:03d}")
        store(data / f"case_{number:03d}.npz", body, resolution, solution, flow, seed=number)
    except (openfoam_case.CaseError, ValueError) as error:
        failed = runs / "failed" / f"case_{number:03d}.txt"
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.write_text(f"{error}\n")
        return f"case {number} failed: {error}"
    if not keep:
        shutil.rmtree(folder)
    drag = reading.force(flow, bodies.frontal_area(body))[0]
    state = "converged" if solution.converged else "not converged"
    return (
        f"case {number}: {len(flow.volume_points):,} cells, {state} after {solution.iterations} iterations, "
        f"pressure residual {solution.residuals['p']:.1e}, drag {drag:.3f}, "
        f"{solution.mesh_seconds:.0f} s mesh + {solution.solve_seconds:.0f} s solver"
    )


def _make(arguments: tuple[Any, ...]) -> str:
    return make(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=N_CASES, help="cases of the plan")
    parser.add_argument("--first", type=int, help="make only the first so many of the plan")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the plan")
    parser.add_argument("--workers", type=int, default=1, help="cases at a time, one core each")
    parser.add_argument("--iterations", type=int, default=Resolution.iterations, help="most iterations of a case")
    parser.add_argument("--keep", action="store_true", help="keep the folders of OpenFOAM")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", type=Path, default=RUNS)
    arguments = parser.parse_args()
    if missing := openfoam_case.missing_programs():
        sys.exit(f"make_cases.py needs OpenFOAM's {', '.join(missing)}: apt-get install openfoam")

    resolution = Resolution(iterations=arguments.iterations)
    numbered = list(enumerate(bodies.plan(arguments.cases, arguments.seed)))
    left_out = {path.stem for path in (arguments.runs / "failed").glob("case_*.txt")}
    for number, body in numbered:
        path = arguments.data / f"case_{number:03d}.npz"
        if path.exists():
            metadata, _ = load(path)
            if (metadata["body"], metadata["resolution"]) != (asdict(body), asdict(resolution)):
                sys.exit(f"{path} is of another plan or resolution: give another --data, or delete it")
            left_out.add(path.stem)
    jobs = [
        (number, body, resolution, arguments.data, arguments.runs, arguments.keep)
        for number, body in numbered[: arguments.first]
        if f"case_{number:03d}" not in left_out
    ]
    print(f"{len(jobs)} cases to solve, {len(left_out)} are there or failed", flush=True)
    started = time.monotonic()
    with multiprocessing.Pool(arguments.workers) as pool:
        for done, line in enumerate(pool.imap_unordered(_make, jobs), start=1):
            left = (time.monotonic() - started) / done * (len(jobs) - done) / 60
            print(f"[{done}/{len(jobs)}, {left:.0f} min left] {line}", flush=True)
    failures = len(list((arguments.runs / "failed").glob("*.txt")))
    print(f"{len(list(arguments.data.glob('case_*.npz')))} cases in {arguments.data}, {failures} failed")


if __name__ == "__main__":
    main()
