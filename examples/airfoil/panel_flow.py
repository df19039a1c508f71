"""Potential flow of a closed vortex sheet: exact velocity anywhere from the strengths that the solver found.

A body is an ordered list of nodes: trailing edge, upper side, leading edge, lower side, trailing edge. The sheet's
strength varies linearly between nodes (clockwise positive), and a constant source panel closes the blunt trailing edge
(Katz and Plotkin, *Low-Speed Aerodynamics*, sections 10.2 and 11.4). Lengths are in chords, velocities in units of the
free stream. Everything is linear in the free stream, so two solutions (angles of attack of 0 and 90 degrees) give all
others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]

# Where the flow is looked at: (x_min, x_max, y_min, y_max) in chords.
BOX = (-0.6, 1.8, -0.8, 0.8)

_CHUNK_POINTS = 8192


def free_stream_weights(angle_degrees: float | FloatArray) -> NDArray[np.float64]:
    """Returns (..., 2): the weights of the two unit free streams at an angle of attack in degrees."""
    angle = np.radians(np.asarray(angle_degrees, dtype=np.float64))
    return np.stack((np.cos(angle), np.sin(angle)), axis=-1)


def induced_velocity(points: FloatArray, nodes: FloatArray, strengths: FloatArray) -> NDArray[np.float64]:
    """Velocity that the sheet adds to the free stream.

    Args:
        points: (M, 2) positions off the sheet.
        nodes: (N, 2) nodes of the body in order.
        strengths: (N, S) sheet strength at the nodes, one column per free stream.

    Returns:
        (M, S, 2) velocity (x and y component), float64.
    """
    z_nodes = nodes[:, 0].astype(np.float64) + 1j * nodes[:, 1]
    gamma = strengths.astype(np.float64)
    panel = np.diff(z_nodes)
    length = np.abs(panel)
    if np.any(length == 0):
        raise ValueError(f"nodes must be distinct from their neighbours, got equal nodes at {int(np.argmin(length))}")

    # The conjugate velocity of one panel is factor * ((gamma_0 + slope * (z - z_0)) * log_ratio - d_gamma), linear in
    # z: summed over the panels it becomes two products, and neighbours share each node's logarithm.
    factor = 1j * length / (2 * np.pi * panel)
    d_gamma = np.diff(gamma, axis=0)
    slope = d_gamma / panel[:, None]
    at_zero = factor[:, None] * (gamma[:-1] - slope * z_nodes[:-1, None])
    times_z = factor[:, None] * slope
    constant = -(factor[:, None] * d_gamma).sum(axis=0)
    gap = z_nodes[-1] - z_nodes[0]
    closing_source = gamma[0] * abs(gap) / (2 * np.pi * gap) if gap != 0 else np.zeros_like(gamma[0])

    velocity = np.empty((len(points), gamma.shape[1], 2))
    for start in range(0, len(points), _CHUNK_POINTS):
        z = points[start : start + _CHUNK_POINTS, 0].astype(np.float64) + 1j * points[start : start + _CHUNK_POINTS, 1]
        offset = z[:, None] - z_nodes
        log_radius = np.log(np.abs(offset))
        angle = np.angle(offset)
        # A panel is seen under an angle below pi: the principal value is the right branch.
        turn = angle[:, :-1] - angle[:, 1:]
        turn -= 2 * np.pi * np.round(turn / (2 * np.pi))
        log_ratio = log_radius[:, :-1] - log_radius[:, 1:] + 1j * turn
        # einsum and not @: with two columns a threaded BLAS spends its time waiting for its threads.
        conjugate = np.einsum("mp,ps->ms", log_ratio, at_zero) + constant
        conjugate += z[:, None] * np.einsum("mp,ps->ms", log_ratio, times_z)
        gap_turn = angle[:, 0] - angle[:, -1]
        gap_turn -= 2 * np.pi * np.round(gap_turn / (2 * np.pi))
        gap_ratio = log_radius[:, 0] - log_radius[:, -1] + 1j * gap_turn
        conjugate += gap_ratio[:, None] * closing_source
        velocity[start : start + len(z), :, 0] = conjugate.real
        velocity[start : start + len(z), :, 1] = -conjugate.imag
    return velocity


def contains(points: FloatArray, nodes: FloatArray) -> NDArray[np.bool_]:
    """Returns (M,) bool: which of the (M, 2) points lie inside the closed polygon of the (N, 2) nodes."""
    inside = np.zeros(len(points), dtype=bool)
    following = np.roll(nodes, -1, axis=0)
    for (x0, y0), (x1, y1) in zip(nodes.astype(np.float64), following.astype(np.float64), strict=True):
        if y0 == y1:
            continue
        crosses = (points[:, 1] >= min(y0, y1)) & (points[:, 1] < max(y0, y1))
        inside ^= crosses & (points[:, 0] < x0 + (points[:, 1] - y0) * (x1 - x0) / (y1 - y0))
    return inside


def distance_to_body(points: FloatArray, nodes: FloatArray) -> NDArray[np.float64]:
    """Returns (M,): distance of the (M, 2) points to the closed polygon of the (N, 2) nodes, in chords."""
    start = nodes.astype(np.float64)
    edge = np.roll(start, -1, axis=0) - start
    squared_length = np.maximum((edge**2).sum(axis=1), np.finfo(np.float64).tiny)
    distance = np.empty(len(points))
    for first in range(0, len(points), _CHUNK_POINTS):
        offset = points[first : first + _CHUNK_POINTS, None].astype(np.float64) - start
        along = np.clip((offset * edge).sum(axis=2) / squared_length, 0, 1)
        offset -= along[..., None] * edge
        distance[first : first + len(offset)] = np.sqrt((offset**2).sum(axis=2).min(axis=1))
    return distance


def outward_normals(nodes: FloatArray) -> NDArray[np.float64]:
    """Returns (N, 2): unit normals at the nodes, the mean of the two neighbouring panels', pointing into the flow."""
    tangent = np.diff(nodes.astype(np.float64), axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    tangent = np.concatenate((tangent[:1], tangent[:-1] + tangent[1:], tangent[-1:]))
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return np.stack((tangent[:, 1], -tangent[:, 0]), axis=1)
