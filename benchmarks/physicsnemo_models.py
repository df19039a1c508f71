"""Whole models of PhysicsNeMo before and after ``accelerate``: equality and speed.

    PYTHONPATH="python:$(python scripts/fetch_physicsnemo.py)" python -m benchmarks.physicsnemo_models

Writes raw JSON and a table to ``benchmarks/results/<device>/``. Outputs and gradients are compared in float32,
relative to the largest value of their layer; models are random, with weights so large that attention is far from
uniform.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention.integrations.physicsnemo import accelerate

from .machine import environment, results_folder
from .whole_models import compare, table, too_different, write

try:
    from physicsnemo.models.flare import FLARE
    from physicsnemo.models.geotransolver import GeoTransolver
except ImportError as error:
    sys.exit(f"This comparison needs the package nvidia-physicsnemo: {error}")


@dataclass(frozen=True)
class Case:
    """A model and the sizes of its input.

    Args:
        name: Its name in the table.
        points: Points of a sample, which are the tokens.
        geometry: Points of the geometry, which make the context of GeoTransolver; without any the model is FLARE.
        latents: Learnt latents of a layer.
        mixing: How GeoTransolver mixes what tokens and context give.
    """

    name: str
    points: int
    geometry: int = 0
    latents: int = 64
    mixing: str = "weighted"


CASES = (
    Case("FLARE, 4096 points", 4096),
    Case("FLARE, 32768 points", 32768),
    Case("FLARE, 32768 points, 512 latents", 32768, latents=512),
    Case("GeoTransolver with GALE_FA, 4096 points", 4096, geometry=4096),
    Case("GeoTransolver with GALE_FA, 32768 points", 32768, geometry=8192),
    Case("GeoTransolver with GALE_FA, 16384 points, mixed by a layer", 16384, geometry=8192, mixing="concat_project"),
)


def build_model(case: Case, dim: int, heads: int, layers: int) -> nn.Module:
    """Makes the random model of a case."""
    sizes = {"n_layers": layers, "n_hidden": dim, "n_head": heads, "slice_num": case.latents, "use_te": False}
    if case.geometry:
        model = GeoTransolver(
            functional_dim=6,
            out_dim=4,
            geometry_dim=3,
            attention_type="GALE_FA",
            state_mixing_mode=case.mixing,
            **sizes,
        )
    else:
        model = FLARE(functional_dim=3, out_dim=4, embedding_dim=3, **sizes)
    # The package's initialisation leaves scores near 0, where every attention is a mean.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval()


def make_inputs(case: Case) -> dict[str, Any]:
    """Makes random points: the keyword arguments of the model."""
    points = torch.rand(1, case.points, 3)
    if not case.geometry:
        return {"fx": torch.randn(1, case.points, 3), "embedding": points}
    features = torch.cat((points, torch.randn(1, case.points, 3)), dim=-1)
    return {"local_embedding": features, "local_positions": points, "geometry": torch.rand(1, case.geometry, 3)}


def outputs_of(result: Tensor) -> dict[str, Tensor]:
    """The fields, by name."""
    return {"fields": result}


def main() -> None:
    """Runs the cases and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--case", action="append", help="a part of the names of cases; all by default")
    parser.add_argument("--points", type=int, help="at most so many points, for a trial")
    parser.add_argument("--results", type=Path, help="where to write; the device's folder in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.results or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    about = environment(arguments.threads) | {
        "physicsnemo": importlib.metadata.version("nvidia-physicsnemo"),
        "rounds": arguments.rounds,
        "dim": arguments.dim,
        "heads": arguments.heads,
        "layers": arguments.layers,
    }
    records: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.case and not any(part in case.name for part in arguments.case):
            continue
        if arguments.points:
            points, geometry = (min(size, arguments.points) for size in (case.points, case.geometry))
            case = Case(f"{case.name} (at most {arguments.points})", points, geometry, case.latents, case.mixing)
        torch.manual_seed(0)
        model = build_model(case, arguments.dim, arguments.heads, arguments.layers)
        fast = copy.deepcopy(model)
        report = accelerate(fast)
        record = compare(case.name, model, fast, partial(make_inputs, case), outputs_of, arguments.rounds)
        records.append(record | {"replaced": len(report.replaced), "left": [str(module) for module in report.left]})
        print("\n".join(table([record])[2:]), flush=True)
        # Every finished case is on disk at once: an interrupted run leaves what it measured.
        write(folder, "physicsnemo_models", about, records, table(records))
    if different := too_different(records):
        sys.exit("\n".join(different))


if __name__ == "__main__":
    main()
