"""The family of bodies: car-like shapes after Ahmed's (SAE 840300), their plan, and their surfaces as STL."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH = 0.389
NOSE_RADIUS = 0.1
SLANT_LENGTH = 0.222
NOSE_STATIONS = 12

# Smallest and largest value of every parameter of a case.
RANGES = {
    "slant": (5.0, 35.0),
    "length": (0.9, 1.2),
    "height": (0.26, 0.32),
    "ride_height": (0.04, 0.08),
    "speed": (20.0, 40.0),
    "yaw": (-10.0, 10.0),
}


@dataclass(frozen=True)
class Body:
    """A body and the wind it stands in.

    Args:
        slant: Angle of the slanted end of the roof, in degrees.
        length: Length in metres.
        height: Height in metres, without the gap to the ground.
        ride_height: Gap to the ground in metres.
        speed: Speed of the wind along x, in m/s.
        yaw: Angle in degrees by which the body is turned about the vertical axis; the wind is not.
    """

    slant: float
    length: float
    height: float
    ride_height: float
    speed: float
    yaw: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or (name in ("length", "height", "ride_height", "speed") and value <= 0):
                raise ValueError(f"{name} must be a finite number, positive if it is no angle, got {value}")
        if not 0 <= self.slant < 60:
            raise ValueError(f"slant must be in [0, 60) degrees, got {self.slant}")
        if self.length < NOSE_RADIUS + SLANT_LENGTH:
            raise ValueError(f"length must be at least {NOSE_RADIUS + SLANT_LENGTH:g} m, got {self.length}")
        if self.height <= max(2 * NOSE_RADIUS, SLANT_LENGTH * math.sin(math.radians(self.slant))):
            raise ValueError(f"height must exceed {2 * NOSE_RADIUS:g} m and the drop of the slant, got {self.height}")


def plan(n_cases: int, seed: int) -> list[Body]:
    """Returns a Latin hypercube of cases: every parameter visits each n-th of its range once."""
    if n_cases < 1:
        raise ValueError(f"n_cases must be positive, got {n_cases}")
    generator = np.random.default_rng(seed)
    columns = {}
    for name, (low, high) in RANGES.items():
        shares = (generator.permutation(n_cases) + generator.random(n_cases)) / n_cases
        columns[name] = (low + (high - low) * shares).tolist()
    return [Body(**{name: column[i] for name, column in columns.items()}) for i in range(n_cases)]


def triangles(body: Body) -> NDArray[np.float64]:
    """Returns (T, 3, 3): the closed surface, corners counter-clockwise seen from outside, in metres.

    The body's middle stands over the origin's x = 0, y = 0, the ground is z = 0.
    """
    arc = np.linspace(0, math.pi / 2, NOSE_STATIONS)
    slant = math.radians(body.slant)
    x = np.concatenate((NOSE_RADIUS * (1 - np.cos(arc)), [body.length - SLANT_LENGTH * math.cos(slant), body.length]))
    inset = np.concatenate((NOSE_RADIUS * (1 - np.sin(arc)), [0.0, 0.0]))
    drop = np.zeros_like(x)
    drop[-1] = SLANT_LENGTH * math.sin(slant)
    half, low, high = WIDTH / 2 - inset, inset, body.height - inset - drop
    # Corners of each station's rectangle, counter-clockwise seen from the front.
    y = np.stack((half, -half, -half, half), axis=1)
    z = np.stack((low, low, high, high), axis=1)
    rings = np.stack((np.broadcast_to(x[:, None], y.shape), y, z), axis=2)

    front, rear = rings[0], rings[-1]
    faces = [front[[0, 1, 2]], front[[0, 2, 3]], rear[[0, 2, 1]], rear[[0, 3, 2]]]
    for this, following in itertools.pairwise(rings):
        for a in range(4):
            b = (a + 1) % 4
            faces += [np.stack((this[a], following[b], this[b])), np.stack((this[a], following[a], following[b]))]
    corners = np.stack(faces) - [body.length / 2, 0.0, -body.ride_height]
    cosine, sine = math.cos(math.radians(body.yaw)), math.sin(math.radians(body.yaw))
    return corners @ np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def volume(surface: NDArray[np.float64]) -> float:
    """Returns the volume inside a closed surface of (T, 3, 3) triangles; negative if it is inside out."""
    return float(np.einsum("ti,ti->", surface[:, 0], np.cross(surface[:, 1], surface[:, 2])) / 6)


def frontal_area(body: Body) -> float:
    """Returns the reference area of the coefficients: width times height, whatever the yaw."""
    return WIDTH * body.height


def write_stl(surface: NDArray[np.float64], path: Path) -> None:
    """Writes (T, 3, 3) triangles as text, which snappyHexMesh reads."""
    lines = ["solid body"]
    for corners in surface:
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        normal = normal / np.linalg.norm(normal)
        lines.append("facet normal {:.9g} {:.9g} {:.9g}\nouter loop".format(*normal))
        lines += ["vertex {:.9g} {:.9g} {:.9g}".format(*corner) for corner in corners]
        lines.append("endloop\nendfacet")
    path.write_text("\n".join([*lines, "endsolid body\n"]))
