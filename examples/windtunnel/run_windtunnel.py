"""Learns the flow around car-like bodies from OpenFOAM's solutions and predicts it around bodies it has never seen.

    make windtunnel                                    # the same, set-up included, from the root of the project
    python examples/windtunnel/run_windtunnel.py       # at most eight minutes of training, then all the rest

The cases are shipped; ``make_cases.py`` makes them again. An interrupted training continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REQUIRED = ("torch", "numpy", "scipy", "tqdm", "matplotlib", "PIL", "pyvista", "anchor_attention")
METHODS = ("model", "nearest", "mean", "neighbours")
FIELDS = ("pressure", "shear", "velocity", "disturbance")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="wall-clock seconds of training, however many steps")
    parser.add_argument("--steps", type=int, help="steps of training, however long: reproducible on a machine")
    # Two threads that share their cores with other programs wait for each other most of the time: a step took nine
    # seconds where one thread took half of one.
    parser.add_argument("--threads", type=int, default=1, help="threads of the training; the rest uses all cores")
    parser.add_argument("--restart", action="store_true", help="forget the checkpoint")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of the stored cases")
    parser.add_argument("--output", type=Path, default=HERE / "runs" / "model", help="folder of all that is written")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures out")
    return parser.parse_args()


def require_packages() -> None:
    """Ends the program with one line if a package is missing: now, not after the training."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-").replace("PIL", "pillow")
        sys.exit(f"run_windtunnel.py needs {', '.join(missing)}: pip install {names}")


def train(trainer: Any) -> None:
    """Runs the training under a progress bar."""
    from common.training import Progress, train_with_bar

    smooth: dict[str, float] = {}

    def describe(progress: Progress) -> str:
        nonlocal smooth
        smooth = {name: 0.9 * smooth.get(name, value) + 0.1 * value for name, value in progress.errors.items()}
        errors = ", ".join(f"{name} {smooth[name]:.2f}" for name in ("pressure", "velocity"))
        return f"step {progress.step}, errors: {errors}"

    train_with_bar(trainer, describe)


def score_cases(model: Any, seen: list[Any], unseen: list[Any], setting: Any) -> list[dict[str, Any]]:
    """Predicts every unseen case, by the model and by two guesses, and returns what each is worth."""
    import prediction
    import reading
    import scoring
    from tqdm import tqdm

    rows = []
    for case in tqdm(unseen, desc="unseen bodies", unit="body"):
        predicted, times = prediction.predict_case(model, case, setting)
        flows = {
            "model": predicted,
            "nearest": scoring.nearest(seen, case),
            "mean": scoring.mean(seen, case),
            "neighbours": scoring.neighbours(case),
        }
        force = reading.force(case.flow, case.frontal_area).tolist()
        rows.append(
            {
                "case": case.number,
                "body": asdict(case.body),
                "solved": dict(zip(("drag", "side", "lift"), force, strict=True)),
                "seconds": asdict(times),
                **{name: asdict(scoring.score(flow, case.flow, case.frontal_area)) for name, flow in flows.items()},
            }
        )
    return rows


def summaries(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, median and worst of every error by method; of the drag the relative one, of the lift the absolute one."""
    import scoring

    table = {}
    for method in METHODS:
        errors = {name: [row[method][name] for row in rows] for name in FIELDS}
        errors["drag"] = [abs(row[method]["drag_error"]) / row["solved"]["drag"] for row in rows]
        errors["lift"] = [abs(row[method]["lift_error"]) for row in rows]
        table[method] = {name: scoring.summary(values) for name, values in errors.items()}
    return table


def predict_full_mesh(model: Any, stem: Path, body: Any, area: float, setting: Any, output: Path) -> dict[str, Any]:
    """Predicts at every cell and face of a whole mesh, writes ParaView's files, and returns the figures."""
    import prediction
    import reading
    import scoring
    import vtk_files

    cells, surface = vtk_files.load_solved(stem)
    solved = reading.flow_of(cells, surface, body.speed)
    faces = solved.surface_points, solved.surface_normals, solved.surface_areas
    # The first pass of a process is slower: memory is fetched from the system, code is loaded.
    predictions = [
        prediction.predict(model, faces, solved.volume_points, body.speed, body.yaw, setting) for _ in range(3)
    ]
    predicted, times = min(predictions, key=lambda those: those[1].total)
    vtk_files.add_prediction(cells, surface, predicted, body.speed)
    vtk_files.write(cells, surface, output)
    return {
        "cells": len(solved.volume_points),
        "faces": len(solved.surface_points),
        "score": asdict(scoring.score(predicted, solved, area)),
        "seconds": asdict(times),
        "total_seconds": times.total,
        "points_per_second": times.points_per_second,
        "points_per_core_second": times.points / times.decode_cpu,
        "files": [output.with_suffix(ending).name for ending in (".vtu", ".vtp")],
    }


def draw_pictures(rows: list[dict[str, Any]], output: Path, speed: float) -> None:
    """Draws the whole mesh that was written to ``full.vtu`` and ``full.vtp``, and the forces of all unseen cases."""
    import rendering
    import vtk_files

    cells, surface = vtk_files.load_solved(output / "full")
    rendering.draw_pressure(surface, output / "pressure.png")
    rendering.draw_slice(cells, speed, output / "slice.png")
    rendering.draw_wake(cells, surface, speed, output / "wake.png")
    pairs = [([row["solved"][name] for row in rows], [row["model"][name] for row in rows]) for name in ("drag", "lift")]
    rendering.draw_forces(*pairs, output / "forces.png")


def solver_times(folder: Path) -> dict[str, Any]:
    """Median seconds of OpenFOAM's programs over all cases, those of the fastest case, and how the cases went."""
    import make_cases
    import numpy as np

    solutions, cells = [], []
    for path in sorted(folder.glob("case_*.npz")):
        metadata, _ = make_cases.load(path)
        solutions.append(metadata["solution"])
        cells.append(metadata["cells"])
    names = ("mesh_seconds", "solve_seconds", "solve_cpu_seconds", "iterations")
    return {
        **{name: float(np.median([solution[name] for solution in solutions])) for name in names},
        "fastest_seconds": min(solution["mesh_seconds"] + solution["solve_seconds"] for solution in solutions),
        "cells": float(np.median(cells)),
        "cases": len(solutions),
        "converged": sum(solution["converged"] for solution in solutions),
        "largest_drag_spread": max(solution["drag_spread"] for solution in solutions),
    }


def main() -> None:
    arguments = parse_arguments()
    require_packages()
    sys.path.insert(0, str(HERE.parent))
    # Set before PyTorch is loaded: threads that spin while they wait are slow on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import make_cases
    import sampling
    import torch
    from common.branched import ModelConfig
    from common.machine import processor
    from prediction import Setting
    from surrogate import Trainer, TrainingConfig

    import anchor_attention

    started = time.monotonic()
    torch.set_num_threads(arguments.threads)
    try:
        cases = sampling.load_cases(arguments.data)
    except FileNotFoundError as error:
        sys.exit(f"run_windtunnel.py: {error}: make some with make_cases.py")
    numbers, unseen_numbers = sampling.split([case.number for case in cases])
    seen = [case for case in cases if case.number in numbers]
    unseen = [case for case in cases if case.number in unseen_numbers]
    if not seen or not unseen:
        sys.exit(f"run_windtunnel.py needs cases to learn from and unseen ones, got {len(seen)} and {len(unseen)}")
    config = TrainingConfig().limited(arguments.steps, arguments.seconds)
    checkpoint = arguments.output / "checkpoint.pt"
    if arguments.restart:
        checkpoint.unlink(missing_ok=True)
    try:
        trainer = Trainer(seen, ModelConfig(), config, checkpoint)
    except ValueError as error:
        sys.exit(f"{error}; --restart forgets it")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{len(seen)} bodies to learn from, {len(unseen)} unseen; {parameters:,} parameters")
    try:
        train(trainer)
    except KeyboardInterrupt:
        print(f"\ninterrupted at {trainer.done:.0%}; the same command goes on from there")
        sys.exit(130)

    torch.set_num_threads(os.cpu_count() or 1)
    setting = Setting(config.geometry_points, config.surface_anchors, config.volume_anchors)
    rows = score_cases(trainer.model, seen, unseen, setting)
    metrics: dict[str, Any] = {
        "unseen": summaries(rows),
        "cases": rows,
        "training": {
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "cpu_seconds": trainer.cpu_seconds,
            "parameters": parameters,
            **trainer.signature,
        },
        "openfoam": solver_times(arguments.data),
    }
    stem = arguments.data / f"full_{make_cases.FULL_CASE:03d}"
    whole = next((case for case in unseen if case.number == make_cases.FULL_CASE), None)
    if whole is not None and stem.with_suffix(".vtu").is_file():
        target = arguments.output / "full"
        metrics["full_mesh"] = predict_full_mesh(trainer.model, stem, whole.body, whole.frontal_area, setting, target)
        if not arguments.no_pictures:
            draw_pictures(rows, arguments.output, whole.body.speed)
    metrics["environment"] = {
        "torch": torch.__version__,
        "training_threads": arguments.threads,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "instruction_set": anchor_attention.cpu_instruction_sets().selected,
        "load_average": os.getloadavg()[1],
        "total_seconds": time.monotonic() - started,
    }
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report(metrics, arguments.output)


def report(metrics: dict[str, Any], output: Path) -> None:
    """Prints what matters of the metrics."""
    print(f"\nmean error on {len(metrics['cases'])} unseen bodies   pressure   wall shear   velocity   drag (median)")
    for name, table in metrics["unseen"].items():
        fields = "".join(f"{table[field]['mean']:>12.1%}" for field in ("pressure", "shear", "velocity"))
        print(f"  {name:<28} {fields}    {table['drag']['median']:>10.1%}")
    if "full_mesh" in metrics:
        full, solver = metrics["full_mesh"], metrics["openfoam"]
        print(
            f"{full['cells']:,} cells and {full['faces']:,} faces of an unseen body in {full['total_seconds']:.1f} s, "
            f"{full['points_per_second']:,.0f} a second; OpenFOAM's mesh and solver took "
            f"{solver['mesh_seconds'] + solver['solve_seconds']:.0f} s a case"
        )
        print(f"for ParaView: {output / 'full.vtu'} and full.vtp")
    print(f"metrics and pictures: {output}")


if __name__ == "__main__":
    main()
