"""Pictures of a case: pressure along the body and speed around it, predicted and solved; fields that should be zero."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

N_BANDS = 48
SMALLEST_POWER, LARGEST_POWER = -8, 2


@dataclass(frozen=True)
class FlowPicture:
    """What a picture shows.

    Attributes:
        title: Heading.
        nodes: (N, 2) contour in chords.
        pressure, exact_pressure: (N,) pressure coefficient at the nodes.
        anchors: (A, 2) volume anchors.
        grid: (ny, nx, 2) positions in chords.
        velocity, exact_velocity: (ny, nx, 2) in units of the free stream, NaN inside the body.
    """

    title: str
    nodes: NDArray[np.floating]
    pressure: NDArray[np.floating]
    exact_pressure: NDArray[np.floating]
    anchors: NDArray[np.floating]
    grid: NDArray[np.floating]
    velocity: NDArray[np.floating]
    exact_velocity: NDArray[np.floating]


def draw(picture: FlowPicture, path: Path) -> None:
    """Draws the picture into a PNG file."""
    figure, ((pressure_axes, predicted_axes), (exact_axes, error_axes)) = plt.subplots(
        2, 2, figsize=(12.0, 7.4), layout="constrained"
    )
    figure.suptitle(picture.title, fontsize=13)
    _draw_pressure(pressure_axes, picture)

    speed = np.linalg.norm(picture.velocity, axis=2)
    exact_speed = np.linalg.norm(picture.exact_velocity, axis=2)
    # The few points at the suction peak and at the stagnation point would else take most of the colours.
    low, high = np.nanquantile(exact_speed, (0.003, 0.997))
    # The grid's own coordinates are float32, too coarse for streamplot's check that they are equally spaced.
    coordinates = (
        np.linspace(*picture.grid[0, (0, -1), 0].tolist(), picture.grid.shape[1]),
        np.linspace(*picture.grid[(0, -1), 0, 1].tolist(), picture.grid.shape[0]),
    )
    place = picture.nodes, picture.grid
    for axes, values, velocity, name in (
        (predicted_axes, speed, picture.velocity, "speed, predicted"),
        (exact_axes, exact_speed, picture.exact_velocity, "speed, panel solver"),
    ):
        mesh = _draw_field(axes, *place, values, "turbo", low, high)
        axes.streamplot(
            *coordinates,
            velocity[..., 0],
            velocity[..., 1],
            color=(1, 1, 1, 0.55),
            density=0.9,
            linewidth=0.6,
            arrowsize=0.6,
        )
        axes.set_title(name, fontsize=11)
        figure.colorbar(mesh, ax=axes, extend="both", label=r"$|u| / u_\infty$")
    predicted_axes.plot(*picture.anchors.T, ".", color="black", markersize=1.5, alpha=0.6)

    error = 100 * np.linalg.norm(picture.velocity - picture.exact_velocity, axis=2)
    mesh = _draw_field(error_axes, *place, error, "magma", 0.0, float(np.nanquantile(error, 0.997)))
    error_axes.set_title("velocity error", fontsize=11)
    figure.colorbar(mesh, ax=error_axes, extend="max", label=r"$|\Delta u| / u_\infty$ in %")
    _save(figure, path)


def draw_magnitudes(
    title: str,
    nodes: NDArray[np.floating],
    grid: NDArray[np.floating],
    fields: dict[str, dict[str, NDArray[np.floating]]],
    path: Path,
) -> None:
    """Draws the powers of ten of fields that should be zero.

    Args:
        title: Heading.
        nodes: (N, 2) contour in chords.
        grid: (ny, nx, 2) positions in chords.
        fields: By quantity, a row of the picture, and by model, a column: (ny, nx), NaN inside the body.
        path: PNG file.
    """
    n_columns = len(next(iter(fields.values())))
    figure, rows = plt.subplots(
        len(fields), n_columns, figsize=(4.2 * n_columns, 3.1 * len(fields)), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=13)
    for row, (quantity, models) in zip(rows, fields.items(), strict=True):
        for axes, (name, values) in zip(row, models.items(), strict=True):
            powers = np.log10(np.maximum(np.abs(values), 10.0**SMALLEST_POWER))
            mesh = _draw_field(axes, nodes, grid, powers, "viridis", SMALLEST_POWER, LARGEST_POWER)
            rms = np.sqrt(np.nanmean(np.square(values.astype(np.float64))))
            axes.set_title(f"{quantity}: {name}\nroot mean square {rms:.1e}", fontsize=10)
        figure.colorbar(mesh, ax=row, extend="both", label="power of ten")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    # A palette makes the file three times smaller, and banded colours need no more.
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_pressure(axes: Axes, picture: FlowPicture) -> None:
    middle = int(np.argmin(picture.nodes[:, 0]))
    for side, colour, name in (
        (slice(0, middle + 1), "tab:red", "upper side"),
        (slice(middle, None), "tab:blue", "lower side"),
    ):
        x = picture.nodes[side, 0]
        axes.plot(x, picture.exact_pressure[side], color=colour, linewidth=3, alpha=0.3, label=f"{name}, panel solver")
        axes.plot(x, picture.pressure[side], color=colour, linewidth=1.2, label=f"{name}, predicted")
    axes.invert_yaxis()
    axes.set_xlabel("x / chord")
    axes.set_ylabel(r"$c_p$")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, frameon=False, loc="upper right")
    axes.set_title("pressure coefficient (suction up)", fontsize=11)


def _draw_field(
    axes: Axes,
    nodes: NDArray[np.floating],
    grid: NDArray[np.floating],
    values: NDArray[np.floating],
    colours: str,
    low: float,
    high: float,
) -> matplotlib.image.AxesImage:
    extent = (grid[0, 0, 0], grid[0, -1, 0], grid[0, 0, 1], grid[-1, 0, 1])
    # Bands of colour read like contour lines and keep the file small.
    bands = matplotlib.colormaps[colours].resampled(N_BANDS)
    image = axes.imshow(values, origin="lower", extent=extent, cmap=bands, vmin=low, vmax=high, interpolation="nearest")
    axes.fill(*nodes.T, facecolor="0.85", edgecolor="black", linewidth=0.8, zorder=3)
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    axes.set_xlabel("x / chord")
    axes.set_ylabel("y / chord")
    return image
