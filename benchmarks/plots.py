"""Pictures of the raw results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from anchor_attention.benchmark.peers import OURS
from anchor_attention.benchmark.timing import quartiles

from .cases import MODULE

COLORS = {OURS: "#d1495b", "eager": "#8d99ae", "sdpa_per_pattern": "#30638e"}
PEERS = ("eager", "sdpa_per_pattern")


def plot_all(
    folder: Path, environment: dict[str, Any], records: Sequence[dict[str, Any]], scaling: dict[str, Any] | None
) -> None:
    """Writes the PNG files of a folder."""
    title = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    for level in dict.fromkeys(record["level"] for record in records):
        _speedups(folder / f"{level}_speedup.png", title, level, [r for r in records if r["level"] == level])
    if scaling is not None:
        _queries(folder / "time_against_queries.png", title, scaling["queries"])
        _threads(folder / "time_against_threads.png", title, scaling["threads"])


def _speedups(path: Path, title: str, level: str, records: Sequence[dict[str, Any]]) -> None:
    panels = sorted({(r["dtype"], r["pass"]) for r in records}, key=lambda panel: (panel[0] != "float32", panel[1]))
    cases = list(dict.fromkeys((r["workload"], r["pattern"]) for r in records))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 1.5 + 0.32 * len(cases)), sharey=True, squeeze=False
    )
    for axis, (dtype, passes) in zip(axes[0], panels, strict=True):
        for offset, peer in zip((-0.18, 0.18), PEERS, strict=True):
            for y, case in enumerate(cases):
                found = [
                    r["time_relative_to_ours"][peer]
                    for r in records
                    if (r["workload"], r["pattern"], r["dtype"], r["pass"]) == (*case, dtype, passes)
                ]
                if found:
                    lower, median, upper = found[0]
                    errors = [[max(0.0, median - lower)], [max(0.0, upper - median)]]
                    axis.barh(y + offset, median - 1, 0.34, left=1, xerr=errors, color=COLORS[peer], label=peer)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{dtype}, {passes.replace('_', ' + ')}", fontsize=9)
        axis.set_xlabel("peer's time / ours")
    axes[0][0].set_yticks(range(len(cases)), [" ".join(case) for case in cases], fontsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[0][-1].legend(unique.values(), unique.keys(), fontsize=8, loc="lower right")
    name = "module" if level == MODULE else "operation"
    figure.suptitle(f"Speed of the {name} over its peers: medians and quartiles\n{title}", fontsize=10)
    _save(figure, path)


def _queries(path: Path, title: str, scaling: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(6, 4.2))
    counts = [point["queries"] for point in scaling["points"]]
    for name in scaling["points"][0]["seconds"]:
        medians = [quartiles(point["seconds"][name]).median * 1e3 for point in scaling["points"]]
        axis.loglog(counts, medians, "o-", color=COLORS[name], label=name, base=2)
    axis.set_xlabel("queries")
    axis.set_ylabel("ms")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    axis.set_title(f"Forward, float32, {scaling['anchors']} anchors\n{title}", fontsize=9)
    _save(figure, path)


def _threads(path: Path, title: str, scaling: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, len(scaling["passes"]), figsize=(9, 4), squeeze=False)
    for axis, (passes, seconds) in zip(axes[0], scaling["passes"].items(), strict=True):
        for name in scaling["contestants"]:
            medians = [quartiles(seconds[f"{name} {threads}"]).median * 1e3 for threads in scaling["threads"]]
            axis.plot(scaling["threads"], medians, "o-", color=COLORS[name], label=name)
        _ideal(axis, scaling["threads"], quartiles(seconds[f"{OURS} 1"]).median * 1e3)
        axis.set_xticks(scaling["threads"])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("threads")
        axis.set_ylabel("ms")
        axis.set_title(passes.replace("_", " + "), fontsize=9)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{scaling['workload']}, joint, float32, operation\n{title}", fontsize=10)
    _save(figure, path)


def _ideal(axis: Axes, threads: Sequence[int], alone: float) -> None:
    axis.plot(threads, [alone / count for count in threads], ":", color=COLORS[OURS], label="ours, perfectly shared")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
