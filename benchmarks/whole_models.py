"""What the comparisons of whole models and blocks before and after share: differences, timing, table, files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention.benchmark import interleave, ratios
from anchor_attention.benchmark.timing import quartiles

from .machine import environment, listing, results_folder

Inputs = dict[str, Any]
# Of float32, relative to the largest value of a layer; gradients of parameters are sums over all tokens.
TOLERANCES = {"outputs": 2e-5, "gradients": 1e-4}


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """A sum whose gradient differs from output to output."""
    return torch.stack([(value * torch.cos(torch.arange(value.shape[-1]))).sum() for value in outputs.values()]).sum()


def outputs_and_gradients(
    model: nn.Module, inputs: Inputs, outputs_of: Callable[[Any], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One pass forward and back: outputs, and gradients of parameters and of inputs that require them.

    Args:
        model: The model.
        inputs: Its keyword arguments.
        outputs_of: Names the tensors in what it returns.
    """
    _forget_gradients(model, inputs)
    outputs = outputs_of(model(**inputs))
    loss_of(outputs).backward()
    leaves = dict(model.named_parameters()) | {name: t for name, t in inputs.items() if isinstance(t, Tensor)}
    gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


def _forget_gradients(model: nn.Module, inputs: Inputs) -> None:
    model.zero_grad()
    for value in inputs.values():
        if isinstance(value, Tensor):
            value.grad = None


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, in units of the largest value of its layer.

    Weight and bias of a layer share a unit, since the gradient of a bias can be all cancellation: a softmax does not
    see what all keys have in common, so that but for the rotation a bias of the keys would have none.
    """
    if set(found) != set(expected):
        raise AssertionError(f"the results differ in their names: {sorted(set(found) ^ set(expected))}")
    units: dict[str, float] = {}
    for name, value in expected.items():
        layer = name.rpartition(".")[0] or name
        units[layer] = max(units.get(layer, 1e-30), value.abs().max().item() if value.numel() else 0.0)
    return max(
        (found[name] - value).abs().max().item() / units[name.rpartition(".")[0] or name]
        for name, value in expected.items()
        if value.numel()
    )


def seconds_of_passes(
    before: nn.Module,
    after: nn.Module,
    make_inputs: Callable[[], Inputs],
    outputs_of: Callable[[Any], dict[str, Tensor]],
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of both models in every round, forward, and forward and backward, on new inputs for each round."""

    def forward(module: nn.Module) -> Callable[[Inputs], object]:
        @torch.no_grad()
        def call(inputs: Inputs) -> object:
            return module(**inputs)

        return call

    def training(module: nn.Module) -> Callable[[Inputs], object]:
        def call(inputs: Inputs) -> object:
            _forget_gradients(module, inputs)
            outputs = outputs_of(module(**inputs))
            loss_of(outputs).backward()
            return outputs

        return call

    return {
        name: interleave({"before": make(before), "after": make(after)}, make_inputs, rounds=rounds)
        for name, make in (("forward", forward), ("forward + backward", training))
    }


def compare(
    name: str,
    before: nn.Module,
    after: nn.Module,
    make_inputs: Callable[[], Inputs],
    outputs_of: Callable[[Any], dict[str, Tensor]],
    rounds: int,
) -> dict[str, Any]:
    """The record of a case: how much outputs and gradients differ, and the seconds of every round."""
    inputs = make_inputs()
    found, expected = (outputs_and_gradients(model, inputs, outputs_of) for model in (after, before))
    return {
        "name": name,
        "equality": dict(zip(TOLERANCES, map(relative_difference, found, expected), strict=True)),
        "seconds": seconds_of_passes(before, after, make_inputs, outputs_of, rounds),
    }


def too_different(records: list[dict[str, Any]]) -> list[str]:
    """One line for every record of :func:`compare` that differs by more than rounding explains."""
    return [
        f"{record['name']}: {kind} differ by {value:.1e}, more than {TOLERANCES[kind]:.1e}"
        for record in records
        for kind, value in record["equality"].items()
        if not value <= TOLERANCES[kind]
    ]


def table(records: list[dict[str, Any]]) -> list[str]:
    """Records of :func:`compare` as markdown."""
    lines = [
        "| model | outputs | gradients | pass | speed-up (quartiles) | before, ms | after, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        same = record["equality"]
        for name, seconds in record["seconds"].items():
            low, middle, high = ratios(seconds["before"], seconds["after"])
            before, after = (1e3 * quartiles(seconds[key]).median for key in ("before", "after"))
            lines.append(
                f"| {record['name']} | {same['outputs']:.1e} | {same['gradients']:.1e} | {name} "
                f"| {middle:.2f} ({low:.2f} – {high:.2f}) | {before:.0f} | {after:.0f} |"
            )
    return lines


def write(folder: Path, name: str, about: dict[str, Any], records: list[dict[str, Any]], table: list[str]) -> None:
    """Writes raw JSON and the table, under a name."""
    (folder / f"{name}.json").write_text(json.dumps({"environment": about, "records": records}, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join([*listing(about), *table]) + "\n")


def command_line(description: str | None) -> argparse.ArgumentParser:
    """What all comparisons are asked for, described by the first line of a module's docstring."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="where to write; the device's folder in benchmarks/results")
    return parser


def run(
    name: str, arguments: argparse.Namespace, records: Iterable[dict[str, Any]], about: dict[str, Any] | None = None
) -> None:
    """Prints records of :func:`compare` as they come and writes them; ends the program if results differ.

    Args:
        name: Of the files.
        arguments: Of :func:`command_line`.
        records: One for each case.
        about: What the files say beside the machine and the rounds.
    """
    torch.set_num_threads(arguments.threads)
    folder = arguments.results or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    head = environment(arguments.threads) | {"rounds": arguments.rounds} | (about or {})
    done: list[dict[str, Any]] = []
    for record in records:
        done.append(record)
        print("\n".join(table([record])[2:]), flush=True)
        # Every finished case is on disk at once: an interrupted run leaves what it measured.
        write(folder, name, head, done, table(done))
    if different := too_different(done):
        sys.exit("\n".join(different))
