"""Files, lines and equal names of the code at some revisions, as a table.

Usage: python scripts/structure.py REVISION ...
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
CODE = (".py", ".h", ".cpp", ".cu", ".cuh")
PARTS = ("python", "csrc", "tools", "benchmarks", "tests")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def measure(revision: str) -> dict[str, str]:
    """The table's cells of a revision by row."""
    files = {}
    empty = git("hash-object", "-t", "tree", "/dev/null").strip()
    for line in git("diff", "--numstat", empty, revision).splitlines():
        lines, _, name = line.split("\t")
        if name.endswith(CODE):
            files[PurePosixPath(name)] = int(lines)
    cells = {}
    for part in (*PARTS, "all"):
        counts = [lines for path, lines in files.items() if part in (path.parts[0], "all")]
        cells[f"{part}: files, lines"] = f"{len(counts)}, {sum(counts):,}"
    tests = [path for path in files if path.parts[0] == "tests" and path.name.startswith("test_")]
    cells["files of tests in one folder, at most"] = f"{max(Counter(path.parent for path in tests).values())}"
    names = Counter(path.name for path in files if path.parts[0] == "csrc" and path.parent.name != "instantiations")
    equal = [count for count in names.values() if count > 1]
    cells["csrc: names that several files have (files)"] = f"{len(equal)} ({sum(equal)})"
    return cells


def main() -> None:
    columns = {revision: measure(revision) for revision in sys.argv[1:]}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in next(iter(columns.values()), {}):
        print(f"| {row} | {' | '.join(cells[row] for cells in columns.values())} |")


if __name__ == "__main__":
    main()
