"""Raw results to a markdown table: ``python -m benchmarks.report FOLDER``. Nothing here is typed by hand."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anchor_attention.benchmark.operation import FORWARD
from anchor_attention.benchmark.peers import OURS
from anchor_attention.benchmark.timing import quartiles

from .cases import FLEX_ATTENTION, LEVELS, MATMUL, MATMUL_SIZE, MODULE, OPERATION, REGISTERS
from .plots import plot_all
from .workloads import CPU, PATTERNS

CASES, CEILINGS, ENVIRONMENT, SCALING = "cases.json", "ceilings.json", "environment.json", "scaling.json"
TABLE = "table.md"
WORKLOADS = [workload.name for workload in CPU]
NOT_MEASURED = "not measured"
RATIO_PEERS = ("eager", "sdpa_per_pattern", "dense_mask", FLEX_ATTENTION)
PASS_NAMES = {FORWARD: "forward", "forward_backward": "forward + backward"}
CEILING_NAMES = {MATMUL: "matrix product", REGISTERS: "multiply-adds on registers"}
LEVEL_NAMES = {
    MODULE: "Module: projections, RoPE, attention, output projection",
    OPERATION: "Operation: attention alone, without RoPE, from strided q, k and v",
}


def load(folder: Path, name: str) -> Any:
    """A result file's content, ``None`` where there is none."""
    path = folder / name
    return json.loads(path.read_text()) if path.is_file() else None


def load_cases(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The environment and the cases of a folder.

    Raises:
        FileNotFoundError: If one of them is missing.
    """
    environment, records = load(folder, ENVIRONMENT), load(folder, CASES)
    if environment is None or records is None:
        raise FileNotFoundError(f"{folder} must hold {ENVIRONMENT} and {CASES}")
    return environment, records


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of at least one positive value."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def markdown(environment: dict[str, Any], records: Sequence[dict[str, Any]], ceilings: dict[str, Any] | None) -> str:
    """The whole page."""
    sections = [_head(environment, records), _summary(records)]
    if ceilings is not None:
        sections.append(_ceilings(ceilings) + _shares(records))
    sections += [_level(level, records) for level in LEVELS if any(record["level"] == level for record in records)]
    return "\n\n".join(sections) + "\n"


def write_report(folder: Path) -> None:
    """Makes the table and the plots of a folder from its raw files.

    Raises:
        FileNotFoundError: If the folder holds no cases or no environment.
    """
    environment, records = load_cases(folder)
    records.sort(key=lambda record: [WORKLOADS.index(record["workload"]), PATTERNS.index(record["pattern"])])
    (folder / TABLE).write_text(markdown(environment, records, load(folder, CEILINGS)))
    plot_all(folder, environment, records, load(folder, SCALING))


def _head(environment: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    extensions = ", ".join(environment["vector_extensions"]) or "none known"
    commits = dict.fromkeys(record["commit"] for record in records)
    rounds = sorted({len(own) for record in records for own in record["seconds"].values()})
    return (
        f"# {environment['device']}\n\n"
        f"{environment['threads']} threads on {environment['cores']} cores ({extensions}); "
        f"kernels for {environment['instruction_sets']['selected']}; torch {environment['torch']}, float32 matrix "
        f"products at precision {environment['float32_matmul_precision']!r}; commit {', '.join(commits)}. "
        f"{len(records)} of {environment['planned_cases']} planned cases measured.\n\n"
        f"Each number × is a peer's time divided by ours: the median over {'/'.join(map(str, rounds))} rounds of the "
        "ratios within a round, with its quartiles. Above 1 we are faster; **bold** marks what we lose. Inputs are new "
        "in each round and gradients fresh. Times in ms are medians, for orientation only: the clock moves. Errors are "
        "‖result − exact‖ / ‖exact‖ against float64 on the same inputs: of the output, and the worst of the gradients. "
        "Memory is the process's peak above its inputs and weights, outputs and gradients included."
    )


def _summary(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for level in LEVELS:
        for dtype in dict.fromkeys(record["dtype"] for record in records):
            for passes in PASS_NAMES:
                chosen = [r for r in records if (r["level"], r["dtype"], r["pass"]) == (level, dtype, passes)]
                for peer in RATIO_PEERS:
                    medians = {
                        f"{r['workload']} {r['pattern']}": r["time_relative_to_ours"][peer][1]
                        for r in chosen
                        if peer in r["time_relative_to_ours"]
                    }
                    if medians:
                        worst = min(medians, key=lambda case: medians[case])
                        lost = sum(ratio < 1 for ratio in medians.values())
                        rows.append(
                            [
                                level,
                                dtype,
                                PASS_NAMES[passes],
                                peer,
                                _ratio_text(geometric_mean(medians.values())),
                                f"{_ratio_text(medians[worst])} ({worst})",
                                str(len(medians)),
                                f"**{lost}**" if lost else "0",
                            ]
                        )
    header = ["level", "dtype", "pass", "peer", "× geometric mean", "× worst case", "cases", "lost"]
    return "## Summary\n\n" + markdown_table(header, rows) + _memory_summary(records)


def _memory_summary(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    measured = [record for record in records if _peak(record, OURS)]
    for level, dtype, passes in dict.fromkeys((r["level"], r["dtype"], r["pass"]) for r in measured):
        for peer in RATIO_PEERS:
            shares = [
                _peak(record, OURS) / _peak(record, peer)
                for record in measured
                if (record["level"], record["dtype"], record["pass"]) == (level, dtype, passes) and _peak(record, peer)
            ]
            if shares:
                cells = (f"{share:.2f}" for share in (geometric_mean(shares), min(shares), max(shares)))
                rows.append([level, dtype, PASS_NAMES[passes], peer, *cells, str(len(shares))])
    if not rows:
        return ""
    header = ["level", "dtype", "pass", "peer", "geometric mean", "least", "most", "cases"]
    return "\n\nOur peak memory as a share of the peer's:\n\n" + markdown_table(header, rows)


def _ceilings(ceilings: dict[str, Any]) -> str:
    rows = []
    for name, values in ceilings.items():
        if name == "not_measured":
            rows += [[missing, NOT_MEASURED, reason] for missing, reason in values.items()]
        else:
            rows.append([name, f"{values[1]:.0f}", f"{values[0]:.0f} – {values[2]:.0f}"])
    return (
        "## Rates of the machine\n\nLarge matrix products of torch, and fused multiply-adds that never leave the "
        "registers, in the same rounds, all threads.\n\n" + markdown_table(["what", "GFLOP/s", "quartiles"], rows)
    )


def _shares(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    operations = [record for record in records if record["level"] == OPERATION]
    for dtype, passes in dict.fromkeys((record["dtype"], record["pass"]) for record in operations):
        for ceiling in CEILING_NAMES:
            shares = [
                100 * record["ceilings"][ceiling]["our_share"][1]
                for record in operations
                if (record["dtype"], record["pass"]) == (dtype, passes) and ceiling in record["ceilings"]
            ]
            if shares:
                cells = (f"{share:.0f}" for share in (geometric_mean(shares), min(shares), max(shares)))
                rows.append([dtype, PASS_NAMES[passes], CEILING_NAMES[ceiling], *cells])
    if not rows:
        return ""
    return (
        "\n\nWhat the operation reaches of these rates, taken in its own rounds (matrix products of "
        f"{MATMUL_SIZE} × {MATMUL_SIZE}), over its workloads:\n\n"
        + markdown_table(["dtype", "pass", "of", "% geometric mean", "% least", "% most"], rows)
    )


def _level(level: str, records: Sequence[dict[str, Any]]) -> str:
    chosen = [record for record in records if record["level"] == level]
    peers = [peer for peer in RATIO_PEERS if any(peer in r["seconds"] or peer in r["not_supported"] for r in chosen)]
    header = ["workload", "pattern", "dtype", "pass", "ms"]
    if level == OPERATION:
        header += ["GFLOP/s", *(f"% of {name}" for name in CEILING_NAMES)]
    header += [f"× {peer}" for peer in peers]
    compiled = [peer for peer in peers if peer == FLEX_ATTENTION]
    header += [f"{peer}: s to mask and compile" for peer in compiled]
    header += ["error: ours", "eager", "sdpa_per_pattern", "peak MiB: ours", "eager", "sdpa_per_pattern"]
    rows = []
    for record in chosen:
        seconds = quartiles(record["seconds"][OURS]).median
        row = [record["workload"], record["pattern"], record["dtype"], PASS_NAMES[record["pass"]]]
        row.append(f"{seconds * 1e3:.1f}")
        if level == OPERATION:
            row.append(f"{record['attention_flops'] / seconds / 1e9:.0f}")
            row += [_share(record, ceiling) for ceiling in CEILING_NAMES]
        row += [ratio_cell(record, peer) for peer in peers]
        row += [f"{record['ready_seconds'][peer]:.1f}" if peer in record["seconds"] else "" for peer in compiled]
        row += [error_cell(record, name) for name in (OURS, "eager", "sdpa_per_pattern")]
        row += [memory_cell(record, name) for name in (OURS, "eager", "sdpa_per_pattern")]
        rows.append(row)
    missing = sorted({(peer, why) for record in chosen for peer, why in record["not_supported"].items()})
    notes = "".join(f"\n- {peer}: {why}" for peer, why in missing)
    return (
        f"## {LEVEL_NAMES[level]}\n\n" + markdown_table(header, rows) + (f"\n\nNot measured:\n{notes}" if notes else "")
    )


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def ratio_cell(record: dict[str, Any], peer: str) -> str:
    """A peer's time over ours, with its quartiles."""
    if peer not in record["time_relative_to_ours"]:
        return NOT_MEASURED
    lower, median, upper = record["time_relative_to_ours"][peer]
    return f"{_ratio_text(median)} ({lower:.2f} – {upper:.2f})"


def _share(record: dict[str, Any], ceiling: str) -> str:
    measured = record["ceilings"].get(ceiling)
    return f"{measured['our_share'][1] * 100:.0f}" if measured else NOT_MEASURED


def error_cell(record: dict[str, Any], name: str) -> str:
    """Errors of the output and the worst of the gradients."""
    errors = record.get("relative_error", {}).get(name)
    return " / ".join(f"{error:.1e}" for error in errors.values()) if errors else NOT_MEASURED


def memory_cell(record: dict[str, Any], name: str) -> str:
    """Peak in MiB."""
    peak = record.get("peak_bytes", {}).get(name)
    return f"{peak / 2**20:.1f}" if isinstance(peak, int) else NOT_MEASURED


def _peak(record: dict[str, Any], name: str) -> int:
    """Bytes, 0 where nothing was measured: a text says why."""
    peak = record.get("peak_bytes", {}).get(name)
    return peak if isinstance(peak, int) else 0


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + " --- |" * len(header))
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    command.add_argument("folder", type=Path, help="a folder of raw results")
    arguments = command.parse_args()
    write_report(arguments.folder)


if __name__ == "__main__":
    main()
