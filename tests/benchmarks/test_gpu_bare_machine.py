"""The GPU suite where there is nothing but what docs/gpu.md asks for: no other package, no compiler, no git."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from benchmarks.gpu.stages import MISSING, PASSED, ROOT, STAGES

from anchor_attention import _library

PACKAGES = ("torch", "numpy", "pytest", "pytest-timeout", "hypothesis", "matplotlib")
# Of this environment, and of no machine that is rented for an hour.
ABSENT = ("pybind11", "expecttest", "xdist", "scipy", "build")


def with_what_they_need(names: tuple[str, ...]) -> dict[str, Distribution]:
    """Installed distributions by name: the named ones and, again and again, what they require here."""
    found: dict[str, Distribution] = {}
    new = list(names)
    while new:
        name = new.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another Python or platform
            assert name not in names, f"{name} is not installed"
            continue
        wanted = [line for line in found[name].requires or [] if "extra ==" not in line]
        new += [re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in wanted]
    return found


def bare_python(folder: Path) -> Path:
    """An interpreter that finds these packages and no others."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in with_what_they_need(PACKAGES).values():
        for name in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = site / name
            if not target.exists():
                target.symlink_to(Path(str(package.locate_file(name))))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_dry_run_needs_no_more_than_is_said(tmp_path: Path) -> None:
    python, out = bare_python(tmp_path / "environment"), tmp_path / "out"
    environment = {
        "PATH": str(python.parent), "PYTHONPATH": "python", "HOME": str(tmp_path), "CUDA_HOME": str(tmp_path),
        "ANCHOR_ATTENTION_LIBRARY": str(_library.library_path()),
    }  # fmt: skip
    environment |= {name: value for name, value in os.environ.items() if name.startswith("OMP_")}
    for module in ABSENT:
        tried = subprocess.run([python, "-c", f"import {module}"], env=environment, cwd=tmp_path, capture_output=True)
        assert b"ModuleNotFoundError" in tried.stderr, module
    command = [python, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "25", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = {outcome["name"]: outcome for outcome in json.loads((out / STAGES).read_text())}
    missing = {name for name, outcome in outcomes.items() if outcome["status"] == MISSING}
    # What compiles, and what only a GPU can run.
    assert missing == {"primitives", "instructions", "small_shapes_sm80", "memcheck", "racecheck", "synccheck"}
    assert all(outcome["status"] == PASSED for name, outcome in outcomes.items() if name not in missing), outcomes
    assert {"table.md", "op_speedup.png", "summary.md", "environment.json"} <= {path.name for path in out.iterdir()}
