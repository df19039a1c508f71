"""Draws docs/patterns.png: the three anchor patterns as matrices of who reads whom.

Usage: python docs/make_pictures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from anchor_attention import AttentionPattern, KeyRangeTable, TokenSpec

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


def main() -> None:
    """Writes the picture beside this file."""
    n_tokens = sum(spec.size or 0 for spec in SPECS)
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.1), sharey=True, layout="constrained")
    for panel, (title, patterns) in zip(panels, PATTERNS.items(), strict=True):
        mask = KeyRangeTable.from_patterns(SPECS, patterns).to_dense(n_tokens, n_tokens)
        panel.imshow(mask, cmap=ListedColormap(["#eef1f4", "#2a6f97"]), interpolation="nearest")
        begin = 0
        middles = []
        for spec in SPECS:
            end = begin + (spec.size or 0)
            middles.append((begin + end - 1) / 2)
            for draw in (panel.axhline, panel.axvline):
                draw(end - 0.5, color="white", linewidth=2)
            begin = end
        names = [spec.name.replace("_", "\n") for spec in SPECS]
        panel.set_xticks(middles, names, fontsize=8)
        panel.set_yticks(middles, names, fontsize=8)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("keys")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("queries")
    figure.savefig(Path(__file__).with_name("patterns.png"), dpi=130)


if __name__ == "__main__":
    main()
