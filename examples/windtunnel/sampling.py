"""From a flow to what the model reads: the body's own frame, features of points, batches of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import make_cases
import numpy as np
import torch
from bodies import Body
from reading import Array, Flow
from scipy.spatial import cKDTree
from torch import Tensor

# Every fifth case of the plan is kept from the training.
UNSEEN_EVERY = 5
FIRST_UNSEEN = 3
SURFACE_FEATURES = 12
VOLUME_FEATURES = 17
# The shear stress is a hundredth of the pressure: as outputs both are of order one.
SHEAR_SCALE = 100.0
# Coefficients hardly depend on the speed: a small number keeps the model from knowing its cases by it.
SPEED_MIDDLE, SPEED_SPAN, YAW_SPAN = 30.0, 50.0, 10.0


def split(numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the numbers of the cases to learn from, and of the unseen ones."""
    unseen = [number for number in numbers if number % UNSEEN_EVERY == FIRST_UNSEEN]
    return [number for number in numbers if number % UNSEEN_EVERY != FIRST_UNSEEN], unseen


@dataclass(frozen=True)
class Frame:
    """The frame of the body: turned with it, and mirrored where the yaw is negative.

    A case and its mirror image are the same flow, so that the model needs to know yaw of one sign only, and sees a body
    that always stands straight in a wind that turns.

    Args:
        yaw: Angle in degrees by which the body is turned.
    """

    yaw: float

    def matrix(self) -> Array:
        """Returns (3, 3), whose product with a vector of the tunnel is the vector in the body's frame."""
        angle = np.deg2rad(self.yaw)
        sign = -1.0 if self.yaw < 0 else 1.0
        return np.array(
            [[np.cos(angle), np.sin(angle), 0.0], [-sign * np.sin(angle), sign * np.cos(angle), 0.0], [0.0, 0.0, 1.0]]
        )

    def to_body(self, vectors: Array) -> Array:
        """Turns (N, 3) points or vectors of the tunnel into the body's frame."""
        return np.asarray(vectors @ self.matrix().T)

    def to_tunnel(self, vectors: Array) -> Array:
        """Turns (N, 3) points or vectors of the body's frame back."""
        return np.asarray(vectors @ self.matrix())


def condition(speed: float, yaw: float) -> Tensor:
    """Returns (2,) float32: size of the yaw (degrees) and speed (m/s), both scaled."""
    return torch.tensor([abs(yaw) / YAW_SPAN, (speed - SPEED_MIDDLE) / SPEED_SPAN])


def wind(conditions: Tensor) -> Tensor:
    """Returns (B, 3): the direction of the wind in the body's frame, for (B, 2) conditions."""
    yaw = torch.deg2rad(YAW_SPAN * conditions[:, 0])
    return torch.stack((yaw.cos(), -yaw.sin(), torch.zeros_like(yaw)), dim=-1)


class Geometry:
    """A body's surface, and what it makes of points.

    Args:
        points: (S, 3) points of the surface in the tunnel, in metres.
        normals: (S, 3) unit normals out of the body.
        yaw: Angle in degrees by which the body is turned.
    """

    def __init__(self, points: Array, normals: Array, yaw: float) -> None:
        self.frame = Frame(yaw)
        self.points = self.frame.to_body(points).astype(np.float32)
        self.normals = self.frame.to_body(normals).astype(np.float32)
        self.low, self.high = self.points.min(axis=0), self.points.max(axis=0)
        self.tree = cKDTree(self.points)

    def surface_features(self) -> Tensor:
        """Returns (S, SURFACE_FEATURES) float32: position, distances from the body's box, normal."""
        return torch.from_numpy(np.concatenate((self._position(self.points), self.normals), axis=1))

    def volume_features(self, points: Array) -> Tensor:
        """Returns (N, VOLUME_FEATURES) float32 for (N, 3) points of the tunnel.

        Position, distances from the body's box, the way to the nearest point of the surface, its length, that length
        within a boundary layer, and the normal there.
        """
        turned = self.frame.to_body(points).astype(np.float32)
        distance, nearest = self.tree.query(turned, workers=-1)
        distance = distance.astype(np.float32)[:, None]
        way = self.points[nearest] - turned
        features = (self._position(turned), way, distance, np.exp(-distance / 0.03), self.normals[nearest])
        return torch.from_numpy(np.concatenate(features, axis=1))

    def _position(self, points: Array) -> Array:
        return np.concatenate((points, points - self.low, self.high - points), axis=1)


@dataclass(frozen=True)
class Case:
    """A flow, ready for the model: everything in the body's frame.

    Attributes:
        number: Number in the plan.
        body: The body and its wind.
        flow: The flow that was stored, in the tunnel.
        geometry: The body's surface.
        condition: (2,) yaw and speed.
        points: By branch (N, features).
        targets: By branch ``"surface"`` (S, 4): pressure, shear stress times :data:`SHEAR_SCALE`; ``"volume"`` (V, 4):
            velocity, pressure.
        areas: (S,) areas in square metres.
        frontal_area: Area of the coefficients in square metres.
    """

    number: int
    body: Body
    flow: Flow
    geometry: Geometry
    condition: Tensor
    points: dict[str, Tensor]
    targets: dict[str, Tensor]
    areas: Tensor
    frontal_area: float


def prepare(number: int, body: Body, frontal_area: float, flow: Flow) -> Case:
    """Makes a case of a flow."""
    geometry = Geometry(flow.surface_points, flow.surface_normals, body.yaw)
    turn = geometry.frame.to_body
    targets = {
        "surface": np.concatenate((flow.pressure[:, None], SHEAR_SCALE * turn(flow.shear)), axis=1),
        "volume": np.concatenate((turn(flow.velocity), flow.volume_pressure[:, None]), axis=1),
    }
    return Case(
        number=number,
        body=body,
        flow=flow,
        geometry=geometry,
        condition=condition(body.speed, body.yaw),
        points={"surface": geometry.surface_features(), "volume": geometry.volume_features(flow.volume_points)},
        targets={branch: torch.from_numpy(values.astype(np.float32)) for branch, values in targets.items()},
        areas=torch.from_numpy(flow.surface_areas.astype(np.float32)),
        frontal_area=frontal_area,
    )


def load_cases(folder: Path) -> list[Case]:
    """Reads all stored cases of a folder, in the order of the plan.

    Raises:
        FileNotFoundError: There is none.
    """
    cases = []
    for path in sorted(folder.glob("case_*.npz")):
        metadata, flow = make_cases.load(path)
        cases.append(prepare(int(path.stem[5:]), Body(**metadata["body"]), metadata["frontal_area"], flow))
    if not cases:
        raise FileNotFoundError(f"folder must hold stored cases, got {folder} without case_*.npz")
    return cases


@dataclass(frozen=True)
class Batch:
    """Samples of B cases: the first points of each branch are anchors, the others queries.

    Attributes:
        condition: (B, 2).
        geometry: (B, G, SURFACE_FEATURES).
        points: By branch (B, N, features).
        targets: By branch (B, N, 4).
        areas: (B, N surface) areas in units of the mean of their case.
    """

    condition: Tensor
    geometry: Tensor
    points: dict[str, Tensor]
    targets: dict[str, Tensor]
    areas: Tensor


def sample(case: Case, branch: str, n: int, generator: torch.Generator) -> Tensor:
    """Returns (n,) int64: rows of a branch's points, drawn without repetition."""
    total = len(case.points[branch])
    if n > total:
        raise ValueError(f"n must be at most the {total} points of case {case.number}, got {n}")
    return torch.randperm(total, generator=generator)[:n]


def draw(cases: Sequence[Case], n_geometry: int, counts: dict[str, int], generator: torch.Generator) -> Batch:
    """Draws points of every case at random.

    Args:
        cases: The B cases.
        n_geometry: Points of the geometry.
        counts: Points by branch, anchors and queries together.
        generator: Of the random numbers.
    """
    rows = [{branch: sample(case, branch, n, generator) for branch, n in counts.items()} for case in cases]
    geometry = [case.points["surface"][sample(case, "surface", n_geometry, generator)] for case in cases]

    def stacked(branch: str, values: list[Tensor]) -> Tensor:
        return torch.stack([value[row[branch]] for value, row in zip(values, rows, strict=True)])

    return Batch(
        condition=torch.stack([case.condition for case in cases]),
        geometry=torch.stack(geometry),
        points={branch: stacked(branch, [case.points[branch] for case in cases]) for branch in counts},
        targets={branch: stacked(branch, [case.targets[branch] for case in cases]) for branch in counts},
        areas=stacked("surface", [case.areas / case.areas.mean() for case in cases]),
    )
