"""The README's tables from the committed raw results: ``python -m benchmarks.readme``. Nothing there is typed by hand.

Every folder of `benchmarks/results` that holds cases or whole models, of whatever machine and instruction set, gets one
small table: the whole model first, then a single attention module.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anchor_attention.benchmark.operation import FORWARD, FORWARD_BACKWARD
from anchor_attention.benchmark.timing import ratios

from .cases import MODULE
from .report import CASES, ENVIRONMENT, geometric_mean, load, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "README.md"
MARKERS = ("<!-- gains: begin -->", "<!-- gains: end -->")
MODELS = "noether_models.json"
COLUMNS = {FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"}
PEERS = {"eager": "PyTorch, group by group", "sdpa_per_pattern": "PyTorch, no needless copy"}


def folders() -> list[Path]:
    """Folders of results of whole models or of cases, the ones with both first."""
    found = {path.parent for name in (CASES, MODELS) for path in RESULTS.rglob(name)}
    return sorted((path for path in found if load(path, ENVIRONMENT) or load(path, MODELS)), key=_rank)


def _rank(folder: Path) -> tuple[bool, bool, str]:
    return load(folder, MODELS) is None, load(folder, CASES) is None, str(folder)


def tables() -> str:
    """All tables, as markdown."""
    return "\n\n".join(table(folder) for folder in folders())


def table(folder: Path) -> str:
    """The table of one folder: how many times faster, geometric mean over the cases and the worst of them."""
    models, cases = load(folder, MODELS), load(folder, CASES)
    environment = load(folder, ENVIRONMENT) if models is None else models["environment"]
    rows = []
    for dtype in ("float32", "bfloat16"):
        records = [r for r in (models or {}).get("records", ()) if (dtype == "bfloat16") == ("bfloat16" in r["name"])]
        rows += [_model_row(dtype, records)] * bool(records)
    for dtype in ("float32", "bfloat16"):
        records = [record for record in cases or () if (record["level"], record["dtype"]) == (MODULE, dtype)]
        rows += [_module_row(dtype, peer, records) for peer in PEERS if records]
    family, model, _ = environment["family_model_stepping"]
    head = (
        f"**{environment['device']}** (family {family}, model {model}), {environment['threads']} threads, kernels for "
        f"`{environment['instruction_sets']['selected']}`, torch {environment['torch']}\n"
        f"([raw](benchmarks/results/{folder.relative_to(RESULTS)}))"
    )
    return head + "\n\n" + markdown_table(["", "instead of", *COLUMNS.values()], rows)


def _model_row(dtype: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Whole models before and after ``accelerate``."""
    speedups = [
        [ratios(*(record["seconds"][name][key] for key in ("before", "after")))[1] for record in records]
        for name in COLUMNS.values()
    ]
    variants = f"{len(records)} variant{'s' if len(records) > 1 else ''}"
    return [f"whole AB-UPT model, {dtype}, {variants}", "the package `noether`", *map(_cell, speedups)]


def _module_row(dtype: str, peer: str, records: Iterable[dict[str, Any]]) -> list[str]:
    medians: dict[str, list[float]] = {passes: [] for passes in COLUMNS}
    for record in records:
        medians[record["pass"]].append(record["time_relative_to_ours"][peer][1])
    return [f"attention module, {dtype}", PEERS[peer], *map(_cell, medians.values())]


def _cell(speedups: Sequence[float]) -> str:
    return f"{geometric_mean(speedups):.2f} × (least {min(speedups):.2f})" if speedups else "not measured"


def with_tables(page: str) -> str:
    """The text of a page with the tables between its markers.

    Raises:
        ValueError: If the page lacks the markers.
    """
    before, begin, rest = page.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise ValueError(f"the page must hold {MARKERS[0]!r} and, behind it, {MARKERS[1]!r}")
    return f"{before}{begin}\n{tables()}\n{end}{after}"


def main() -> None:
    """Rewrites the README's tables."""
    argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__).parse_args()
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
