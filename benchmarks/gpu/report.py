"""Raw results to a markdown table and plots: ``python -m benchmarks.gpu.report FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor_attention.benchmark.peers import OURS
from anchor_attention.benchmark.timing import quartiles

from ..cases import FLEX_ATTENTION, LEVELS, MATMUL, OPERATION
from ..report import (
    LEVEL_NAMES,
    NOT_MEASURED,
    PASS_NAMES,
    TABLE,
    error_cell,
    load_cases,
    markdown_table,
    memory_cell,
    ratio_cell,
)

PLOTTED_PEERS = ("eager", "sdpa_per_pattern")


def markdown(environment: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    measured = [record for record in records if "failed" not in record]
    rounds = sorted({len(own) for record in measured for own in record["seconds"].values()})
    driver = environment.get("nvidia_smi", {}).get("driver_version", "none")
    sections = [
        f"# {environment['device']}\n\ndriver {driver}; CUDA {environment['torch_cuda']}; torch "
        f"{environment['torch']}, float32 matrix products at precision {environment['float32_matmul_precision']!r}; "
        f"commit {environment['commit']}; library {environment['library']['sha256'][:16]}.\n\n"
        "Each number × is a peer's time divided by ours: the median of the ratios within a round, with its quartiles, "
        f"over {'/'.join(map(str, rounds)) or 'no'} rounds. Above 1 we are faster; **bold** marks what we lose. Before "
        "each call the level-2 cache is flushed; three sets of inputs take turns; gradients are fresh. % is of a large "
        "matrix product in the same dtype and the same rounds. Errors are ‖result − exact‖ / ‖exact‖ against float64 "
        "on a sixteenth of the tokens: of the output, and the worst of the gradients. Memory is the allocator's peak "
        "above the inputs."
    ]
    sections += [_level(level, [r for r in measured if r["level"] == level]) for level in LEVELS]
    failed = [
        f"- {r['level']} {r['workload']} {r['pattern']} {r['dtype']} {r['pass']}: {r['failed']}"
        for r in records
        if "failed" in r
    ]
    if failed:
        sections.append("## Failed\n\n" + "\n".join(failed))
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(folder: Path) -> None:
    """Makes the table and the plots of a folder from its raw files.

    Raises:
        FileNotFoundError: If the folder holds no cases or no environment.
    """
    environment, records = load_cases(folder)
    (folder / TABLE).write_text(markdown(environment, records))
    plotted = [
        record for record in records if all(peer in record.get("time_relative_to_ours", {}) for peer in PLOTTED_PEERS)
    ]
    if plotted:
        # The table is there first: a machine may lack what draws.
        from ..plots import plot_all

        plot_all(folder, environment, plotted, None)


def _level(level: str, records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return ""
    names = dict.fromkeys(name for r in records for name in (*r["seconds"], *r["not_supported"]) if name != OURS)
    header = ["workload", "pattern", "dtype", "pass", "ms"]
    header += ["TFLOP/s", "% of matrix product"] if level == OPERATION else []
    header += [f"× {name}" for name in names]
    header += ["flex_attention: s to mask and compile"] if FLEX_ATTENTION in names else []
    header += ["error: ours", *PLOTTED_PEERS, "peak MiB: ours", *PLOTTED_PEERS]
    rows = []
    for record in records:
        seconds = quartiles(record["seconds"][OURS]).median
        row = [record["workload"], record["pattern"], record["dtype"], PASS_NAMES[record["pass"]]]
        row.append(f"{seconds * 1e3:.3f}")
        if level == OPERATION:
            share = record["ceilings"][MATMUL]["our_share"][1]
            row += [f"{record['attention_flops'] / seconds / 1e12:.1f}", f"{100 * share:.0f}"]
        row += [ratio_cell(record, name) for name in names]
        if FLEX_ATTENTION in names:
            ready = record["ready_seconds"].get(FLEX_ATTENTION)
            row.append(NOT_MEASURED if ready is None else f"{ready:.1f}")
        row += [error_cell(record, name) for name in (OURS, *PLOTTED_PEERS)]
        row += [memory_cell(record, name) for name in (OURS, *PLOTTED_PEERS)]
        rows.append(row)
    missing = sorted({(name, why) for record in records for name, why in record["not_supported"].items()})
    notes = "".join(f"\n- {name}: {why}" for name, why in missing)
    return (
        f"## {LEVEL_NAMES[level]}\n\n" + markdown_table(header, rows) + (f"\n\nNot measured:\n{notes}" if notes else "")
    )


def main() -> None:
    """Runs the command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    command.add_argument("folder", type=Path, help="a folder of raw results")
    write_report(command.parse_args().folder)


if __name__ == "__main__":
    main()
