"""The README: its examples run, its links lead somewhere, its figures are those of the committed raw files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks import readme

from tests.docs.test_docs import python_blocks, run_examples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_run() -> None:
    assert python_blocks(README)
    run_examples(ROOT / "README.md")


def test_tables_come_from_the_raw_files() -> None:
    assert readme.with_tables(README) == README, "run python -m benchmarks.readme"


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert path.startswith("http") or (ROOT / path).exists()


def test_figures_of_the_example_come_from_its_raw_files() -> None:
    flat = " ".join(README.split())
    for mode, pattern in {
        "short": r"within ([\d.]+) % and the velocity around the body within ([\d.]+) %",
        "full": r"a larger model reaches ([\d.]+) % and ([\d.]+) %",
    }.items():
        metrics = json.loads((ROOT / "examples" / "airfoil" / "results" / mode / "metrics.json").read_text())
        errors = metrics["relative_l2_error_unseen"]
        expected = tuple(f"{100 * errors[name]['model']['mean']:.1f}" for name in ("pressure", "velocity"))
        assert re.search(pattern, flat).groups() == expected
