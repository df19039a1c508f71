"""What the comparisons of whole models before and after ``accelerate`` share: differences, timing, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchor_attention.benchmark import interleave

from .machine import listing

Inputs = dict[str, Any]


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """A sum whose gradient differs from output to output."""
    return torch.stack([(value * torch.cos(torch.arange(value.shape[-1]))).sum() for value in outputs.values()]).sum()


def outputs_and_gradients(
    model: nn.Module, inputs: Inputs, outputs_of: Callable[[Any], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One pass forward and back.

    Args:
        model: The model.
        inputs: Its keyword arguments.
        outputs_of: Names the tensors in what it returns.
    """
    model.zero_grad()
    outputs = outputs_of(model(**inputs))
    loss_of(outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients


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
            module.zero_grad()
            outputs = outputs_of(module(**inputs))
            loss_of(outputs).backward()
            return outputs

        return call

    return {
        name: interleave({"before": make(before), "after": make(after)}, make_inputs, rounds=rounds)
        for name, make in (("forward", forward), ("forward + backward", training))
    }


def write(folder: Path, name: str, about: dict[str, Any], records: list[dict[str, Any]], table: list[str]) -> None:
    """Writes raw JSON and the table, under a name."""
    (folder / f"{name}.json").write_text(json.dumps({"environment": about, "records": records}, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join([*listing(about), *table]) + "\n")
