"""Makes what stream_queries needs: a model compiled ahead of time, points, and the fields that Python gets for them.

Usage: python export_model.py DIRECTORY [--points N]

The model is the decoder of an anchored-branch transformer. Its anchors were encoded once; their keys and values are
constants of the package, and the program that runs it sees points in and fields out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from anchor_attention import CrossAnchorAttention, RopeFrequency, TokenSpec

POINT_FEATURES, FIELDS = 3, 4
DIM, HEADS, ANCHORS = 96, 3, 64


class PointDecoder(torch.nn.Module):
    """Predicts fields at surface points from the cached anchors of the volume: (1, n, 3) → (1, n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.rope = RopeFrequency(hidden_dim=DIM // HEADS, input_dim=POINT_FEATURES)
        self.embed = torch.nn.Linear(POINT_FEATURES, DIM)
        self.attention = CrossAnchorAttention(dim=DIM, num_heads=HEADS, branches=("surface", "volume"), use_rope=True)
        self.predict = torch.nn.Linear(DIM, FIELDS)

    @torch.no_grad()
    def encode(self, surface: torch.Tensor, volume: torch.Tensor) -> None:
        """Keeps the keys and values of the anchors at the points (1, n, 3) of the two branches."""
        positions = torch.cat((surface, volume), dim=1)
        specs = [TokenSpec("surface_anchors", surface.shape[1]), TokenSpec("volume_anchors", volume.shape[1])]
        _, cache = self.attention(self.embed(positions), specs, self.rope(positions), return_kv_cache=True)
        for name, entry in cache.items():
            for kind, tensor in entry.items():
                self.register_buffer(f"{name}_{kind}", tensor)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Predicts the fields at the points (1, n, 3)."""
        cache = {
            name: {kind: getattr(self, f"{name}_{kind}") for kind in ("k", "v")}
            for name in ("surface_anchors", "volume_anchors")
        }
        specs = [
            TokenSpec("surface_anchors", None),
            TokenSpec("surface_queries", points.shape[1]),
            TokenSpec("volume_anchors", None),
        ]
        x = self.embed(points)
        return self.predict(x + self.attention(x, specs, self.rope(points), kv_cache=cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--points", type=int, default=100_000)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    decoder = PointDecoder().eval()
    decoder.encode(torch.rand(1, ANCHORS, POINT_FEATURES), torch.rand(1, ANCHORS, POINT_FEATURES))
    points = torch.rand(1, arguments.points, POINT_FEATURES)
    with torch.no_grad():
        program = torch.export.export(decoder, (points[:, :7],), dynamic_shapes=({1: torch.export.Dim("n_points")},))
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(arguments.directory / "decoder.pt2"),
            inductor_configs={"aot_inductor.metadata": {"point_features": str(POINT_FEATURES)}},
        )
        fields = decoder(points)
    points.numpy().tofile(arguments.directory / "points.f32")
    fields.numpy().tofile(arguments.directory / "fields_of_python.f32")
    print(package)


if __name__ == "__main__":
    main()
