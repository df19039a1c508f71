"""One page about a run of the suite, made of what its stages left; needs no torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .stages import PASSED, Outcome

SUMMARY, ENVIRONMENT, CASES = "summary.md", "environment.json", "cases.json"
SHOWN = ("device", "nvidia_smi", "torch", "torch_cuda", "commit", "library")
OURS = "anchor_attention"
NOT_MEASURED = "not measured"


def write_summary(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Writes the page and returns it. What a stage did not leave is said to be not measured."""
    page = "\n\n".join([_stages(outcomes), _environment(_load(folder / ENVIRONMENT)), _speed(_load(folder / CASES))])
    (folder / SUMMARY).write_text(page + "\n")
    return f"{page}\n\nResults: {folder}"


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _stages(outcomes: Sequence[Outcome]) -> str:
    failed = [outcome.name for outcome in outcomes if outcome.fails_suite]
    checks = [outcome for outcome in outcomes if outcome.decides]
    passed = sum(outcome.status == PASSED for outcome in checks)
    verdict = f"FAILED: {', '.join(failed)}" if failed else f"{passed} of {len(checks)} checks ran, and passed"
    lines = [f"# {verdict}", "", "| stage | result | s | of | last line |", "| --- | --- | --- | --- | --- |"]
    for outcome in outcomes:
        last = outcome.last_lines[-1].strip()[:90].replace("|", "¦") if outcome.last_lines else ""
        lines.append(
            f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} | {outcome.limit_seconds:.0f} | {last} |"
        )
    return "\n".join(lines)


def _environment(environment: dict[str, Any] | None) -> str:
    if environment is None:
        return f"Environment: {NOT_MEASURED}."
    return "\n".join(f"- {name}: {environment[name]}" for name in SHOWN if name in environment)


def _speed(records: list[dict[str, Any]] | None) -> str:
    measured = [record for record in records or [] if "failed" not in record]
    if not measured:
        return f"Speed: {NOT_MEASURED}."
    lines = [
        "Peers' times over ours: geometric mean (worst), and the best rate of ours.",
        "",
        "| level | dtype | pass | cases | peers | TFLOP/s | % of matrix product |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in dict.fromkeys((record["level"], record["dtype"], record["pass"]) for record in measured):
        chosen = [record for record in measured if (record["level"], record["dtype"], record["pass"]) == key]
        ratios: dict[str, list[float]] = {}
        for record in chosen:
            for name, (_, median, _) in record["time_relative_to_ours"].items():
                if name != OURS:
                    ratios.setdefault(name, []).append(median)
        peers = ", ".join(f"{name} {_mean(own):.2f} ({min(own):.2f})" for name, own in ratios.items())
        # The module's time holds more than what the operations of attention are counted for.
        rate, share = NOT_MEASURED, NOT_MEASURED
        if key[0] == "op":
            rates = [record["attention_flops"] / statistics.median(record["seconds"][OURS]) for record in chosen]
            rate = f"{max(rates) / 1e12:.1f}"
            share = f"{100 * max(record['ceilings']['matmul']['our_share'][1] for record in chosen):.0f}"
        lines.append(f"| {' | '.join(key)} | {len(chosen)} | {peers} | {rate} | {share} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))
