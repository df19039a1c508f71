"""Operations that programs use, as files list them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.__main__ import CONFORMANCE_TESTS
from tools import uncovered_operations
from tools.ptx_emulator import Module
from tools.ptx_emulator.coverage import operations, read

from tests.tools.ptx_emulator.harness import program

ROOT = Path(__file__).parents[3]
_FIXTURE = Path(__file__).parent / "fixtures" / "programs.ptx"
UNCOVERED = ROOT / "tests" / "tools" / "corpus" / "uncovered_operations.txt"
_LAUNCH = """
from tools.ptx_emulator import Memory, Module
from tests.tools.ptx_emulator.harness import program
Module.from_ptx(program("popc.b32 %r1, %thread;", 0)).launch("program", 1, 32, 0, [], Memory())
"""


def test_products_are_told_apart_by_their_left_operand() -> None:
    accumulators = ", ".join(f"%f{i}" for i in range(4))
    product = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{accumulators}}}"
    body = f"{product}, {{%r1, %r2, %r3, %r4}}, %rd5, %p1, 1, 1, 0;\n{product}, %rd4, %rd5, %p1, 1, 1, 0, 0;"
    module = Module.from_ptx(program(body, 0, "sm_90a"))
    name = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    assert operations(module.lowered("program")) >= {f"{name} with A in registers", f"{name} with A in shared memory"}


def test_processes_add_to_the_list(tmp_path: Path) -> None:
    path = tmp_path / "operations.txt"
    path.write_text("what was there\n")
    environment = os.environ | {"PTX_EMULATOR_OPERATIONS": str(path)}
    subprocess.run([sys.executable, "-c", _LAUNCH], cwd=ROOT, env=environment, check=True)
    assert read(path) >= {"what was there", "popc.b32"}


def test_operations_that_are_not_known(tmp_path: Path) -> None:
    used = uncovered_operations.users([_FIXTURE])
    assert "bar.sync" in used and used["bar.sync"] == {"programs"}
    path = tmp_path / "operations.txt"
    path.write_text("\n".join(used.keys() - {"bar.sync"}))
    command = [sys.executable, "-m", "tools.uncovered_operations", str(_FIXTURE), "--known"]
    listed = [
        subprocess.run([*command, str(known)], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for known in (path, _FIXTURE)
    ]
    assert listed[0].splitlines()[1:] == ["  bar.sync: programs"]
    assert "of which 0 are not known" in listed[1]


def test_conformance_tests_run_what_others_code_has_not(tmp_path: Path) -> None:
    """Whatever of our kernels the corpus does not run; tests/tools/corpus holds the list to the kernels' PTX."""
    path = tmp_path / "operations.txt"
    environment = os.environ | {"PTX_EMULATOR_OPERATIONS": str(path)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not cuda"]
    tests = [str(ROOT / name) for name in CONFORMANCE_TESTS]
    result = subprocess.run([*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert read(UNCOVERED) - read(path) == set()
