"""The demo's optimiser, and what it says of its result at the end."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "airfoil"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]

import comparison  # noqa: E402
from common.muon import Muon, orthogonalized  # noqa: E402
from training import TrainingConfig  # noqa: E402


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 64), (1, 64, 24), (2, 1, 7)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    kept = values > 0.02 * matrices.flatten(1).norm(dim=1)[:, None]
    found = left.mT @ orthogonalized(matrices) @ right.mT
    # The same singular vectors, and values between what the polynomial makes of any that is not tiny.
    off_diagonal = found - torch.diag_embed(found.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-9
    diagonal = found.diagonal(dim1=1, dim2=2)[kept]
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    assert (orthogonalized(1e-3 * matrices) - orthogonalized(matrices)).abs().max() < 1e-9


def test_a_step_is_that_of_pytorch_in_float32() -> None:
    """PyTorch's own orthogonalises in bfloat16, half a percent of rounding in each of 15 products."""
    weights = [torch.randn(24, 16), torch.randn(16, 48), torch.randn(24, 16)]
    ours = [torch.nn.Parameter(weight.clone()) for weight in weights]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizers = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, weights, strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()


def test_muon_takes_matrices_only() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))])


def test_the_default_ends_by_steps_on_a_fast_machine_and_by_time_on_a_slow_one() -> None:
    config = TrainingConfig()
    assert config.seconds is not None and config.seconds <= 300 and config.steps is not None
    assert config.progress(config.steps, 1.0) == 1.0
    assert config.progress(1, config.seconds) == 1.0
    assert config.progress(config.steps // 2, config.seconds / 4) == 0.5


def changed(metrics: dict[str, Any], factor: float, steps: int) -> dict[str, Any]:
    result = copy.deepcopy(metrics)
    for table in result["relative_l2_error_unseen"].values():
        table["model"]["mean"] *= factor
    result["training"]["steps"] = steps
    return result


def test_the_last_line_says_how_a_run_compares_and_why() -> None:
    reference = comparison.committed("short")
    steps = reference["training"]["steps"]
    assert "\n" not in comparison.verdict(reference, reference)
    assert "rounding on another processor" in comparison.verdict(changed(reference, 1.03, steps), reference)
    assert "times closer than the nearest" in comparison.verdict(reference, reference)
    fewer = comparison.verdict(changed(reference, 1.6, steps // 3), reference)
    assert f"{steps // 3:,} instead of {steps:,} steps" in fewer and "--seconds" in fewer
    asked = changed(reference, 1.6, steps // 3)
    asked["training"]["training"]["steps"] = steps // 3
    assert f"this run made {steps // 3:,} steps" in comparison.verdict(asked, reference)
    asked["training"]["training"] |= {"steps": None, "seconds": 60.0}
    assert "--seconds" in comparison.verdict(asked, reference)
    assert "not better than the nearest training shape" in comparison.verdict(changed(reference, 9.0, steps), reference)
    assert "may have changed" in comparison.verdict(changed(reference, 1.5, steps), reference)
    assert f"this run made {2 * steps:,} steps" in comparison.verdict(changed(reference, 0.8, 2 * steps), reference)
