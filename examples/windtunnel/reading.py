"""Reads a solved OpenFOAM case with PyVista, whose reader keeps polyhedral cells and which writes ParaView's files too.

Of the libraries at hand, foamlib and fluidfoam read fields but no cells that ParaView could be given back, and meshio
reads no OpenFOAM; PyVista does all of it and draws the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Flow:
    """A solved case, in coefficients of the wind: pressure and stress over half its speed squared, velocity over it.

    Attributes:
        surface_points: (S, 3) centres of the body's faces, in metres.
        surface_normals: (S, 3) unit normals out of the body.
        surface_areas: (S,) areas in square metres.
        pressure: (S,) pressure coefficient.
        shear: (S, 3) wall shear stress that the air exerts on the body.
        volume_points: (V, 3) centres of cells.
        velocity: (V, 3).
        volume_pressure: (V,) pressure coefficient.
    """

    surface_points: Array
    surface_normals: Array
    surface_areas: Array
    pressure: Array
    shear: Array
    volume_points: Array
    velocity: Array
    volume_pressure: Array


def meshes(folder: Path) -> tuple[Any, Any]:
    """Reads the last written time of a case.

    Returns:
        The cells, a ``pyvista.UnstructuredGrid``, and the body, a ``pyvista.PolyData``, with fields by cell.

    Raises:
        ValueError: No time was written.
    """
    import pyvista

    marker = folder / "case.foam"
    marker.touch()
    reader = pyvista.OpenFOAMReader(str(marker))
    times = [time for time in reader.time_values if time > 0]
    if not times:
        raise ValueError(f"folder must hold a solved case, got {folder} without a written time")
    reader.set_active_time_value(times[-1])
    reader.enable_all_patch_arrays()
    reader.cell_to_point_creation = False
    blocks = reader.read()
    return blocks["internalMesh"], blocks["boundary"]["body"]


def flow_of(cells: Any, body: Any, speed: float) -> Flow:
    """Makes a flow of meshes whose cells have OpenFOAM's fields ``U``, ``p`` and, on the body, ``wallShearStress``.

    Raises:
        ValueError: A value is not finite.
    """
    # Points of a face are in order around it, and its normal points out of the mesh: into the body.
    sized = body.compute_cell_sizes(length=False, area=True, volume=False)
    oriented = body.compute_normals(
        cell_normals=True,
        point_normals=False,
        consistent_normals=False,
        auto_orient_normals=False,
        split_vertices=False,
    )
    normals = -np.asarray(oriented.cell_data["Normals"])
    dynamic = 0.5 * speed**2
    flow = Flow(
        surface_points=np.asarray(body.cell_centers().points),
        surface_normals=normals,
        surface_areas=np.asarray(sized.cell_data["Area"]),
        pressure=np.asarray(body.cell_data["p"]) / dynamic,
        # OpenFOAM's sign is that of the stress on the fluid's side: against the flow.
        shear=-np.asarray(body.cell_data["wallShearStress"]) / dynamic,
        volume_points=np.asarray(cells.cell_centers().points),
        velocity=np.asarray(cells.cell_data["U"]) / speed,
        volume_pressure=np.asarray(cells.cell_data["p"]) / dynamic,
    )
    for name, values in vars(flow).items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(values))} other values")
    return flow


def read(folder: Path, speed: float) -> Flow:
    """Reads the flow of a solved case: :func:`meshes`, then :func:`flow_of`."""
    return flow_of(*meshes(folder), speed)


def force(flow: Flow, area: float) -> Array:
    """Returns (3,): the force coefficients along x (drag), y (side) and z (lift), integrated over the surface."""
    stress = -flow.pressure[:, None] * flow.surface_normals + flow.shear
    return np.asarray((stress * flow.surface_areas[:, None]).sum(axis=0) / area)
