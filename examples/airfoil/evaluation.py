"""What a trained model is worth on unseen airfoils: errors beside two plain baselines, and streamed predictions."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dataset
import numpy as np
import panel_flow
import torch
from dataset import Cases, Shapes
from model import AirfoilModel, KVCache, flow_condition
from numpy.typing import NDArray
from torch import Tensor

from anchor_attention import streaming

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.training import relative_errors

SURFACE_ANCHORS = 80
VOLUME_ANCHORS = 256
ANCHOR_SEED = 1
BATCH_SIZE = 8
MEAN_SHAPES = 8


def test_cases(shapes: Shapes, angle_degrees: float) -> Iterator[Cases]:
    """Yields all shapes at one angle of attack, in order, :data:`BATCH_SIZE` at a time."""
    generator = torch.Generator().manual_seed(ANCHOR_SEED)
    for rows in torch.arange(len(shapes)).split(BATCH_SIZE):
        yield dataset.make_cases(shapes, rows, torch.full((len(rows),), angle_degrees).deg2rad(), generator)


@torch.no_grad()
def model_errors(model: AirfoilModel, shapes: Shapes) -> dict[str, Tensor]:
    """Relative L2 errors of the model, anchors and queries together.

    Returns:
        By branch (S, angles), for :data:`dataset.TEST_ANGLES`.
    """
    model.eval()
    counts = {"surface": SURFACE_ANCHORS, "volume": VOLUME_ANCHORS}
    errors: dict[str, list[Tensor]] = {branch: [] for branch in counts}
    for angle in dataset.TEST_ANGLES:
        at_angle: dict[str, list[Tensor]] = {branch: [] for branch in counts}
        for cases in test_cases(shapes, angle):
            anchors = {branch: points[:, : counts[branch]] for branch, points in cases.points.items()}
            queries = {branch: points[:, counts[branch] :] for branch, points in cases.points.items()}
            prediction = model(cases.geometry, anchors, queries, flow_condition(cases.angle))
            for branch in counts:
                at_angle[branch].append(relative_errors(prediction[branch], cases.targets[branch]))
        for branch in counts:
            errors[branch].append(torch.cat(at_angle[branch]))
    return {branch: torch.stack(columns, dim=1) for branch, columns in errors.items()}


def baseline_errors(train: Shapes, unseen: Shapes) -> dict[str, dict[str, Tensor]]:
    """Relative L2 errors of two predictions that need no model.

    ``"training_mean"`` is the mean flow of the training shapes at the same contour node or volume point (the velocity's
    over :data:`MEAN_SHAPES` of them), ``"nearest_shape"`` the flow of the training shape whose contour is nearest.

    Returns:
        By baseline and branch (S, angles), as for :func:`model_errors`.
    """
    weights = torch.from_numpy(panel_flow.free_stream_weights(np.array(dataset.TEST_ANGLES))).float()
    nearest = (train.nodes[None] - unseen.nodes[:, None]).square().sum(dim=(2, 3)).argmin(dim=1)
    pressure = 1 - torch.einsum("sni,ai->san", unseen.surface_speed, weights).square()
    train_pressure = 1 - torch.einsum("sni,ai->san", train.surface_speed, weights).square()
    mean_rows = torch.linspace(0, len(train) - 1, min(MEAN_SHAPES, len(train))).long().tolist()

    errors: dict[str, dict[str, Tensor]] = {}
    guesses = {"training_mean": train_pressure.mean(dim=0)[None], "nearest_shape": train_pressure[nearest]}
    for name, guess in guesses.items():
        errors[name] = {"surface": (guess - pressure).norm(dim=2) / pressure.norm(dim=2)}
    for name in errors:
        columns = []
        for row in range(len(unseen)):
            sources = mean_rows if name == "training_mean" else [int(nearest[row])]
            points = unseen.volume_points[row].numpy()
            guess = torch.from_numpy(_mean_velocity(train, sources, points)).float()
            difference = torch.einsum("msc,as->amc", guess - unseen.volume_velocity[row], weights)
            exact = torch.einsum("msc,as->amc", unseen.volume_velocity[row], weights) + weights[:, None]
            columns.append(difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))
        errors[name]["volume"] = torch.stack(columns)
    return errors


def _mean_velocity(shapes: Shapes, rows: list[int], points: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean over shapes of what they add to the free streams; (M, 2, 2). A point inside a body takes its wall's flow."""
    total = np.zeros((len(points), 2, 2))
    for row in rows:
        nodes, speed = shapes.nodes[row].numpy().astype(np.float64), shapes.surface_speed[row].numpy()
        velocity = panel_flow.induced_velocity(points, nodes, speed)
        inside = panel_flow.contains(points, nodes)
        if inside.any():
            node = ((points[inside, None] - nodes) ** 2).sum(axis=2).argmin(axis=1)
            normal = panel_flow.outward_normals(nodes)[node]
            along = np.stack((-normal[:, 1], normal[:, 0]), axis=1)
            velocity[inside] = -speed[node][:, :, None] * along[:, None] - np.eye(2)
        total += velocity
    return total / len(rows)


@dataclass(frozen=True)
class Streamed:
    """A flow that was predicted at many points.

    Attributes:
        pressure: (N,) pressure coefficient at the contour nodes, in their order.
        velocity: (M, 2) velocity at the query points.
        encode_seconds: Time of the one encoding of geometry and anchors.
        decode_seconds: Time of decoding all M points.
        peak_memory_growth: Bytes by which decoding raised the process's peak memory.
    """

    pressure: Tensor
    velocity: Tensor
    encode_seconds: float
    decode_seconds: float
    peak_memory_growth: int


@torch.no_grad()
def stream(
    model: AirfoilModel, shapes: Shapes, row: int, angle_degrees: float, points: Tensor, chunk_size: int
) -> Streamed:
    """Encodes the anchors of one case once and decodes query points in chunks against the cache.

    Args:
        model: A trained model.
        shapes: The data set, whose volume points are the anchors.
        row: The shape.
        angle_degrees: Angle of attack.
        points: (M, 2) query points in chords.
        chunk_size: Points per call: what bounds the memory.
    """
    model.eval()
    angle = torch.tensor([angle_degrees]).deg2rad()
    condition = flow_condition(angle)
    cases = dataset.make_cases(shapes, torch.tensor([row]), angle, torch.Generator().manual_seed(ANCHOR_SEED))
    anchors = {
        "surface": cases.points["surface"][:, :SURFACE_ANCHORS],
        "volume": cases.points["volume"][:, :VOLUME_ANCHORS],
    }
    start = time.perf_counter()
    cache = streaming.Cache(model.encode(cases.geometry, anchors, condition))
    encoded = time.perf_counter()
    pressure = model.decode({"surface": cases.geometry}, condition, cache.tree)["surface"][0, :, 0]

    def decode(caches: list[KVCache], chunk: Tensor) -> Tensor:
        return model.decode({"volume": chunk}, condition, caches)["volume"]

    velocity = torch.empty(len(points), 2)
    memory = _peak_memory()
    report = streaming.stream(decode, cache, points, velocity, chunk_size=chunk_size)
    return Streamed(pressure, velocity, encoded - start, report.seconds, _peak_memory() - memory)


def volume_anchors(shapes: Shapes, row: int) -> Tensor:
    """Returns (A, 2): the volume anchors of :func:`stream`."""
    cases = dataset.make_cases(shapes, torch.tensor([row]), torch.zeros(1), torch.Generator().manual_seed(ANCHOR_SEED))
    return cases.points["volume"][0, :VOLUME_ANCHORS]


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The unit of ru_maxrss is bytes on macOS and KiB elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def field_grid(nx: int, ny: int, box: tuple[float, float, float, float]) -> Tensor:
    """Returns (ny, nx, 2): the grid points over a box (x_min, x_max, y_min, y_max), float32."""
    x = torch.linspace(box[0], box[1], nx)
    y = torch.linspace(box[2], box[3], ny)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def exact_velocity(shapes: Shapes, row: int, angle_degrees: float, points: Tensor) -> Tensor:
    """Returns (M, 2) float32: the solver's velocity at (M, 2) points outside the body, from its sheet strengths."""
    weights = panel_flow.free_stream_weights(angle_degrees)
    induced = panel_flow.induced_velocity(points.numpy(), shapes.nodes[row].numpy(), shapes.surface_speed[row].numpy())
    return torch.from_numpy(np.einsum("msc,s->mc", induced, weights) + weights).float()
