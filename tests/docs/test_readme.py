"""Every Python example of the README runs, in order, in one namespace; every path that it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.test_docs import python_blocks, run_examples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(python_blocks(README)) >= 5
    run_examples(ROOT / "README.md")
    assert "█" in capsys.readouterr().out


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert path.startswith("http") or (ROOT / path).exists()


def test_figures_of_the_example_come_from_its_raw_files() -> None:
    flat = " ".join(README.split())
    for mode, pattern in {
        "short": r"within ([\d.]+) % and the velocity around the body within ([\d.]+) %",
        "full": r"half an hour reaches ([\d.]+) % and ([\d.]+) %",
    }.items():
        metrics = json.loads((ROOT / "examples" / "airfoil" / "results" / mode / "metrics.json").read_text())
        errors = metrics["relative_l2_error_unseen"]
        expected = tuple(f"{100 * errors[name]['model']['mean']:.1f}" for name in ("pressure", "velocity"))
        assert re.search(pattern, flat).groups() == expected


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"(?:^|`)make ([a-z0-9 -]+?)(?:`|  )", README, flags=re.M)
    targets = {name for command in commands for name in command.split()}
    assert {"demo", "test", "lint"} <= targets
    for name in targets:
        assert re.search(rf"^{name}:", makefile, flags=re.M), f"make {name} is not a target"
