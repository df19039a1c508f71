"""Every instruction set that this processor runs passes the tests of the operation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_attention import cpu_instruction_sets

ROOT = Path(__file__).parents[2]
SETS = cpu_instruction_sets()
CASES = (
    "tests/ops/test_attention.py",
    "tests/ops/test_head_sizes.py",
    "tests/ops/test_derivatives.py",
    "tests/cpu/test_cpu_attention.py",
    "tests/cpu/test_edge_shapes.py",
)


def test_sets_are_listed() -> None:
    assert SETS.selected in SETS.runnable and set(SETS.runnable) <= set(SETS.compiled)
    assert SETS.runnable[-1] == "baseline"
    pinned = os.environ.get("ANCHOR_ATTENTION_CPU_ISA")
    assert SETS.selected == (pinned or SETS.runnable[0])


@pytest.mark.parametrize("name", SETS.runnable[1:])
def test_operation(name: str) -> None:
    """The default set is what the other tests run on."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES]
    environment = os.environ | {"ANCHOR_ATTENTION_CPU_ISA": name, "HYPOTHESIS_PROFILE": "brief"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_unknown_sets_are_refused() -> None:
    program = "import anchor_attention as a; print(a.cpu_instruction_sets())"
    environment = os.environ | {"ANCHOR_ATTENTION_CPU_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"must be one of {', '.join(SETS.runnable)} on this machine, got mmx" in done.stderr
