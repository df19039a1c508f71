"""What predictions are worth: errors on unseen bodies, and two guesses that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import bodies
import numpy as np
import reading
import sampling
from reading import Array, Flow
from sampling import Case
from scipy.spatial import cKDTree

# Points of another body of which a guess takes the mean.
NEIGHBOURS = 3


@dataclass(frozen=True)
class Score:
    """Errors of one predicted case.

    Attributes:
        pressure, shear: Relative L2 errors over all faces of the body.
        velocity: Relative L2 error over the points around it, of the whole velocity.
        disturbance: The same of what the body adds to the wind.
        drag, side, lift: Predicted force coefficients, integrated over the surface.
        drag_error, lift_error: Predicted less solved; coefficients, too.
    """

    pressure: float
    shear: float
    velocity: float
    disturbance: float
    drag: float
    side: float
    lift: float
    drag_error: float
    lift_error: float


def relative_error(predicted: Array, solved: Array) -> float:
    """Returns the relative L2 error over all entries."""
    return float(np.linalg.norm(predicted - solved) / np.linalg.norm(solved))


def score(predicted: Flow, solved: Flow, area: float) -> Score:
    """Compares two flows at the same points.

    Args:
        predicted: The prediction.
        solved: OpenFOAM's flow.
        area: Area of the force coefficients in square metres.
    """
    wind = np.array([1.0, 0.0, 0.0])
    force, solved_force = reading.force(predicted, area), reading.force(solved, area)
    return Score(
        pressure=relative_error(predicted.pressure, solved.pressure),
        shear=relative_error(predicted.shear, solved.shear),
        velocity=relative_error(predicted.velocity, solved.velocity),
        disturbance=relative_error(predicted.velocity - wind, solved.velocity - wind),
        drag=float(force[0]),
        side=float(force[1]),
        lift=float(force[2]),
        drag_error=float(force[0] - solved_force[0]),
        lift_error=float(force[2] - solved_force[2]),
    )


def distance(a: Case, b: Case) -> float:
    """Returns how far two cases are apart in the plan, every parameter in units of its range; yaw by its size."""
    total = 0.0
    for name, (low, high) in bodies.RANGES.items():
        values = [getattr(case.body, name) for case in (a, b)]
        if name == "yaw":
            values, low = [abs(value) for value in values], 0.0
        total += ((values[0] - values[1]) / (high - low)) ** 2
    return total**0.5


def transferred(source: Case, target: Case) -> Flow:
    """Guesses a case by another one's flow: at every point, what the other body has at the same place of its box.

    Both flows are seen in the frames of their bodies, each turned and mirrored as :class:`sampling.Frame` does.
    """
    frame = target.geometry.frame

    def in_box(case: Case, points: Array) -> Array:
        return np.asarray((points - case.geometry.low) / (case.geometry.high - case.geometry.low))

    def at_surface(case: Case) -> Array:
        # The normal tells the faces of an edge apart.
        return np.concatenate((in_box(case, case.geometry.points), 0.3 * case.geometry.normals), axis=1)

    def around(case: Case) -> Array:
        return in_box(case, case.geometry.frame.to_body(case.flow.volume_points))

    surface = _mean_of_nearest(at_surface(source), source.targets["surface"].numpy(), at_surface(target))
    volume = _mean_of_nearest(around(source), source.targets["volume"].numpy(), around(target))
    # What the other body adds to its wind, added to this one's.
    wind = sampling.wind(target.condition[None]) - sampling.wind(source.condition[None])
    velocity = volume[:, :3] + wind.numpy()
    return replace(
        target.flow,
        pressure=surface[:, 0],
        shear=frame.to_tunnel(surface[:, 1:] / sampling.SHEAR_SCALE),
        velocity=frame.to_tunnel(velocity),
        volume_pressure=volume[:, 3],
    )


def _mean_of_nearest(places: Array, values: Array, wanted: Array) -> Array:
    distances, rows = cKDTree(places).query(wanted, k=NEIGHBOURS, workers=-1)
    return _weighted_mean(distances, values[rows])


def _weighted_mean(distances: Array, values: Array) -> Array:
    weights = 1 / (distances + 1e-6)
    return np.asarray((weights[..., None] * values).sum(axis=1) / weights.sum(axis=1, keepdims=True))


def nearest(seen: Sequence[Case], target: Case) -> Flow:
    """Guesses a case by the one that is nearest in the plan."""
    return transferred(min(seen, key=lambda case: distance(case, target)), target)


def mean(seen: Sequence[Case], target: Case) -> Flow:
    """Guesses a case by the mean of all that were seen."""
    flows = [transferred(case, target) for case in seen]
    fields = ("pressure", "shear", "velocity", "volume_pressure")
    return replace(target.flow, **{name: np.mean([getattr(flow, name) for flow in flows], axis=0) for name in fields})


def neighbours(case: Case) -> Flow:
    """Guesses every face and point by the nearest others of the same solved case: what its mesh leaves to be known.

    No guess of an unseen body: it shows how rough the solution itself is from one face to the next.
    """
    frame = case.geometry.frame
    places = {
        "surface": np.concatenate((case.geometry.points, 0.3 * case.geometry.normals), axis=1),
        "volume": frame.to_body(case.flow.volume_points),
    }
    guesses = {}
    for branch, those in places.items():
        # The nearest of all is the point itself.
        distances, rows = cKDTree(those).query(those, k=NEIGHBOURS + 1, workers=-1)
        guesses[branch] = _weighted_mean(distances[:, 1:], case.targets[branch].numpy()[rows[:, 1:]])
    surface, volume = guesses["surface"], guesses["volume"]
    return replace(
        case.flow,
        pressure=surface[:, 0],
        shear=frame.to_tunnel(surface[:, 1:] / sampling.SHEAR_SCALE),
        velocity=frame.to_tunnel(volume[:, :3]),
        volume_pressure=volume[:, 3],
    )


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns mean, median and largest of errors."""
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "worst": float(np.max(values))}
