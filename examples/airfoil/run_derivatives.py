"""Learns the velocity around airfoils three ways and compares what its derivatives are.

    python examples/airfoil/run_derivatives.py                  100 steps of each model
    python examples/airfoil/run_derivatives.py --only-memory    measures memory alone again

The velocity is an output of the model; or the derivative of a stream function, (∂ψ/∂y, −∂ψ/∂x), which has no divergence
whatever ψ is: exact, by two tangents, or by central differences with four more queries per point. The flow has no
vorticity either, which none of the models is told. Writes derivatives.json, derivatives.md and a picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Set before PyTorch is loaded: threads that spin while they wait are slow on a machine with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataset
import evaluation
import numpy as np
import panel_flow
import pictures
import torch
from common.machine import processor
from model import DIFFERENCE_STEP, VELOCITIES, AirfoilModel, KVCache, ModelConfig, StreamFunctionModel, flow_condition
from torch import Tensor
from training import Trainer, TrainingConfig

import anchor_attention
from anchor_attention import physics

HERE = Path(__file__).resolve().parent
NAMES = {
    "direct": "velocity as output",
    "stream_function": "stream function, exact derivatives",
    "stream_function_differences": "stream function, central differences",
}
ANGLE = 4.0
GRID = (300, 200)
STEPS_OF_MEMORY = 3

Field = Callable[[Tensor], Tensor]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-memory", action="store_true", help="keep the other results of the output folder")
    parser.add_argument("--steps", type=int, default=100, help="steps of training of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=dataset.DATA_FILE)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "derivatives")
    parser.add_argument("--grid", type=int, nargs=2, default=GRID, metavar=("NX", "NY"), help="points of the picture")
    return parser.parse_args(arguments)


def make_trainer(velocity: str, shapes: dataset.Shapes, steps: int) -> Trainer:
    return Trainer(shapes, ModelConfig(velocity=velocity), TrainingConfig(seconds=None, steps=steps))


def train(trainers: dict[str, Trainer]) -> dict[str, list[float]]:
    """Trains all to their end, step by step in turn, so that what else the machine does meets all of them.

    Returns:
        Processor seconds of every step.
    """
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {velocity: [] for velocity in trainers}
    runs = {velocity: trainer.run() for velocity, trainer in trainers.items()}
    for _ in tqdm(range(next(iter(trainers.values())).config.steps or 0), desc="training", unit="step"):
        for velocity, run in runs.items():
            begin = time.process_time()
            next(run)
            seconds[velocity].append(time.process_time() - begin)
    return seconds


def memory_of_training(velocity: str, data: Path, threads: int) -> int:
    """Bytes by which some steps of training raise the resident memory of a process of their own at its peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return int(pool.apply(_memory_here, (velocity, data, threads)))


def _memory_here(velocity: str, data: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    trainer = make_trainer(velocity, dataset.split(dataset.load(data)[0])[0], STEPS_OF_MEMORY)
    before = _kibibytes("VmRSS")
    # What getrusage calls the peak may be that of the parent; this is the process's own, from now on.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in trainer.run():
        pass
    return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def velocity_field(model: AirfoilModel, condition: Tensor, caches: list[KVCache]) -> Field:
    """The model's velocity as a function of the points that can be differentiated in forward mode."""

    def velocity(points: Tensor) -> Tensor:
        if isinstance(model, StreamFunctionModel) and model.config.velocity == "stream_function":
            # A tangent of a gradient: forward mode cannot be nested in itself.
            added = physics.stream_velocity(lambda x: model.stream_function(x, condition, caches), points)
            return condition[:, None] + added
        return model.decode({"volume": points}, condition, caches)["volume"]

    return velocity


def differences(field: Field, points: Tensor) -> Tensor:
    """(B, N, 2, 2): ∂u_c / ∂x_i of a field by central differences."""
    steps = DIFFERENCE_STEP * torch.eye(2)
    columns = [(field(points + step) - field(points - step)) / (2 * DIFFERENCE_STEP) for step in steps]
    return torch.stack(columns, dim=-1)


def divergence(slopes: Tensor) -> Tensor:
    """Of a Jacobian that is there already: (..., 2, 2) -> (...)."""
    return slopes[..., 0, 0] + slopes[..., 1, 1]


def vorticity(slopes: Tensor) -> Tensor:
    """Likewise."""
    return slopes[..., 1, 0] - slopes[..., 0, 1]


@torch.no_grad()
def derivatives_on_unseen(model: AirfoilModel, unseen: dataset.Shapes) -> dict[str, float]:
    """Root mean squares over all stored points around the unseen airfoils at :data:`ANGLE`."""
    model.eval()
    squares: dict[str, list[Tensor]] = {}
    for cases in evaluation.test_cases(unseen, ANGLE):
        condition, points = flow_condition(cases.angle), cases.points["volume"]
        field = velocity_field(model, condition, encode(model, cases))
        _, slopes = physics.jacobian(field, points)
        by_differences = differences(field, points)
        for name, values in {
            "gradient": slopes.flatten(2).norm(dim=2),
            "divergence": divergence(slopes),
            "divergence_by_differences": divergence(by_differences),
            "vorticity": vorticity(slopes),
        }.items():
            squares.setdefault(name, []).append(values.double().square().flatten())
    return {name: torch.cat(values).mean().sqrt().item() for name, values in squares.items()}


def encode(model: AirfoilModel, cases: dataset.Cases) -> list[KVCache]:
    counts = {"surface": evaluation.SURFACE_ANCHORS, "volume": evaluation.VOLUME_ANCHORS}
    anchors = {branch: points[:, : counts[branch]] for branch, points in cases.points.items()}
    return model.encode(cases.geometry, anchors, flow_condition(cases.angle))


@torch.no_grad()
def draw(models: dict[str, AirfoilModel], unseen: dataset.Shapes, size: tuple[int, int], path: Path) -> None:
    """Divergence and vorticity of every model around the first of the unseen airfoils."""
    nodes = unseen.nodes[0].numpy()
    grid = evaluation.field_grid(*size, panel_flow.BOX)
    points = grid.flatten(0, 1)
    outside = torch.from_numpy(~panel_flow.contains(points.numpy(), nodes))
    cases = next(evaluation.test_cases(unseen.subset(0, 1), ANGLE))
    fields: dict[str, dict[str, Any]] = {"divergence": {}, "vorticity": {}}
    for velocity, model in models.items():
        field = velocity_field(model, flow_condition(cases.angle), encode(model, cases))
        _, slopes = physics.jacobian(field, points[outside][None])
        for name, values in {"divergence": divergence(slopes), "vorticity": vorticity(slopes)}.items():
            everywhere = np.full(len(points), np.nan, dtype=np.float32)
            everywhere[outside.numpy()] = values[0].numpy()
            fields[name][NAMES[velocity]] = everywhere.reshape(grid.shape[:2])
    title = f"{unseen.names[0]} (unseen) at {ANGLE:g}°: what should be 0, in units of free stream per chord"
    pictures.draw_magnitudes(title, nodes, grid.numpy(), fields, path)


def markdown(results: dict[str, Any]) -> str:
    """The table of a run."""
    environment = results["environment"]
    lines = [
        "| | error of the velocity | divergence | by differences | vorticity | s per step | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for velocity, row in results["models"].items():
        rms = row["rms"]
        lines.append(
            f"| {NAMES[velocity]} | {row['velocity_error']:.2%} | {rms['divergence']:.1e} | "
            f"{rms['divergence_by_differences']:.1e} | {rms['vorticity']:.1e} | {row['seconds_per_step']:.3f} | "
            f"{row['peak_memory'] / 2**20:.0f} |"
        )
    gradients = ", ".join(f"{row['rms']['gradient']:.1f}" for row in results["models"].values())
    lines += [
        "",
        f"{results['steps']} steps of each, in turn; relative L2 error of the whole velocity on "
        f"{results['unseen_shapes']} unseen",
        f"airfoils. Root mean squares at {results['angle_degrees']:g}°, in free streams per chord, those of the whole "
        "gradient being",
        f"{gradients}; differences with a step of {results['difference_step']:g} chords. Processor time (median) and "
        "growth of the",
        f"peak memory of a training step on {environment['threads']} thread of {environment['processor']} "
        f"({environment['instruction_set']}), torch {environment['torch']}, beside other programs.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.only_memory:
        results = json.loads((options.output / "derivatives.json").read_text())
        for velocity, row in results["models"].items():
            row["peak_memory"] = memory_of_training(velocity, options.data, options.threads)
        write(results, options.output)
        return
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    seen, unseen = dataset.split(dataset.load(options.data)[0])
    trainers = {velocity: make_trainer(velocity, seen, options.steps) for velocity in VELOCITIES}
    seconds = train(trainers)
    models: dict[str, Any] = {velocity: trainer.model for velocity, trainer in trainers.items()}
    rows = {}
    for velocity, model in models.items():
        errors = evaluation.model_errors(model, unseen)
        rows[velocity] = {
            "velocity_error": errors["volume"].mean().item(),
            "pressure_error": errors["surface"].mean().item(),
            "rms": derivatives_on_unseen(model, unseen),
            "seconds_per_step": float(np.median(seconds[velocity])),
            "peak_memory": memory_of_training(velocity, options.data, options.threads),
        }
    results = {
        "models": rows,
        "steps": options.steps,
        "training": asdict(trainers["direct"].config),
        "angle_degrees": ANGLE,
        "difference_step": DIFFERENCE_STEP,
        "unseen_shapes": len(unseen),
        "environment": {
            "torch": torch.__version__,
            "threads": options.threads,
            "machine": platform.machine(),
            "processor": processor(),
            "instruction_set": anchor_attention.cpu_instruction_sets().selected,
            "total_seconds": time.monotonic() - started,
        },
    }
    write(results, options.output)
    draw(models, unseen, tuple(options.grid), options.output / "derivatives.png")


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes the results and their table, and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "derivatives.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "derivatives.md").write_text(markdown(results))
    print(f"{markdown(results)}\nresults: {folder}")


if __name__ == "__main__":
    sys.exit(main())
