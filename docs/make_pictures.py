"""Draws the pictures of the documentation: matrices of who reads whom.

Usage: python docs/make_pictures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from anchor_attention import AttentionPattern, KeyRangeTable, TokenSpec

FOLDER = Path(__file__).parent
SPECS = [
    TokenSpec("surface_anchors", 8),
    TokenSpec("surface_queries", 14),
    TokenSpec("volume_anchors", 6),
    TokenSpec("volume_queries", 18),
]
SURFACE, VOLUME = ["surface_anchors", "surface_queries"], ["volume_anchors", "volume_queries"]
PATTERNS = {
    "Self: own anchors": [
        AttentionPattern(SURFACE, ["surface_anchors"]),
        AttentionPattern(VOLUME, ["volume_anchors"]),
    ],
    "Cross: the others' anchors": [
        AttentionPattern(SURFACE, ["volume_anchors"]),
        AttentionPattern(VOLUME, ["surface_anchors"]),
    ],
    "Joint: all anchors": [AttentionPattern(SURFACE + VOLUME, ["surface_anchors", "volume_anchors"])],
}

# Name and size of the groups on the axis of the queries and on that of the keys.
Groups = Sequence[tuple[str, int]]


def draw(panel: Axes, title: str, table: KeyRangeTable, queries: Groups, keys: Groups) -> None:
    """Draws a table on two axes of named groups."""
    n_queries, n_keys = (sum(size for _, size in groups) for groups in (queries, keys))
    panel.imshow(
        table.to_dense(n_queries, n_keys),
        cmap=ListedColormap(["#eef1f4", "#2a6f97"]),
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    for groups, line, ticks in ((queries, panel.axhline, panel.set_yticks), (keys, panel.axvline, panel.set_xticks)):
        begin = 0
        middles = []
        for _, size in groups:
            line(begin + size - 0.5, color="white", linewidth=2)
            middles.append(begin + (size - 1) / 2)
            begin += size
        ticks(middles, [name.replace("_", "\n") for name, _ in groups], fontsize=8)
    panel.set_title(title, fontsize=11)
    panel.set_xlabel("keys")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def draw_patterns() -> None:
    """The patterns of the branch modules."""
    groups = [(spec.name, spec.size or 0) for spec in SPECS]
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.1), sharey=True, layout="constrained")
    for panel, (title, patterns) in zip(panels, PATTERNS.items(), strict=True):
        draw(panel, title, KeyRangeTable.from_patterns(SPECS, patterns), groups, groups)
    panels[0].set_ylabel("queries")
    figure.savefig(FOLDER / "patterns.png", dpi=130)


def draw_tables() -> None:
    """Tables whose queries and keys are on axes of their own."""
    read = KeyRangeTable.from_ranges([[0, 22], [22, 46]], [[0, 8], [8, 14]])
    groups = [(spec.name, spec.size or 0) for spec in SPECS]
    anchors = [("surface_anchors", 8), ("volume_anchors", 6)]
    cached = KeyRangeTable.from_ranges([[0, 14], [14, 32], [14, 32]], [[0, 8], [0, 8], [8, 14]])
    packed = KeyRangeTable.from_cu_seqlens([0, 12, 17, 35], [0, 4, 10, 14])
    samples = [("sample_a", 12), ("sample_b", 5), ("sample_c", 18)]
    figure, panels = plt.subplots(1, 3, figsize=(9, 4.6), layout="constrained")
    draw(panels[0], "Only what is read is a key", read, groups, anchors)
    draw(panels[1], "Queries against a cache", cached, [("surface_queries", 14), ("volume_queries", 18)], anchors)
    draw(panels[2], "Samples on one axis", packed, samples, [("a", 4), ("b", 6), ("c", 4)])
    panels[0].set_ylabel("queries")
    figure.savefig(FOLDER / "tables.png", dpi=130)


if __name__ == "__main__":
    draw_patterns()
    draw_tables()
