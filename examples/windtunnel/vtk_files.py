"""Whole meshes as ParaView's files: of a solved case, and with what the surrogate predicts beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from reading import Array, Flow

SOLVED_FIELDS = {"cells": ("U", "p"), "body": ("p", "wallShearStress")}


def store_solved(cells: Any, body: Any, stem: Path) -> None:
    """Writes the solved fields of a case in float32: ``<stem>.vtu`` the cells, ``<stem>.vtp`` the body.

    Args:
        cells: The mesh, as :func:`reading.meshes` returns it.
        body: The surface of the body, likewise.
        stem: Path of the files without their ending.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    for mesh, kind, ending in ((cells, "cells", ".vtu"), (body, "body", ".vtp")):
        copy = mesh.copy()
        copy.clear_data()
        copy.points = copy.points.astype(np.float32)
        for name in SOLVED_FIELDS[kind]:
            copy.cell_data[name] = mesh.cell_data[name].astype(np.float32)
        copy.save(stem.with_suffix(ending), compression="lzma")


def load_solved(stem: Path) -> tuple[Any, Any]:
    """Returns the cells and the body that :func:`store_solved` wrote."""
    import pyvista

    return pyvista.read(stem.with_suffix(".vtu")), pyvista.read(stem.with_suffix(".vtp"))


def add_prediction(cells: Any, body: Any, predicted: Flow, speed: float) -> None:
    """Adds prediction and error to the meshes of a solved case, in OpenFOAM's units and signs.

    The fields ``U`` (m/s), ``p`` (m²/s², over the density) and ``wallShearStress`` (m²/s²) get ``_predicted`` and
    ``_error``, predicted less solved; the body gets the pressure coefficient ``cp`` as well.

    Args:
        cells: The mesh with ``U`` and ``p``.
        body: The surface of the body with ``p`` and ``wallShearStress``.
        predicted: The prediction at all cells and faces, in their order.
        speed: Speed of the wind in m/s.
    """
    dynamic = 0.5 * speed**2
    _add(cells, "U", speed * predicted.velocity)
    _add(cells, "p", dynamic * predicted.volume_pressure)
    _add(body, "p", dynamic * predicted.pressure)
    _add(body, "wallShearStress", -dynamic * predicted.shear)
    body.cell_data["cp"] = body.cell_data["p"] / dynamic
    _add(body, "cp", predicted.pressure)


def _add(mesh: Any, name: str, values: Array) -> None:
    predicted = values.astype(np.float32)
    mesh.cell_data[f"{name}_predicted"] = predicted
    mesh.cell_data[f"{name}_error"] = predicted - np.asarray(mesh.cell_data[name], dtype=np.float32)


def write(cells: Any, body: Any, stem: Path) -> None:
    """Writes meshes with all their fields: ``<stem>.vtu`` and ``<stem>.vtp``, which ParaView opens."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    cells.save(stem.with_suffix(".vtu"))
    body.save(stem.with_suffix(".vtp"))
