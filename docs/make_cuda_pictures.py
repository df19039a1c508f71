"""Draws the pictures of docs/cuda.md.

Usage: python docs/make_cuda_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle

from anchor_attention import KeyRangeTable

HERE = Path(__file__).parent
ROWS, COLUMNS = 128, 64
N_QUERIES, N_KEYS = 860, 640
TABLE = KeyRangeTable.from_ranges(
    [[0, 300], [0, 300], [300, 560], [620, 860], [620, 860], [620, 860]],
    [[0, 200], [400, 640], [200, 330], [0, 90], [200, 400], [520, 640]],
)
PADDED = range(440, 540)  # keys that the key mask leaves out
BLUE, TEAL, ORANGE, RED, GREY, PALE = "#2a6f97", "#468f7a", "#e09f3e", "#9e2a2b", "#8d99ae", "#eef1f4"


def tiles(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, end)) for first, end in ranges for begin in range(first, end, size)]


def draw_walk() -> None:
    """Which tiles the blocks of the forward visit: whole, cut by the end of a range, left out by the key mask."""
    figure, axis = plt.subplots(figsize=(9.2, 7.4), layout="constrained")
    axis.imshow(
        TABLE.to_dense(N_QUERIES, N_KEYS),
        cmap=ListedColormap([PALE, "#cfe0ea"]),
        interpolation="nearest",
        aspect="auto",
    )
    groups = list(TABLE.entries())
    covered = sorted((begin, end) for (begin, end), _ in groups)
    gaps = [
        (a, b)
        for a, b in zip([0] + [end for _, end in covered], [begin for begin, _ in covered] + [N_QUERIES], strict=True)
    ]
    entries = [*groups, *(((a, b), []) for a, b in gaps if a < b)]
    # Most work of an item first, as in the schedule.
    entries.sort(key=lambda entry: -sum(-(-(end - begin) // COLUMNS) for begin, end in entry[1]))
    item = 0
    for queries, keys in entries:
        for begin, end in tiles([queries], ROWS):
            axis.text(-12, (begin + end) / 2, f"block {item}", ha="right", va="center", fontsize=9)
            item += 1
            axis.plot([-8, N_KEYS], [end, end], color="white" if keys else GREY, linewidth=2 if keys else 0.6)
            for k_begin, k_end in tiles(list(keys), COLUMNS):
                masked = all(key in PADDED for key in range(k_begin, k_end))
                partly = any(key in PADDED for key in range(k_begin, k_end)) and not masked
                partial = k_end - k_begin < COLUMNS or partly or end - begin < ROWS
                color = GREY if masked else ORANGE if partial else BLUE
                axis.add_patch(
                    Rectangle(
                        (k_begin, begin), k_end - k_begin, end - begin, facecolor=color, edgecolor="white",
                        alpha=0.35 if masked else 0.85, hatch="xx" if masked else None,
                    )
                )  # fmt: skip
    axis.axvspan(PADDED.start, PADDED.stop, color=RED, alpha=0.12)
    axis.text((PADDED.start + PADDED.stop) / 2, -12, "masked keys", color=RED, ha="center", fontsize=9)
    legend = [
        Rectangle((0, 0), 1, 1, facecolor=BLUE, alpha=0.85, label="whole tile, 128 × 64"),
        Rectangle((0, 0), 1, 1, facecolor=ORANGE, alpha=0.85, label="cut by a group's or range's end, or by the mask"),
        Rectangle((0, 0), 1, 1, facecolor=GREY, alpha=0.4, hatch="xx", label="all masked: never loaded"),
    ]
    axis.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False, fontsize=9)
    axis.set(xlim=(0, N_KEYS), ylim=(N_QUERIES, -40), xlabel="keys")
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    figure.savefig(HERE / "cuda_walk.png", dpi=120)


def bar(axis: Axes, row: float, begin: float, length: float, color: str, text: str) -> None:
    axis.add_patch(Rectangle((begin, row - 0.36), length, 0.72, facecolor=color, edgecolor="white"))
    axis.text(begin + length / 2, row, text, ha="center", va="center", fontsize=8.5, color="white")


def timeline(axis: Axes, rows: list[str], end: float) -> None:
    axis.set(xlim=(0, end), ylim=(len(rows) - 0.4, -0.6))
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def draw_pipeline() -> None:
    """The forward's two stages: the copies of a tile run under the products of the tile before."""
    figure, axis = plt.subplots(figsize=(10.5, 2.9), layout="constrained")
    timeline(axis, ["copies\n(cp.async)", "matrix unit\n(mma.sync)", "other units"], 15.4)
    bar(axis, 0, 0, 1, TEAL, "K0")
    bar(axis, 0, 1, 1, TEAL, "V0")
    bar(axis, 2, 0, 1.6, GREY, "rotate q")
    for j in range(3):
        start = 2.2 + 4.4 * j
        if j < 2:
            bar(axis, 0, start, 1, TEAL, f"K{j + 1}")
            bar(axis, 0, start + 1, 1, TEAL, f"V{j + 1}")
        bar(axis, 1, start, 1.4, BLUE, f"S{j} = q K{j}ᵀ")
        bar(axis, 2, start + 1.4, 1.5, ORANGE, f"softmax {j}")
        bar(axis, 1, start + 2.9, 1.4, BLUE, f"out += P{j} V{j}")
        for x in (start - 0.06, start + 2.84):
            axis.axvline(x, color=RED, linewidth=1.2, ymin=0.02, ymax=0.98)
    axis.set_title(
        "red: wait for the copies and barrier; a second block of the multiprocessor fills what one leaves idle",
        fontsize=9, color=RED, loc="left",
    )  # fmt: skip
    figure.savefig(HERE / "cuda_pipeline.png", dpi=120)


def draw_turns() -> None:
    """The ordered sum over the splits of a key tile: they compute together and add one after the other."""
    figure, axis = plt.subplots(figsize=(10.5, 3.1), layout="constrained")
    timeline(axis, [f"split {i}" for i in range(4)], 14)
    ends = [6.2, 5.6, 7.6, 6.0]
    turn = 0.0
    for split, end in enumerate(ends):
        bar(axis, split, 0, end, BLUE, "its share of the queries: dK, dV in registers")
        begin = max(end, turn)
        if begin > end:
            axis.add_patch(Rectangle((end, split - 0.36), begin - end, 0.72, facecolor=PALE, edgecolor="white"))
            axis.text((begin + end) / 2, split, "wait", ha="center", va="center", fontsize=8, color=GREY)
        bar(axis, split, begin, 1.5, ORANGE if split < 3 else TEAL, "add, store" if split < 3 else "add, round")
        turn = begin + 1.5
        if split < 3:
            axis.add_patch(
                FancyArrowPatch(
                    (turn, split + 0.2), (max(ends[split + 1], turn), split + 0.72), color=RED, arrowstyle="-|>",
                    mutation_scale=9, connectionstyle="arc3,rad=-0.3",
                )
            )  # fmt: skip
            axis.text(turn + 0.15, split + 0.42, f"turn = {split + 1}", fontsize=8, color=RED)
    figure.savefig(HERE / "cuda_turns.png", dpi=120)


def draw_emulator() -> None:
    """From the kernels' source to a report: what ships and what the emulator does with it."""
    figure, axis = plt.subplots(figsize=(10.5, 3.4), layout="constrained")
    boxes = {
        "kernels\n*.cu": (0, 1.5, BLUE),
        "PTX\nas it ships": (2.3, 1.5, BLUE),
        "instructions\nrows of registers": (4.6, 1.5, TEAL),
        "warps\n32 lanes a step,\nseeded order": (7.0, 1.5, TEAL),
        "launch plan\ngrid, shared bytes,\nparameters": (2.3, 0, ORANGE),
        "NumPy arrays\npoisoned outputs": (4.6, 0, ORANGE),
        "results\nagainst float64": (9.4, 2.4, GREY),
        "races, poison,\nbounds, deadlocks\nwith source line": (9.4, 1.2, RED),
        "counters\nwavefronts, sectors,\nmma, exp2": (9.4, 0, GREY),
    }
    for text, (x, y, color) in boxes.items():
        axis.add_patch(Rectangle((x, y), 1.75, 0.9, facecolor=color, edgecolor="white"))
        axis.text(x + 0.875, y + 0.45, text, ha="center", va="center", fontsize=8.5, color="white")
    arrows = [
        ((1.75, 1.95), (2.3, 1.95), "nvcc"), ((4.05, 1.95), (4.6, 1.95), "lower"), ((6.35, 1.95), (7.0, 1.95), ""),
        ((4.05, 0.45), (4.6, 0.45), ""), ((6.35, 0.45), (7.6, 1.5), ""), ((8.75, 2.2), (9.4, 2.85), ""),
        ((8.75, 1.9), (9.4, 1.65), ""), ((8.75, 1.6), (9.4, 0.45), ""),
    ]  # fmt: skip
    for begin, end, label in arrows:
        axis.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=10, color="#555555"))
        axis.text(*(np.add(begin, end) / 2 + (0, 0.1)), label, ha="center", fontsize=8, color="#555555")
    axis.set(xlim=(-0.1, 11.3), ylim=(-0.15, 3.45))
    axis.axis("off")
    figure.savefig(HERE / "cuda_emulator.png", dpi=120)


if __name__ == "__main__":
    draw_walk()
    draw_pipeline()
    draw_turns()
    draw_emulator()
