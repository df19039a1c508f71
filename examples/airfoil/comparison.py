"""How a run compares with the committed one, and why it may differ, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).resolve().parent / "results"
QUANTITIES = ("pressure", "velocity")
# Rounding differs between processors, and training amplifies it: runs of equal length came out this far apart.
USUAL_SPREAD = 0.1


def committed(mode: str) -> dict[str, Any]:
    """Metrics of the committed run of a mode."""
    metrics: dict[str, Any] = json.loads((COMMITTED / mode / "metrics.json").read_text())
    return metrics


def errors_of(metrics: dict[str, Any], method: str = "model") -> dict[str, float]:
    """Mean relative L2 error by quantity."""
    table = metrics["relative_l2_error_unseen"]
    return {quantity: table[quantity][method]["mean"] for quantity in QUANTITIES}


def _percents(errors: dict[str, float]) -> str:
    return " and ".join(f"{quantity} {errors[quantity]:.1%}" for quantity in QUANTITIES)


def verdict(metrics: dict[str, Any], reference: dict[str, Any]) -> str:
    """One line: against the nearest training shape, against the committed run, and why they may differ.

    Args:
        metrics: Of this run.
        reference: Of the committed run of the same mode.
    """
    ours, nearest, theirs = errors_of(metrics), errors_of(metrics, "nearest_shape"), errors_of(reference)
    factors = [nearest[quantity] / ours[quantity] for quantity in QUANTITIES]
    if min(factors) > 1:
        against_nearest = f"{factors[0]:.1f} and {factors[1]:.1f} times closer than the nearest training shape"
    else:
        against_nearest = f"not better than the nearest training shape ({_percents(nearest)})"
    steps, their_steps = metrics["training"]["steps"], reference["training"]["steps"]
    where = reference["environment"].get("processor", reference["environment"]["machine"])
    line = f"{_percents(ours)}: {against_nearest}. The committed run ({where}) has {_percents(theirs)}"
    ratio = max(ours[quantity] / theirs[quantity] for quantity in QUANTITIES)
    asked = metrics["training"]["training"]
    ended_by_time = asked["steps"] is None or steps < asked["steps"]
    if steps < 0.98 * their_steps and ended_by_time:
        reason = f"{steps:,} instead of {their_steps:,} steps fitted into the time: --seconds gives more"
    elif abs(steps - their_steps) > 0.02 * their_steps:
        reason = f"this run made {steps:,} steps, that one {their_steps:,}"
    elif abs(ratio - 1) < USUAL_SPREAD:
        reason = "the same within what rounding on another processor does"
    else:
        reason = "after as many steps: rounding differs between processors, and data or code may have changed"
    return f"{line}; {reason}."
