"""Learns the flow around airfoils with an anchored-branch transformer and predicts it on unseen ones.

    python examples/airfoil/run.py            1,500 steps of training, five minutes at most
    python examples/airfoil/run.py --full     4,500 steps of a larger model, an hour at most
    python examples/airfoil/run.py --velocity stream_function                    a velocity without divergence
    torchrun --nproc-per-node 2 examples/airfoil/run.py       every case is spread over two processes

The data set is shipped; ``make_dataset.py`` makes it again. An interrupted training continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REQUIRED = ("torch", "numpy", "tqdm", "matplotlib", "anchor_attention")
CHUNK_POINTS = 16384
GRID = (480, 320)
PICTURE_QUANTILES = {"best": 0.0, "median": 0.5, "hard": 0.9, "worst": 1.0}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the long training, of a larger model")
    parser.add_argument("--velocity", default="direct", help="direct, stream_function or stream_function_differences")
    parser.add_argument("--seconds", type=float, help="wall-clock seconds of training, however many steps")
    parser.add_argument("--steps", type=int, help="steps of training, however long: reproducible on a machine")
    # A batch is too small for many threads: two made 18.0 steps/s where one made 13.3, but 1.1 instead of 8.6 as soon
    # as other programs wanted the cores.
    parser.add_argument("--threads", type=int, default=1, help="threads of the training; the rest uses all cores")
    parser.add_argument("--restart", action="store_true", help="forget the checkpoint")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "airfoils.npz")
    parser.add_argument("--output", type=Path, help="folder of checkpoint, metrics and pictures")
    parser.add_argument("--grid", type=int, nargs=2, default=GRID, metavar=("NX", "NY"), help="points of the pictures")
    parser.add_argument("--pictures", type=int, default=len(PICTURE_QUANTILES), help="number of pictures")
    return parser.parse_args()


def require_packages() -> None:
    """Ends the program with one line if a package is missing: now, not after the training."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"run.py needs {', '.join(missing)}: pip install {' '.join(missing).replace('_', '-')}")


def train(trainer: Any) -> None:
    """Runs the training under a progress bar."""
    from common.training import Progress, train_with_bar

    smooth_loss: float | None = None
    started, first_step = time.monotonic(), trainer.step

    def describe(progress: Progress) -> str:
        nonlocal smooth_loss
        smooth_loss = progress.loss if smooth_loss is None else 0.95 * smooth_loss + 0.05 * progress.loss
        rate = (trainer.step - first_step) / (time.monotonic() - started)
        return f"step {progress.step}, loss {smooth_loss:.4f}, {rate:.1f} steps/s"

    train_with_bar(trainer, describe, silent=os.environ.get("RANK", "0") != "0")


def summary(errors: Any) -> dict[str, Any]:
    """Mean and spread of (S, angles) relative errors."""
    import dataset

    return {
        "mean": errors.mean().item(),
        "median": errors.median().item(),
        "worst": errors.max().item(),
        "by_angle": {f"{angle:g}": errors[:, i].mean().item() for i, angle in enumerate(dataset.TEST_ANGLES)},
    }


def predict_fields(trainer: Any, unseen: Any, errors: dict[str, Any], arguments: argparse.Namespace) -> list[Any]:
    """Streams a fine grid around some unseen airfoils, draws them, and returns the figures of each."""
    import dataset
    import evaluation
    import numpy as np
    import panel_flow
    import pictures
    import torch
    from tqdm import tqdm

    total = errors["surface"] / errors["surface"].mean() + errors["volume"] / errors["volume"].mean()
    ranking = total.flatten().argsort()
    nx, ny = arguments.grid
    grid = evaluation.field_grid(nx, ny, panel_flow.BOX)
    results = []
    chosen = list(PICTURE_QUANTILES.items())[: arguments.pictures]
    for label, quantile in tqdm(chosen, desc="streaming", unit="airfoil"):
        row, column = divmod(int(ranking[round(quantile * (len(ranking) - 1))]), total.shape[1])
        name, angle = unseen.names[row], dataset.TEST_ANGLES[column]
        nodes = unseen.nodes[row].numpy()
        points = grid.flatten(0, 1)
        # Half the distance that the training points keep: nearer, the panels' corners show.
        outside = ~panel_flow.contains(points.numpy(), nodes)
        outside[outside] = panel_flow.distance_to_body(points.numpy()[outside], nodes) > 0.0025
        queries = points[torch.from_numpy(outside)]
        streamed = evaluation.stream(trainer.model, unseen, row, angle, queries, CHUNK_POINTS)
        exact = evaluation.exact_velocity(unseen, row, angle, queries)

        fields = np.full((2, *points.shape), np.nan, dtype=np.float32)
        fields[0, outside], fields[1, outside] = streamed.velocity.numpy(), exact.numpy()
        weights = torch.from_numpy(panel_flow.free_stream_weights(angle)).float()
        exact_pressure = 1 - (unseen.surface_speed[row] @ weights).square()
        pressure_error = ((streamed.pressure - exact_pressure).norm() / exact_pressure.norm()).item()
        velocity_error = ((streamed.velocity - exact).norm() / exact.norm()).item()
        velocity, exact_velocity = fields.reshape(2, *grid.shape)
        pictures.draw(
            pictures.FlowPicture(
                title=f"{name} (unseen) at {angle:g}°, {label} case: relative L2 error of pressure "
                f"{pressure_error:.1%}, of velocity {velocity_error:.2%}",
                nodes=nodes,
                pressure=streamed.pressure.numpy(),
                exact_pressure=exact_pressure.numpy(),
                anchors=evaluation.volume_anchors(unseen, row).numpy(),
                grid=grid.numpy(),
                velocity=velocity,
                exact_velocity=exact_velocity,
            ),
            arguments.output / f"{label}.png",
        )
        results.append(
            {
                "case": label,
                "airfoil": name,
                "angle_degrees": angle,
                "query_points": len(queries),
                "pressure_error": pressure_error,
                "velocity_error_on_grid": velocity_error,
                "encode_seconds": streamed.encode_seconds,
                "decode_seconds": streamed.decode_seconds,
                "points_per_second": len(queries) / streamed.decode_seconds,
                "peak_memory_growth_mib": streamed.peak_memory_growth / 2**20,
            }
        )
    return results


def main() -> None:
    arguments = parse_arguments()
    require_packages()
    # Set before PyTorch is loaded: threads that spin while they wait are slow on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import comparison
    import dataset
    import evaluation
    import sharded
    import torch
    from common.machine import processor
    from model import ModelConfig
    from training import Trainer, TrainingConfig

    import anchor_attention

    started = time.monotonic()
    torch.set_num_threads(arguments.threads)
    mode = "full" if arguments.full else "short"
    folder = mode if arguments.velocity == "direct" else f"{mode}_{arguments.velocity}"
    arguments.output = arguments.output or HERE / "runs" / folder
    if not arguments.data.exists():
        sys.exit(f"run.py finds no data set at {arguments.data}: make one with make_dataset.py")
    shapes, _ = dataset.load(arguments.data)
    seen, unseen = dataset.split(shapes)
    try:
        model_config = replace(ModelConfig.full() if arguments.full else ModelConfig(), velocity=arguments.velocity)
    except ValueError as error:
        sys.exit(str(error))
    config = TrainingConfig.full() if arguments.full else TrainingConfig()
    config = config.limited(arguments.steps, arguments.seconds)
    checkpoint = arguments.output / "checkpoint.pt"
    if arguments.restart and os.environ.get("RANK", "0") == "0":
        checkpoint.unlink(missing_ok=True)
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared and arguments.velocity != "direct":
        sys.exit(f"several processes learn the velocity itself, got --velocity {arguments.velocity}")
    try:
        if shared:
            # Clocks of two processes differ: only their steps are the same.
            trainer: Any = sharded.start(seen, model_config, replace(config, seconds=None), checkpoint)
        else:
            trainer = Trainer(seen, model_config, config, checkpoint)
    except ValueError as error:
        sys.exit(f"{error}; --restart forgets it")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{len(seen)} airfoils to learn from, {len(unseen)} unseen; {parameters:,} parameters")
    try:
        train(trainer)
    except KeyboardInterrupt:
        print(f"\ninterrupted at {trainer.done:.0%}; the same command goes on from there")
        sys.exit(130)

    if shared and not sharded.finish(trainer):
        return
    torch.set_num_threads(os.cpu_count() or 1)
    errors = evaluation.model_errors(trainer.model, unseen)
    methods = {"model": errors, **evaluation.baseline_errors(seen, unseen)}
    metrics: dict[str, Any] = {
        "relative_l2_error_unseen": {
            quantity: {name: summary(those[branch]) for name, those in methods.items()}
            for quantity, branch in (("pressure", "surface"), ("velocity", "volume"))
        },
        "data": {"training_shapes": len(seen), "unseen_shapes": len(unseen), "test_angles": dataset.TEST_ANGLES},
        "training": {
            "mode": mode,
            "steps": trainer.step,
            "seconds": trainer.seconds,
            "parameters": parameters,
            **trainer.signature,
        },
    }
    metrics["streaming"] = predict_fields(trainer, unseen, errors, arguments)
    metrics["environment"] = {
        "torch": torch.__version__,
        "training_threads": arguments.threads,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "instruction_set": anchor_attention.cpu_instruction_sets().selected,
        "total_seconds": time.monotonic() - started,
    }
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report(metrics, arguments.output)
    if arguments.velocity == "direct":
        print(comparison.verdict(metrics, comparison.committed(mode)))
    if arguments.velocity == "direct" and not arguments.full:
        longer = comparison.errors_of(comparison.committed("full"))
        print(
            f"More time: --full reached pressure {longer['pressure']:.1%} and velocity {longer['velocity']:.1%} "
            f"in {comparison.committed('full')['training']['seconds'] / 60:.0f} minutes where it was made."
        )


def report(metrics: dict[str, Any], output: Path) -> None:
    """Prints what matters of the metrics."""
    table = metrics["relative_l2_error_unseen"]
    print(f"\nrelative L2 error on {metrics['data']['unseen_shapes']} unseen airfoils   pressure   velocity")
    for name in table["pressure"]:
        print(f"  {name:<42} {table['pressure'][name]['mean']:9.2%}  {table['velocity'][name]['mean']:9.2%}")
    for field in metrics["streaming"]:
        print(
            f"  {field['airfoil']} at {field['angle_degrees']:g}°: {field['query_points']:,} points streamed in "
            f"{field['decode_seconds']:.1f} s, {field['points_per_second']:,.0f} points/s"
        )
    print(f"metrics and pictures: {output}")


if __name__ == "__main__":
    main()
