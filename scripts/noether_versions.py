"""Runs the integration tests against releases of ``emmiai-noether``, and writes what they say as a table.

    python scripts/noether_versions.py 1.1.0 2.0.0 2026.4.0 [--write docs/noether_versions.md]

Each release is fetched by ``scripts/fetch_noether.py`` and tested in a process of its own. Ends with an error if a test
fails. A release that can't be had, for want of a network, is said to be left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from fetch_noether import VERSIONS, fetch

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/integrations/test_noether_package.py"
# Rows of the table: what a group of tests shows, and how the names of its tests begin.
ROWS = {
    "self, cross and joint anchor attention": ("test_anchor_attention", "test_half", "test_dropout"),
    "masks and caches": ("test_masks_and_caches", "test_one_cache"),
    "untied projections (balanced, nearly, unbalanced, one domain)": ("test_untied",),
    "plain attention, every mask": ("test_plain",),
    "perceiver attention, every mask, batches of one": ("test_perceiver", "test_batches"),
    "rotary factors of every form": ("test_factors", "test_angles"),
    "errors word by word": ("test_errors",),
    "whole AB-UPT models, with and without cache": ("test_a_whole_model", "test_the_walkthrough"),
    "what is unreleased: learnt norms, arguments that choose an implementation": ("test_unreleased",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS))
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    outcomes: dict[str, dict[str, str]] = {}
    for version in arguments.versions:
        try:
            folders = fetch(version)
        except OSError as error:
            print(f"left out {version}: {error}")
            continue
        outcomes[version] = run(version, folders)
    table = as_table(outcomes)
    print(table)
    if arguments.write is not None:
        arguments.write.write_text(table)
    if any("failed" in cell for column in outcomes.values() for cell in column.values()):
        sys.exit(1)


def run(version: str, folders: tuple[Path, Path]) -> dict[str, str]:
    """Returns the cells of a release's column by row."""
    paths = [str(ROOT / "python"), *map(str, folders), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", TESTS]
        print(f"emmiai-noether {version}", flush=True)
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if not report.exists():
            return dict.fromkeys(ROWS, "failed to start")
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {
        row: cell([case for case in cases if case.get("name", "").startswith(names)]) for row, names in ROWS.items()
    }


def cell(cases: list[ElementTree.Element]) -> str:
    """One word on the tests of a row, and their number."""
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    if failed:
        return f"{failed} of {len(cases)} failed"
    ran = len(cases) - skipped
    return f"the same ({ran})" if ran else "not in it"


def as_table(outcomes: dict[str, dict[str, str]]) -> str:
    """Markdown."""
    lines = [
        "---\norphan: true\n---\n",
        "# Releases of emmiai-noether\n",
        f"Made by `scripts/noether_versions.py` with torch {torch.__version__} on the CPU.\n",
        "| `accelerate` against the original (number of tests) | " + " | ".join(outcomes) + " |",
        "|---" * (len(outcomes) + 1) + "|",
    ]
    lines += [f"| {row} | " + " | ".join(column[row] for column in outcomes.values()) + " |" for row in ROWS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
