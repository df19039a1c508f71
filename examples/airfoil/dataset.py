"""The shipped data set, its split by shape, and batches of cases at random angles of attack."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import panel_flow
import torch
from torch import Tensor

DATA_FILE = Path(__file__).resolve().parent / "data" / "airfoils.npz"
# Degrees. The training goes a little beyond the tested range, whose ends would else have neighbours on one side only.
TRAINING_ANGLES = (-5.0, 9.0)
TEST_ANGLES = (-4.0, 0.0, 4.0, 8.0)
N_TEST_SHAPES = 100
# Every shape appears once, in an order that was random when the data set was made: the split takes the last ones.


@dataclass(frozen=True)
class Shapes:
    """Airfoils with their flow in the two unit free streams (angle of attack 0 and 90 degrees).

    Attributes:
        names: S names of the database.
        nodes: (S, N, 2) contour in chords, from the trailing edge over the upper side and back; numpy float32.
        surface_speed: (S, N, 2) signed speed along the contour for each stream; float32.
        surface_features: (S, N, 6) what the model sees of a contour point; float32, see :func:`surface_features`.
        volume_points: (S, M, 2) float32, exactly as solved.
        volume_velocity: (S, M, 2, 2) what the body adds to each stream: (stream, component); float32, rounded to a
            relative 2^-11.
    """

    names: list[str]
    nodes: Tensor
    surface_speed: Tensor
    surface_features: Tensor
    volume_points: Tensor
    volume_velocity: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, begin: int, end: int) -> Shapes:
        """Returns the shapes begin to end."""
        rows = slice(begin, end)
        return Shapes(
            self.names[rows],
            self.nodes[rows],
            self.surface_speed[rows],
            self.surface_features[rows],
            self.volume_points[rows],
            self.volume_velocity[rows],
        )


def surface_features(nodes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns (N, 6) float32 for (N, 2) nodes: position, outward normal, curvature, stretched chord position.

    Curvature goes from 0.1 to 1000 per chord between mid-chord and leading edge, hence its compression; the square
    root of the chord position resolves the leading edge.
    """
    panels = np.diff(nodes.astype(np.float64), axis=0)
    length = np.hypot(*panels.T)
    turn = np.diff(np.unwrap(np.arctan2(panels[:, 1], panels[:, 0])))
    curvature = np.pad(2 * turn / (length[1:] + length[:-1]), 1, mode="edge")
    stretched = np.sqrt(np.maximum(nodes[:, 0], 0))
    columns = (nodes, panel_flow.outward_normals(nodes), np.arcsinh(curvature)[:, None] / 4, stretched[:, None])
    return np.concatenate(columns, axis=1).astype(np.float32)


def load(path: Path = DATA_FILE) -> tuple[Shapes, dict[str, Any]]:
    """Loads the data set.

    Returns:
        All shapes, and the metadata of the file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    with np.load(path) as file:
        nodes = file["nodes"]
        shapes = Shapes(
            names=[str(name) for name in file["names"]],
            nodes=torch.from_numpy(nodes),
            surface_speed=torch.from_numpy(file["surface_speed"]),
            surface_features=torch.from_numpy(np.stack([surface_features(shape) for shape in nodes])),
            volume_points=torch.from_numpy(file["volume_points"].astype(np.float32)),
            volume_velocity=torch.from_numpy(file["volume_velocity"].astype(np.float32)),
        )
        return shapes, json.loads(str(file["metadata"]))


def split(shapes: Shapes) -> tuple[Shapes, Shapes]:
    """Returns the training shapes and the unseen ones."""
    n_test = min(N_TEST_SHAPES, len(shapes) // 5)
    return shapes.subset(0, len(shapes) - n_test), shapes.subset(len(shapes) - n_test, len(shapes))


@dataclass(frozen=True)
class Cases:
    """B flows, ready for the model: points in random order, so that any first part of them is a sample.

    Attributes:
        angle: (B,) angle of attack in radians.
        geometry: (B, N, 6) the contour.
        points: by branch (B, points, features).
        targets: by branch, ``"surface"`` (B, points, 1) pressure coefficient, ``"volume"`` (B, points, 2) velocity.
    """

    angle: Tensor
    geometry: Tensor
    points: dict[str, Tensor]
    targets: dict[str, Tensor]


def make_cases(
    shapes: Shapes, rows: Tensor, angle: Tensor, generator: torch.Generator, mirrored: Tensor | None = None
) -> Cases:
    """Superposes the two unit flows to flows at given angles of attack.

    Args:
        shapes: The data set.
        rows: (B,) int64 index of the shapes.
        angle: (B,) angles of attack in radians.
        generator: Shuffles the points.
        mirrored: (B,) bool: cases to be mirrored at the chord, angle included; flow and mirrored flow are both exact.
    """
    streams = torch.stack((angle.cos(), angle.sin()), dim=-1)
    speed = torch.einsum("bns,bs->bn", shapes.surface_speed[rows], streams)
    pressure = 1 - speed.square().unsqueeze(-1)
    velocity = torch.einsum("bmsc,bs->bmc", shapes.volume_velocity[rows], streams) + streams[:, None]
    geometry, volume_points = shapes.surface_features[rows], shapes.volume_points[rows]
    if mirrored is not None:
        sign = torch.where(mirrored, -1.0, 1.0)
        flip = torch.stack((torch.ones_like(sign), sign), dim=-1)[:, None]
        geometry = torch.cat((geometry[..., :2] * flip, geometry[..., 2:4] * flip, geometry[..., 4:]), dim=-1)
        volume_points, velocity, angle = volume_points * flip, velocity * flip, angle * sign
    surface_order = torch.argsort(torch.rand(speed.shape, generator=generator), dim=1).unsqueeze(-1)
    volume_order = torch.argsort(torch.rand(velocity.shape[:2], generator=generator), dim=1).unsqueeze(-1)
    return Cases(
        angle=angle,
        geometry=geometry,
        points={
            "surface": geometry.take_along_dim(surface_order, dim=1),
            "volume": volume_points.take_along_dim(volume_order, dim=1),
        },
        targets={
            "surface": pressure.take_along_dim(surface_order, dim=1),
            "volume": velocity.take_along_dim(volume_order, dim=1),
        },
    )
