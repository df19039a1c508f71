"""Writes the results of README.md from the files in ``results``: no figure is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = {
    "short": "`run.py`, the default",
    "full": "`run.py --full --steps 4500 --threads 1`",
}
HEADING = "## Results\n"
# What stands between the two lines is the table of run_derivatives.py.
TABLE_BEGINS, TABLE_ENDS = "<!-- derivatives.md -->\n", "<!-- end of derivatives.md -->\n"
BASELINES = {
    "nearest_shape": "nearest training shape",
    "training_mean": "training mean",
}


def results_section(metrics: dict[str, dict[str, Any]]) -> str:
    """Returns the section, heading included, for the metrics by mode."""
    data = next(iter(metrics.values()))["data"]
    angles = ", ".join(f"{angle:g}°" for angle in data["test_angles"])
    lines = [
        HEADING,
        f"Relative L2 error, mean over {data['unseen_shapes']} unseen airfoils × angles of attack {angles} (median and",
        "worst case in brackets); velocity is the whole velocity, free stream included.",
        "",
        "| | pressure coefficient | velocity |",
        "|---|---|---|",
    ]
    tables = {mode: those["relative_l2_error_unseen"] for mode, those in metrics.items()}
    rows = [(f"the model, {mode} run", tables[mode], "model") for mode in metrics]
    # The baselines don't depend on the run.
    rows += [(name, tables["full"], method) for method, name in BASELINES.items()]
    for name, table, method in rows:
        cells = (table[quantity][method] for quantity in ("pressure", "velocity"))
        columns = (f"{cell['mean']:.2%} ({cell['median']:.2%}, {cell['worst']:.2%})" for cell in cells)
        lines.append(f"| {name} | {' | '.join(columns)} |")
    lines += [
        "",
    ]
    for mode, those in metrics.items():
        training, environment, fields = those["training"], those["environment"], those["streaming"]
        training_threads = environment.get("training_threads", environment["threads"])
        slowest = min(field["points_per_second"] for field in fields)
        lines += [
            f"**{mode.capitalize()} run** ([metrics](results/{mode}/metrics.json)), {RUNS[mode]}:",
            f"{training['parameters']:,} parameters, {training['steps']:,} steps in {training['seconds']:.0f} s,",
            f"{environment['total_seconds']:.0f} s with evaluation and pictures; threads:",
            f"{training_threads} in training, {environment['threads']} after it",
            f"({environment.get('processor', environment['machine'])}, "
            f"{environment.get('instruction_set', 'instruction set not recorded')}, torch {environment['torch']}).",
            f"Streaming: {fields[0]['query_points']:,} points around an airfoil, at {slowest:,.0f} per second or more.",
            "",
        ]
    for mode in metrics:
        for picture in sorted((HERE / "results" / mode).glob("*.png")):
            lines.append(f"![{picture.stem} case of the {mode} run](results/{mode}/{picture.name})")
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = HERE / "README.md"
    metrics = {mode: json.loads((HERE / "results" / mode / "metrics.json").read_text()) for mode in RUNS}
    introduction = readme.read_text().split(HEADING)[0]
    before, after = introduction.split(TABLE_BEGINS)[0], introduction.split(TABLE_ENDS)[1]
    table = (HERE / "results" / "derivatives" / "derivatives.md").read_text()
    readme.write_text(before + TABLE_BEGINS + table + TABLE_ENDS + after + results_section(metrics))


if __name__ == "__main__":
    main()
