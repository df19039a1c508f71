"""Copies what the last runs found into ``results`` and writes the README's section on it: no figure is typed by hand.

python examples/windtunnel/run_windtunnel.py
python examples/windtunnel/run_motorbike.py
python examples/windtunnel/write_results.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE / "runs", HERE / "results"
HEADING = "## Results\n"
NAMES = {
    "model": "the surrogate",
    "nearest": "nearest seen case",
    "mean": "mean of all seen cases",
    "neighbours": "its own neighbours",
}
FIELDS = {
    "pressure": "surface pressure",
    "shear": "wall shear stress",
    "velocity": "velocity",
    "disturbance": "velocity less the wind",
}
PICTURES = {
    "pressure.png": "Pressure on an unseen body: OpenFOAM, surrogate, difference",
    "slice.png": "Velocity in the middle of the tunnel: OpenFOAM, surrogate, error",
    "wake.png": "Streamlines through the wake: OpenFOAM, surrogate",
    "forces.png": "Drag and lift of all unseen bodies, predicted against solved",
}


def _errors(metrics: dict[str, Any]) -> list[str]:
    table = metrics["unseen"]
    lines = [
        f"Errors on {len(metrics['cases'])} unseen bodies after learning from {metrics['training']['shapes']}: mean,",
        "and in brackets median and worst. Fields: relative L2 error over all faces of the body, or all stored cells",
        "around it. Drag: relative error of the coefficient; lift: its absolute error, because it passes through zero.",
        "*Its own neighbours* is no prediction: every face of OpenFOAM's solution guessed by the three nearest others",
        "of the same solution, which shows how rough it is on these meshes.",
        "",
        f"| | {' | '.join(NAMES.values())} |",
        "|---|---|---|---|---|",
    ]
    rows = {**FIELDS, "drag": "drag", "lift": "lift"}
    for field, name in rows.items():
        form = "{:.3f}" if field == "lift" else "{:.1%}"
        cells = []
        for method in NAMES:
            if method == "neighbours" and field in ("velocity", "disturbance"):
                # Stored cells are a sample, too far from each other.
                cells.append("")
                continue
            mean, *others = (form.format(table[method][field][kind]) for kind in ("mean", "median", "worst"))
            cells.append(f"{mean} ({', '.join(others)})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _times(metrics: dict[str, Any]) -> list[str]:
    solver, full, training = metrics["openfoam"], metrics["full_mesh"], metrics["training"]
    seconds, environment = full["seconds"], metrics["environment"]
    return [
        "| one body | seconds |",
        "|---|---|",
        f"| blockMesh and snappyHexMesh, one core, median of {solver['cases']} cases | {solver['mesh_seconds']:.0f} |",
        f"| simpleFoam, one core, median ({solver['iterations']:.0f} iterations) | {solver['solve_seconds']:.0f}, "
        f"{solver['solve_cpu_seconds']:.0f} of them on a processor |",
        f"| OpenFOAM's programs together, fastest case | {solver['fastest_seconds']:.0f} |",
        f"| surrogate, {full['cells']:,} cells and {full['faces']:,} faces: features of all points | "
        f"{seconds['features']:.2f} |",
        f"| geometry and anchors | {seconds['encode']:.2f} |",
        f"| all cells and faces through the cache | {seconds['decode']:.2f} |",
        f"| surrogate, all | {full['total_seconds']:.2f} |",
        "",
        "Cases that were solved beside other programs took longer for it; of them all, the fastest is a fair measure.",
        f"The surrogate is {solver['fastest_seconds'] / full['total_seconds']:.0f} times faster than that one, after",
        f"{training['seconds'] / 60:.1f} minutes of training, {training['cpu_seconds'] / 60:.1f} on a processor "
        f"({training['steps']:,} steps, {training['parameters']:,} parameters). The surrogate needs",
        "the mesh's cell centres, not OpenFOAM's mesh: any points will do. Streaming:",
        f"{full['points_per_second']:,.0f} cells and faces a second on {environment['threads']} cores, "
        f"{full['points_per_core_second']:,.0f} per second and core",
        "by the processor's time, which other programs do not lengthen.",
        f"All was measured on {environment['threads']} cores ({environment['processor']}, "
        f"{environment['instruction_set']}) that other programs shared (load",
        f"{environment['load_average']:.0f} while the surrogate ran): seconds on a clock, training's too, are longer",
        "than on a quiet machine.",
        f"Of {solver['cases']} cases {solver['converged']} converged; the drag of the last 30 iterations moved by "
        f"{solver['largest_drag_spread']:.4f} at most.",
    ]


def _motorbike(metrics: dict[str, Any]) -> list[str]:
    score, solved, solution = metrics["score"], metrics["solved"], metrics["solution"]
    total = sum(metrics["seconds"][name] for name in ("features", "encode", "decode"))
    state = "converged" if solution["converged"] else "not converged"
    return [
        "### The motorbike",
        "",
        f"OpenFOAM's motorbike at half its size, {metrics['cells']:,} cells and {metrics['faces']:,} faces, {state}",
        f"after {solution['iterations']} iterations ([raw](results/motorbike/metrics.json)). The model has seen boxes",
        "with a slanted roof only, and it shows: errors of",
        f"{score['pressure']:.0%} in the pressure, {score['shear']:.0%} in the wall shear stress and "
        f"{score['velocity']:.0%} in the velocity; a drag coefficient of {score['drag']:.2f}",
        f"instead of {solved['drag']:.2f}. It took {total:.1f} s; simpleFoam alone took "
        f"{solution['solve_cpu_seconds'] / 60:.1f} minutes of a core. Do not use a",
        "surrogate for what it has not learnt from; solved motorbikes among the cases would be the remedy.",
        "",
        "![Pressure on the motorbike: OpenFOAM, surrogate, difference](results/motorbike/pressure.png)",
        "![Velocity around the motorbike: OpenFOAM, surrogate, error](results/motorbike/slice.png)",
    ]


def results_section(metrics: dict[str, Any], motorbike: dict[str, Any] | None) -> str:
    """Returns the section, heading included."""
    full = metrics["full_mesh"]["score"]
    lines = [
        HEADING,
        "From [results/metrics.json](results/metrics.json), written by `run_windtunnel.py`; this section by "
        "`write_results.py`.",
        "",
        *_errors(metrics),
        "",
        f"The pictures show the unseen case whose whole mesh is shipped (pressure {full['pressure']:.1%}, velocity "
        f"{full['velocity']:.1%} over all its cells).",
        "",
        *(f"![{text}](results/{name})" for name, text in PICTURES.items()),
        "",
        "### Time",
        "",
        *_times(metrics),
    ]
    if motorbike is not None:
        lines += ["", *_motorbike(motorbike)]
    return "\n".join(lines) + "\n"


def copy_results() -> None:
    """Copies metrics and pictures of the last runs, but no meshes and no checkpoint."""
    for source, target in ((RUNS / "model", RESULTS), (RUNS / "motorbike", RESULTS / "motorbike")):
        for path in [source / "metrics.json", *sorted(source.glob("*.png"))]:
            if path.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.name)


def read_results() -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the committed metrics, and the motorbike's where there are any."""
    motorbike = RESULTS / "motorbike" / "metrics.json"
    return (
        json.loads((RESULTS / "metrics.json").read_text()),
        json.loads(motorbike.read_text()) if motorbike.is_file() else None,
    )


def main() -> None:
    copy_results()
    readme = HERE / "README.md"
    text = readme.read_text().split(HEADING)[0].rstrip()
    readme.write_text(f"{text}\n\n{results_section(*read_results())}")


if __name__ == "__main__":
    main()
