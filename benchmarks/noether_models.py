"""Whole AB-UPT models of the package ``noether`` before and after ``accelerate``: equality and speed.

    pip install emmiai-noether     # of non-production licence, and no dependency of this project
    python -m benchmarks.noether_models

Writes raw JSON and a table to ``benchmarks/results/<device>/``. Outputs and gradients are compared in float32,
relative to the largest value of their layer; models are random, with weights so large that attention is far from
uniform.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention.benchmark import ratios
from anchor_attention.benchmark.timing import quartiles
from anchor_attention.integrations.noether import accelerate

from .machine import environment, results_folder
from .whole_models import outputs_and_gradients, relative_difference, seconds_of_passes, write

try:
    from noether.core.schemas.dataset import DomainDataSpec, FieldDimSpec, ModelDataSpecs
    from noether.core.schemas.models import AnchorBranchedUPTConfig
    from noether.core.schemas.modules.blocks import TransformerBlockConfig
    from noether.core.schemas.modules.encoders import SupernodePoolingConfig
    from noether.modeling.models.ab_upt import AnchoredBranchedUPT
except ImportError as error:
    sys.exit(f"This comparison needs the package emmiai-noether: {error}")

RELATIVE_TOLERANCE = 2e-5
# Under autocast ours may be this much further from the model in float32 than the package is.
AUTOCAST_FACTOR = 2.0


@dataclass(frozen=True)
class Case:
    """A model and the sizes of its input.

    Args:
        name: Its name in the table.
        anchors: Anchors by domain.
        queries: Queries by domain.
        blocks: Physics blocks in the package's words.
        conditioned: Whether a design vector modulates the blocks.
        batch: Samples in a batch.
        masked: Whether some anchors of each sample are padding.
        autocast: Whether the model runs under bfloat16 autocast.
        rounds: Rounds of the timing, where a round takes minutes; ``None`` for the command line's.
    """

    name: str
    anchors: dict[str, int]
    queries: dict[str, int]
    blocks: tuple[str, ...] = ("perceiver", "self", "cross", "self")
    conditioned: bool = False
    batch: int = 1
    masked: bool = False
    autocast: bool = False
    rounds: int | None = None


def _both(anchors: int) -> dict[str, int]:
    return {"surface": anchors, "volume": anchors}


CASES = (
    Case("two domains, 4096 anchors each", _both(4096), {}),
    Case("two domains, 4096 anchors each, bfloat16 autocast", _both(4096), {}, autocast=True),
    Case("two domains, 16384 anchors each", _both(16384), {}, rounds=1),
    Case("two domains", {"surface": 512, "volume": 512}, {"surface": 512, "volume": 512}),
    Case("two domains, anchors only", {"surface": 768, "volume": 768}, {}),
    Case("two domains, many queries", {"surface": 512, "volume": 512}, {"surface": 512, "volume": 2048}),
    Case(
        "three domains, unequal, conditioned",
        {"surface": 512, "volume": 768, "wake": 256},
        {"surface": 256, "volume": 512, "wake": 128},
        blocks=("perceiver", "self", "cross", "joint"),
        conditioned=True,
    ),
    Case(
        "two domains, masked batch",
        {"surface": 512, "volume": 384},
        {"surface": 256, "volume": 256},
        batch=2,
        masked=True,
    ),
    Case(
        "two domains, untied",
        {"surface": 512, "volume": 768},
        {"surface": 512, "volume": 512},
        blocks=("perceiver_untied", "self_untied", "cross_untied"),
    ),
)


def model_config(case: Case, dim: int, heads: int) -> AnchorBranchedUPTConfig:
    """Makes the configuration of a case's model."""
    domains = {
        name: DomainDataSpec(output_dims=FieldDimSpec({"pressure": 1, "velocity": 3}), feature_dim=None)
        for name in case.anchors
    }
    return AnchorBranchedUPTConfig(
        name="ab_upt",
        supernode_pooling_config=SupernodePoolingConfig(hidden_dim=dim, input_dim=3, radius=0.3, max_degree=16),
        transformer_block_config=TransformerBlockConfig(
            hidden_dim=dim, num_heads=heads, mlp_expansion_factor=4, use_rope=True
        ),
        geometry_depth=1,
        hidden_dim=dim,
        physics_blocks=list(case.blocks),
        num_domain_decoder_blocks=dict.fromkeys(case.anchors, 1),
        data_specs=ModelDataSpecs(
            position_dim=3,
            conditioning_dims=FieldDimSpec({"design": 4}) if case.conditioned else None,
            domains=domains,
        ),
    )


def build_model(case: Case, dim: int, heads: int) -> AnchoredBranchedUPT:
    """Makes the random model of a case."""
    model = AnchoredBranchedUPT(model_config(case, dim, heads))
    # The package's initialisation leaves scores near 0, where every attention is a mean.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif type(module).__name__ == "UntiedLinear":
            for weight in module.weight:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.eval()


def make_inputs(case: Case) -> dict[str, Any]:
    """Makes random points: the keyword arguments of the model."""
    n_geometry, n_supernodes = 1024, 256
    inputs: dict[str, Any] = {
        "geometry_position": torch.rand(case.batch * n_geometry, 3),
        "geometry_supernode_idx": torch.cat(
            [torch.randperm(n_geometry)[:n_supernodes] + sample * n_geometry for sample in range(case.batch)]
        ),
        "geometry_batch_idx": torch.arange(case.batch).repeat_interleave(n_geometry),
        "domain_anchor_positions": {name: 4 * torch.rand(case.batch, n, 3) for name, n in case.anchors.items()},
    }
    if case.queries:
        inputs["domain_query_positions"] = {name: 4 * torch.rand(case.batch, n, 3) for name, n in case.queries.items()}
    if case.conditioned:
        inputs["conditioning_inputs"] = {"design": torch.randn(case.batch, 4)}
    return inputs


def query_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the pass after :func:`make_inputs`' own that reads the cache."""
    return {key: inputs[key] for key in ("domain_query_positions", "conditioning_inputs") if key in inputs}


@contextmanager
def anchor_padding(model: nn.Module, case: Case) -> Iterator[None]:
    """Hides the last third of the second sample's anchors from every anchor attention of the model."""

    def add_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = args[0] if args else kwargs["x"]
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        begin = 0
        for spec in kwargs["token_specs"]:
            if spec.name.endswith("_anchors"):
                mask[1, begin + 2 * spec.size // 3 : begin + spec.size] = False
            begin += spec.size
        return args, {**kwargs, "key_padding_mask": mask}

    hooked = [module for module in model.modules() if hasattr(module, "mixed_attention")] if case.masked else []
    handles = [module.register_forward_pre_hook(add_mask, with_kwargs=True) for module in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def precision(case: Case) -> AbstractContextManager[None]:
    """Autocast where the case asks for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=case.autocast)


def outputs_of(result: tuple[dict[str, Tensor], Any]) -> dict[str, Tensor]:
    """What a model returns besides its cache."""
    return result[0]


@torch.no_grad()
def second_pass(model: AnchoredBranchedUPT, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Queries against the cache of a first pass with anchors alone."""
    anchors = {key: value for key, value in inputs.items() if key != "domain_query_positions"}
    _, cache = model(**anchors)
    outputs, _ = model(**query_inputs(inputs), kv_cache=cache)
    return dict(outputs)


def equality(case: Case, model: AnchoredBranchedUPT, fast: AnchoredBranchedUPT) -> dict[str, Any]:
    """Differences of outputs, gradients and, where the package can compute it, the cached second pass.

    Under autocast the model in float32 is what both are compared with; ``"before"`` holds the package's differences.
    """
    inputs = make_inputs(case)
    with anchor_padding(model, case), anchor_padding(fast, case):
        exact = outputs_and_gradients(model, inputs, outputs_of)
        with precision(case):
            found = outputs_and_gradients(fast, inputs, outputs_of)
            package = outputs_and_gradients(model, inputs, outputs_of) if case.autocast else None
    kinds = ("outputs", "gradients")
    result: dict[str, Any] = dict(zip(kinds, map(relative_difference, found, exact), strict=True)) | {"cached": None}
    if package is not None:
        result["before"] = dict(zip(kinds, map(relative_difference, package, exact), strict=True))
    untied = any(block.endswith("_untied") for block in case.blocks)
    if case.queries and not case.masked and not untied:
        result["cached"] = relative_difference(second_pass(fast, inputs), second_pass(model, inputs))
    return result


def too_different(records: list[dict[str, Any]]) -> list[str]:
    """One line for every record that is further from the package than rounding explains."""
    lines = []
    for record in records:
        same = dict(record["equality"])
        before = same.pop("before", None)
        for kind, value in same.items():
            bound = AUTOCAST_FACTOR * before[kind] if before and kind in before else RELATIVE_TOLERANCE
            if value is not None and value > bound:
                lines.append(f"{record['name']}: {kind} differ by {value:.1e}, more than {bound:.1e}")
    return lines


def speed(case: Case, model: AnchoredBranchedUPT, fast: AnchoredBranchedUPT, rounds: int) -> dict[str, Any]:
    """Seconds of both models in every round: forward, and forward and backward."""
    with anchor_padding(model, case), anchor_padding(fast, case), precision(case):
        return seconds_of_passes(model, fast, lambda: make_inputs(case), outputs_of, rounds)


def table(records: list[dict[str, Any]]) -> list[str]:
    """The records as markdown."""
    lines = [
        "| model | outputs | gradients | cached pass | pass | speed-up (quartiles) | before, ms | after, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        same = record["equality"]
        cached = "not measured" if same["cached"] is None else f"{same['cached']:.1e}"
        for name, seconds in record["seconds"].items():
            low, middle, high = ratios(seconds["before"], seconds["after"])
            before, after = (1e3 * quartiles(seconds[key]).median for key in ("before", "after"))
            lines.append(
                f"| {record['name']} | {same['outputs']:.1e} | {same['gradients']:.1e} | {cached} | {name} "
                f"| {middle:.2f} ({low:.2f} – {high:.2f}) | {before:.0f} | {after:.0f} |"
            )
    return lines


def _chosen(name: str, asked: list[str]) -> bool:
    """Whether a case is asked for: by its whole name, or by a part that is no other case's whole name."""
    names = {case.name for case in CASES}
    return any(part == name or (part not in names and part in name) for part in asked)


def main() -> None:
    """Runs the cases and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--case", action="append", help="a case's name, or part of several; all by default")
    parser.add_argument("--results", type=Path, help="where to write; the device's folder in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.results or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    about = environment(arguments.threads) | {
        "noether": importlib.metadata.version("emmiai-noether"),
        "rounds": arguments.rounds,
        "dim": arguments.dim,
        "heads": arguments.heads,
    }
    records: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.case and not _chosen(case.name, arguments.case):
            continue
        torch.manual_seed(0)
        model = build_model(case, arguments.dim, arguments.heads)
        fast = copy.deepcopy(model)
        report = accelerate(fast)
        record: dict[str, Any] = {
            "name": case.name,
            "replaced": len(report.replaced),
            "left": [str(module) for module in report.left],
            "equality": equality(case, model, fast),
        }
        record["seconds"] = speed(case, model, fast, case.rounds or arguments.rounds)
        records.append(record)
        print("\n".join(table([record])[2:]), flush=True)
        # Every finished case is on disk at once: an interrupted run leaves what it measured.
        write(folder, "noether_models", about, records, table(records))
    if different := too_different(records):
        sys.exit("\n".join(different))


if __name__ == "__main__":
    main()
