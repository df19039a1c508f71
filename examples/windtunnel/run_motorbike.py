"""Predicts the flow around OpenFOAM's motorbike by a model that has seen boxes with a slant only: how far off it is.

    apt-get install openfoam openfoam-examples
    python examples/windtunnel/run_windtunnel.py       # trains the model
    python examples/windtunnel/run_motorbike.py        # meshes and solves the motorbike once, some minutes

The tutorial's surface, at half its size so that it stands in the tunnel as the bodies do, is meshed more finely than
they are. The solved case is kept in ``runs/motorbike`` and not solved again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GEOMETRY = Path("/usr/share/doc/openfoam-examples/examples/resources/geometry/motorBike.obj.gz")
SCALE = 0.5
SPEED = 30.0
SURFACE_LEVEL = 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", type=Path, default=GEOMETRY, help="surface as .obj.gz")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "runs" / "model" / "checkpoint.pt")
    parser.add_argument("--output", type=Path, default=HERE / "runs" / "motorbike")
    return parser.parse_args()


def read_surface(path: Path) -> Any:
    """Returns (T, 3, 3) float64: the triangles, scaled, the middle over the origin, on the ground."""
    import numpy as np
    import pyvista

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "surface.obj"
        with gzip.open(path) as packed, plain.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        mesh = pyvista.read(plain).triangulate()
    triangles = SCALE * np.asarray(mesh.points, dtype=np.float64)[mesh.regular_faces]
    edges = triangles[:, 1:] - triangles[:, :1]
    triangles = triangles[np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) > 1e-14]
    low, high = triangles.min(axis=(0, 1)), triangles.max(axis=(0, 1))
    return triangles - [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]]


def silhouette(triangles: Any) -> float:
    """Returns the area in square metres that the surface covers, seen along the wind, by counting squares of 4 mm."""
    import numpy as np

    size = 0.004
    edges = triangles[:, 1:] - triangles[:, :1]
    # Points close enough together in every triangle that each covered square has one.
    longest = max(np.linalg.norm(edges, axis=2).max(), np.linalg.norm(edges[:, 0] - edges[:, 1], axis=1).max())
    n = int(np.ceil(longest / size)) + 1
    covered = set()
    for i in range(n + 1):
        for j in range(n + 1 - i):
            points = triangles[:, 0] + (i / n) * edges[:, 0] + (j / n) * edges[:, 1]
            covered.update(map(tuple, np.floor(points[:, 1:] / size).astype(int)))
    return len(covered) * size**2


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(HERE.parent))
    import openfoam_case
    import prediction
    import reading
    import rendering
    import scoring
    import torch
    import vtk_files
    from common.branched import ModelConfig
    from surrogate import TunnelModel

    if not arguments.checkpoint.is_file():
        sys.exit(f"run_motorbike.py finds no model at {arguments.checkpoint}: run_windtunnel.py trains one")
    folder, stem = arguments.output / "case", arguments.output / "solved"
    state_file = arguments.output / "solution.json"
    if not state_file.is_file():
        if not arguments.geometry.is_file():
            sys.exit(f"run_motorbike.py finds no surface at {arguments.geometry}: apt-get install openfoam-examples")
        triangles = read_surface(arguments.geometry)
        area = silhouette(triangles)
        length = float(triangles[..., 0].max() - triangles[..., 0].min())
        print(f"{len(triangles):,} triangles, {length:.2f} m long, {area:.3f} m² across the wind; solving", flush=True)
        resolution = openfoam_case.Resolution(surface_level=SURFACE_LEVEL)
        openfoam_case.write_around(folder, triangles, SPEED, length, area, resolution)
        try:
            solution = openfoam_case.solve(folder)
        except openfoam_case.CaseError as error:
            sys.exit(f"run_motorbike.py: {error}")
        vtk_files.store_solved(*reading.meshes(folder), stem)
        content = {"solution": asdict(solution), "area": area, "speed": SPEED, "scale": SCALE}
        state_file.write_text(json.dumps(content, indent=2) + "\n")
    solved_case = json.loads(state_file.read_text())

    state = torch.load(arguments.checkpoint, weights_only=True)
    model = TunnelModel(ModelConfig(**state["signature"]["model"]))
    model.load_state_dict(state["model"])
    trained = state["signature"]["training"]
    setting = prediction.Setting(*(trained[name] for name in prediction.Setting.__dataclass_fields__))
    cells, surface = vtk_files.load_solved(stem)
    solved = reading.flow_of(cells, surface, solved_case["speed"])
    faces = solved.surface_points, solved.surface_normals, solved.surface_areas
    predicted, times = prediction.predict(model, faces, solved.volume_points, solved_case["speed"], 0.0, setting)
    force = reading.force(solved, solved_case["area"])
    metrics = {
        **solved_case,
        "cells": len(solved.volume_points),
        "faces": len(solved.surface_points),
        "solved": dict(zip(("drag", "side", "lift"), force.tolist(), strict=True)),
        "score": asdict(scoring.score(predicted, solved, solved_case["area"])),
        "seconds": asdict(times),
    }
    vtk_files.add_prediction(cells, surface, predicted, solved_case["speed"])
    vtk_files.write(cells, surface, arguments.output / "full")
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    rendering.draw_pressure(surface, arguments.output / "pressure.png")
    rendering.draw_slice(cells, solved_case["speed"], arguments.output / "slice.png")
    score = metrics["score"]
    print(
        f"pressure {score['pressure']:.0%}, wall shear {score['shear']:.0%}, velocity {score['velocity']:.0%} "
        f"relative L2 error; drag {score['drag']:.2f}, OpenFOAM's {force[0]:.2f}"
    )


if __name__ == "__main__":
    main()
