"""Streams of values with their derivatives by coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anchor_attention import JointAnchorAttention, TokenSpec, physics
from anchor_attention.streaming import WithJacobian, stream


@pytest.fixture
def attention() -> JointAnchorAttention:
    torch.manual_seed(0)
    return JointAnchorAttention(dim=16, num_heads=2, branches=("surface", "volume"), init_weights="torch").double()


@pytest.fixture
def cache(attention: JointAnchorAttention) -> Any:
    anchors = [TokenSpec("surface_anchors", 9), TokenSpec("volume_anchors", 7)]
    with torch.no_grad():
        return attention(torch.randn(1, 16, 16, dtype=torch.float64), anchors, return_kv_cache=True)[1]


def test_one_stream(attention: JointAnchorAttention, cache: Any, tmp_path: Path) -> None:
    """In chunks, against derivatives of all points at once; and a checkpoint knows the weights behind the wrapper."""
    alone = [TokenSpec("surface_anchors", None), TokenSpec("volume_anchors", None)]

    def decode(tree: Any, chunk: torch.Tensor) -> torch.Tensor:
        return attention(chunk, [*alone, TokenSpec("surface_queries", chunk.shape[1])], kv_cache=tree)[..., :5]

    points = torch.randn(50, 16, dtype=torch.float64)
    outputs = {
        "values": torch.zeros(50, 5, dtype=torch.float64),
        "jacobian": torch.zeros(50, 15, dtype=torch.float64),
    }
    stream(WithJacobian(decode, 3), cache, points, outputs, chunk_size=12, checkpoint=tmp_path / "note.json")

    def at(x: torch.Tensor) -> torch.Tensor:
        return decode(cache, torch.cat([x, points[None, :, 3:]], dim=-1))

    with torch.no_grad():
        values, slopes = physics.jacobian(at, points[None, :, :3])
    torch.testing.assert_close(outputs["values"], values[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs["jacobian"].unflatten(-1, (5, 3)), slopes[0], rtol=0, atol=1e-12)
    assert slopes.abs().max() > 0.01


def test_branches_of_different_lengths(attention: JointAnchorAttention, cache: Any) -> None:
    def decode(tree: Any, chunks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        specs = [TokenSpec("surface_anchors", None), TokenSpec("volume_anchors", None)]
        specs += [TokenSpec(f"{name}_queries", chunk.shape[1]) for name, chunk in chunks.items()]
        out = attention(torch.cat(list(chunks.values()), dim=1), specs, kv_cache=tree)
        parts = out.split([chunk.shape[1] for chunk in chunks.values()], dim=1)
        return dict(zip(chunks, parts, strict=True))

    queries = {name: torch.randn(n, 16, dtype=torch.float64) for name, n in (("surface", 5), ("volume", 11))}
    outputs = stream(WithJacobian(decode, 2), cache, queries, chunk_size=4).outputs
    step = 1e-5
    for name, rows in queries.items():
        moved = []
        for sign in (1, -1):
            shifted = {**queries, name: rows + sign * step * torch.eye(16, dtype=torch.float64)[1]}
            moved.append(stream(decode, cache, shifted).outputs[name])
        difference = (moved[0] - moved[1]) / (2 * step)
        found = outputs[f"{name}_jacobian"].unflatten(-1, (16, 2))[..., 1]
        # step² times the third derivative, and eps / step.
        torch.testing.assert_close(found, difference, rtol=1e-7, atol=1e-8)


def test_arguments_are_checked(cache: Any) -> None:
    with pytest.raises(ValueError, match="n_coordinates must be at least 1, got 0"):
        WithJacobian(lambda tree, chunk: chunk, 0)
    with pytest.raises(ValueError, match=r"queries '' must have at least 20 features, .* got shape \(1, 4, 16\)"):
        stream(WithJacobian(lambda tree, chunk: chunk, 20), cache, torch.randn(4, 16))
