"""Whole models of PhysicsNeMo before and after ``accelerate``: equality and speed.

    PYTHONPATH="python:$(python scripts/fetch_physicsnemo.py)" python -m benchmarks.physicsnemo_models

Writes raw JSON and a table to ``benchmarks/results/<device>/``. Outputs and gradients are compared in float32,
relative to the largest value of their layer; models are random, with weights so large that attention is far from
uniform.
"""

from __future__ import annotations

import copy
import importlib.metadata
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention.integrations.physicsnemo import accelerate

from .whole_models import command_line, compare, run

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
    parser = command_line(__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--case", action="append", help="a part of the names of cases; all by default")
    parser.add_argument("--points", type=int, help="at most so many points, for a trial")
    arguments = parser.parse_args()

    def record(case: Case) -> dict[str, Any]:
        if arguments.points:
            points, geometry = (min(size, arguments.points) for size in (case.points, case.geometry))
            case = Case(f"{case.name} (at most {arguments.points})", points, geometry, case.latents, case.mixing)
        torch.manual_seed(0)
        model = build_model(case, arguments.dim, arguments.heads, arguments.layers)
        fast = copy.deepcopy(model)
        report = accelerate(fast)
        found = compare(case.name, model, fast, partial(make_inputs, case), outputs_of, arguments.rounds)
        return found | {"replaced": len(report.replaced), "left": [str(module) for module in report.left]}

    chosen = (case for case in CASES if not arguments.case or any(part in case.name for part in arguments.case))
    about = {name: getattr(arguments, name) for name in ("dim", "heads", "layers")}
    version = {"physicsnemo": importlib.metadata.version("nvidia-physicsnemo")}
    run("physicsnemo_models", arguments, map(record, chosen), version | about)


if __name__ == "__main__":
    main()
