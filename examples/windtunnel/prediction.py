"""Prediction of whole flows: geometry and anchors are encoded once, then every face and cell is streamed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import sampling
import torch
from reading import Array, Flow
from sampling import Case, Geometry
from surrogate import TunnelModel
from torch import Tensor

from anchor_attention import streaming

ANCHOR_SEED = 1
CHUNK_POINTS = 8192


@dataclass(frozen=True)
class Setting:
    """How much of a case is encoded: as many points as in the training.

    Args:
        geometry_points: Points of the body that say what it looks like.
        surface_anchors: Anchors among the faces of the body.
        volume_anchors: Anchors among the points around it.
    """

    geometry_points: int
    surface_anchors: int
    volume_anchors: int


@dataclass(frozen=True)
class Times:
    """Seconds of a prediction.

    Attributes:
        features: Turning all points into what the model reads.
        encode: Geometry and anchors.
        decode: All faces and points.
        decode_cpu: The same in processor time of all threads, which other programs on the machine don't lengthen.
        points: Faces and points that were decoded.
    """

    features: float
    encode: float
    decode: float
    decode_cpu: float
    points: int

    @property
    def total(self) -> float:
        """Seconds from points to predictions."""
        return self.features + self.encode + self.decode

    @property
    def points_per_second(self) -> float:
        """Points decoded per second, without features and encoding."""
        return self.points / self.decode


@torch.no_grad()
def predict(
    model: TunnelModel,
    surface: tuple[Array, Array, Array],
    volume_points: Array,
    speed: float,
    yaw: float,
    setting: Setting,
) -> tuple[Flow, Times]:
    """Predicts the flow at all faces of a body and all given points around it.

    Args:
        model: A trained model.
        surface: (S, 3) centres of the faces in the tunnel (m), (S, 3) normals out of the body, (S,) areas (m²).
        volume_points: (V, 3) points around the body (m), at least as many as anchors.
        speed: Speed of the wind in m/s.
        yaw: Angle in degrees by which the body is turned.
        setting: How much is encoded.

    Returns:
        The predicted flow in the tunnel's frame, as coefficients, and the seconds that it took.
    """
    begin = time.perf_counter()
    points, normals, areas = surface
    geometry = Geometry(points, normals, yaw)
    queries = {"surface": geometry.surface_features(), "volume": geometry.volume_features(volume_points)}
    condition = sampling.condition(speed, yaw)[None]
    featured = time.perf_counter()

    model.eval()
    generator = torch.Generator().manual_seed(ANCHOR_SEED)
    shape = _some(queries["surface"], setting.geometry_points, generator)
    anchors = {
        "surface": _some(queries["surface"], setting.surface_anchors, generator),
        "volume": _some(queries["volume"], setting.volume_anchors, generator),
    }
    cache = streaming.Cache(model.encode(shape, anchors, condition))
    encoded, encoded_cpu = time.perf_counter(), time.process_time()
    outputs = {branch: torch.empty(len(those), 4) for branch, those in queries.items()}
    # One branch after the other: a call of both would cost each of them the other's pass through the blocks.
    for branch, those in queries.items():
        streaming.stream(
            lambda caches, chunk, name=branch: model.decode({name: chunk}, condition, caches)[name],
            cache,
            those,
            outputs[branch],
            chunk_size=CHUNK_POINTS,
        )
    decoded, decoded_cpu = time.perf_counter(), time.process_time()
    turn = geometry.frame.to_tunnel
    at_surface, around = outputs["surface"].numpy(), outputs["volume"].numpy()
    flow = Flow(
        surface_points=points,
        surface_normals=normals,
        surface_areas=areas,
        pressure=at_surface[:, 0],
        shear=turn(at_surface[:, 1:] / sampling.SHEAR_SCALE).astype(np.float32),
        volume_points=volume_points,
        velocity=turn(around[:, :3]).astype(np.float32),
        volume_pressure=around[:, 3],
    )
    seconds = featured - begin, encoded - featured, decoded - encoded, decoded_cpu - encoded_cpu
    return flow, Times(*seconds, points=len(points) + len(volume_points))


def predict_case(model: TunnelModel, case: Case, setting: Setting) -> tuple[Flow, Times]:
    """Predicts a case at all its points, of which the model is told no value."""
    flow = case.flow
    surface = flow.surface_points, flow.surface_normals, flow.surface_areas
    return predict(model, surface, flow.volume_points, case.body.speed, case.body.yaw, setting)


def _some(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Returns (1, n, features): some of (N, features) points."""
    if n > len(points):
        raise ValueError(f"points must be at least as many as the {n} that are encoded, got {len(points)}")
    return points[torch.randperm(len(points), generator=generator)[:n]][None]
