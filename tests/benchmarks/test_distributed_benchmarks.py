"""The benchmarks of several processes run, and say what they measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.distributed import scaling

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.distributed.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout


def test_scaling(tmp_path: Path) -> None:
    printed = run("scaling", "--quick", "--rounds", "2", "--counts", "1", "2", "--out", str(tmp_path))
    result = json.loads((tmp_path / "scaling.json").read_text())
    for seconds in result["seconds"].values():
        names = ("gathered 1", "gathered 2", "ring 1", "ring 2")
        assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(names, 2)
    assert scaling.speedups(result, "ring", "passed")[0] == 1.0 and "1: 1.00, 2: " in printed
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_every_token_has_a_process() -> None:
    for n in (0, 1, 7, 100):
        assert sum(scaling.share(n, rank, 3) for rank in range(3)) == n


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("tc"), reason="needs root and iproute2 to limit a network")
def test_overlap(tmp_path: Path) -> None:
    try:
        subprocess.run(["unshare", "--net", "true"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("needs network namespaces")
    printed = run("overlap", "--quick", "--rounds", "2", "--out", str(tmp_path))
    result = json.loads((tmp_path / "overlap.json").read_text())
    assert {len(seconds) for seconds in result["seconds"].values()} == {2}
    assert "gathered: " in printed and "ring: " in printed
