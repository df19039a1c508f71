"""Fuzzing of the table's C++ guided by coverage, for some seconds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_tables_keep_their_meaning(tmp_path: Path) -> None:
    program = tmp_path / "fuzz_key_ranges"
    subprocess.run(["make", "-C", ROOT, f"FUZZER={program}", program], check=True, capture_output=True)
    result = subprocess.run([program, "1", "5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    inputs, taken, edges, kept = map(int, re.findall(r"\d+", result.stdout))
    assert inputs > taken > 0 and edges > 100 and kept > 1
