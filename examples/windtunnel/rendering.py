"""Pictures of a case, drawn off-screen with PyVista, and how well the forces are met."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = (("", "OpenFOAM"), ("_predicted", "surrogate"), ("_error", "surrogate - OpenFOAM"))
BAR = {
    "vertical": False,
    "height": 0.08,
    "width": 0.6,
    "position_x": 0.2,
    "position_y": 0.02,
    "n_labels": 5,
    "fmt": "%.2f",
    "title": "",
    "label_font_size": 18,
    "color": "black",
}
# What a picture shows around a body of a metre: the wake and some of the wind.
VIEW = ((-0.8, 1.7), (0.0, 0.75))


def _plotter(shape: tuple[int, int], size: tuple[int, int]) -> Any:
    import pyvista

    plotter = pyvista.Plotter(off_screen=True, shape=shape, window_size=list(size), border=False)
    plotter.set_background("white")
    return plotter


def _write_title(plotter: Any, title: str) -> None:
    plotter.add_text(title, font_size=13, color="black", position="upper_edge")


def _save(plotter: Any, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = plotter.screenshot(return_img=True)
    plotter.close()
    # A palette makes the file three times smaller.
    Image.fromarray(image).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _limits(values: Any) -> list[float]:
    """Colours for all but the most extreme hundredth of the values."""
    low, high = np.quantile(values, (0.005, 0.995))
    return [float(low), float(high)]


def draw_pressure(body: Any, path: Path) -> None:
    """Draws the body from its nose and from its rear, coloured by the pressure coefficient.

    Args:
        body: Surface with ``cp``, ``cp_predicted`` and ``cp_error`` by cell.
        path: The PNG file.
    """
    plotter = _plotter((2, 3), (1500, 840))
    limits = _limits(body.cell_data["cp"])
    error = float(np.quantile(np.abs(body.cell_data["cp_error"]), 0.99))
    # Above the bar of colours.
    looked_at, size = np.array(body.center) - [0.0, 0.0, 0.04 * body.length], body.length
    for row, direction in enumerate(((-1.0, -1.0, 0.55), (1.0, -1.0, 0.55))):
        for column, (ending, title) in enumerate(COLUMNS):
            plotter.subplot(row, column)
            is_error = ending == "_error"
            plotter.add_mesh(
                body.copy(deep=False),
                scalars=f"cp{ending}",
                cmap="coolwarm" if is_error else "turbo",
                clim=[-error, error] if is_error else limits,
                show_scalar_bar=row == 1,
                # A title of its own: bars of one title would be one bar.
                scalar_bar_args={**BAR, "title": " " * (column + 1)},
                ambient=0.4,
            )
            if row == 0:
                _write_title(plotter, f"cp, {title}")
            plotter.camera_position = [
                tuple(looked_at + 1.05 * size * np.array(direction)),
                tuple(looked_at),
                (0, 0, 1),
            ]
            plotter.camera.view_angle = 33
    _save(plotter, path)


def draw_slice(cells: Any, speed: float, path: Path) -> None:
    """Draws the velocity along the wind in the plane through the tunnel's middle: solved, predicted, and the error.

    Args:
        cells: Mesh with ``U``, ``U_predicted`` and ``U_error`` by cell.
        speed: Speed of the wind in m/s.
        path: The PNG file.
    """
    (x0, x1), (z0, z1) = VIEW
    # Values at the corners: those of cells would show the mesh more than the flow.
    plane = cells.cell_data_to_point_data().slice(normal="y", origin=(0.0, 0.001, 0.0))
    plane = plane.clip_box((x0, x1, -0.1, 0.1, z0, z1), invert=False)
    plotter = _plotter((3, 1), (1100, 1320))
    for row, (ending, title) in enumerate(COLUMNS):
        plotter.subplot(row, 0)
        shown = plane.copy(deep=False)
        is_error = ending == "_error"
        values = plane.point_data[f"U{ending}"] / speed
        shown.point_data["shown"] = np.linalg.norm(values, axis=1) if is_error else values[:, 0]
        plotter.add_mesh(
            shown,
            scalars="shown",
            cmap="magma_r" if is_error else "turbo",
            clim=[0.0, 0.4] if is_error else [-0.4, 1.3],
            lighting=False,
            scalar_bar_args={**BAR, "title": " " * (row + 1)},
        )
        _write_title(
            plotter, "size of the velocity's error / wind" if is_error else f"velocity along the wind, {title}"
        )
        plotter.camera.parallel_projection = True
        plotter.camera_position = [((x0 + x1) / 2, -5, (z0 + z1) / 2 - 0.03), ((x0 + x1) / 2, 0, (z0 + z1) / 2 - 0.03),
                                   (0, 0, 1)]  # fmt: skip
        plotter.camera.parallel_scale = 0.51
    _save(plotter, path)


def draw_wake(cells: Any, body: Any, speed: float, path: Path) -> None:
    """Draws streamlines that pass the body, solved and predicted, coloured by speed.

    Args:
        cells: Mesh with ``U`` and ``U_predicted`` by cell.
        body: The surface of the body.
        speed: Speed of the wind in m/s.
        path: The PNG file.
    """
    import pyvista

    # Lines are traced through a regular grid: VTK is slow in polyhedra.
    x0, x1, y0, y1, _, z1 = body.bounds
    low, high = np.array((x0 - 0.35, y0 - 0.3, 0.005)), np.array((x1 + 0.9, y1 + 0.3, z1 + 0.25))
    counts = np.ceil((high - low) / 0.02).astype(int) + 1
    grid = pyvista.ImageData(dimensions=counts, spacing=(high - low) / (counts - 1), origin=low)
    sampled = grid.sample(cells.cell_data_to_point_data())
    y, z = np.meshgrid(np.linspace(y0, y1, 8), np.linspace(0.03, z1 + 0.04, 7))
    rear = np.stack((np.full(y.size, x1 + 0.08), y.ravel(), z.ravel()), axis=1)
    plotter = _plotter((2, 1), (1200, 1040))
    for row, (ending, title) in enumerate(COLUMNS[:2]):
        plotter.subplot(row, 0)
        lines = sampled.streamlines_from_source(
            pyvista.PolyData(rear), vectors=f"U{ending}", integration_direction="both", max_length=3.0,
            max_step_length=0.5, initial_step_length=0.2,
        )  # fmt: skip
        lines["speed"] = np.linalg.norm(lines[f"U{ending}"], axis=1) / speed
        plotter.add_mesh(body, color="lightgrey", ambient=0.3)
        plotter.add_mesh(
            lines.tube(radius=0.003),
            scalars="speed",
            cmap="turbo",
            clim=[0.0, 1.2],
            scalar_bar_args={**BAR, "title": " " * (row + 1)},
        )
        _write_title(plotter, f"speed / wind along streamlines, {title}")
        middle = np.array(((x0 + x1) / 2 + 0.3, (y0 + y1) / 2, z1 / 2 - 0.05))
        plotter.camera_position = [tuple(middle + np.array((1.2, -1.8, 0.8))), tuple(middle), (0, 0, 1)]
        plotter.camera.view_angle = 28
    _save(plotter, path)


def draw_forces(
    drag: tuple[Sequence[float], Sequence[float]], lift: tuple[Sequence[float], Sequence[float]], path: Path
) -> None:
    """Draws predicted against solved force coefficients of unseen bodies.

    Args:
        drag: Solved and predicted.
        lift: Solved and predicted.
        path: The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.0, 4.4), layout="constrained")
    for axis, (solved, predicted), name in zip(axes, (drag, lift), ("drag", "lift"), strict=True):
        both = [*solved, *predicted]
        margin = 0.08 * (max(both) - min(both)) + 1e-3
        ends = np.array((min(both) - margin, max(both) + margin))
        axis.plot(ends, ends, color="0.5", linewidth=1)
        if name == "drag":
            axis.fill_between(ends, 0.95 * ends, 1.05 * ends, color="0.9", label="within 5 %")
            axis.legend(frameon=False, loc="upper left")
        axis.plot(solved, predicted, "o", color="tab:blue")
        axis.set(
            xlim=ends, ylim=ends, aspect="equal", xlabel="OpenFOAM", ylabel="surrogate", title=f"{name} coefficient"
        )
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
