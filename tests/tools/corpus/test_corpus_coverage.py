"""Operations of our kernels that the corpus does not run: a committed list, for each of which there is another test."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tools import uncovered_operations
from tools.cuda_plans import build
from tools.ptx_emulator.coverage import read

from tests.tools.corpus.cutlass_programs import cutlass_sources
from tests.tools.corpus.programs import ROOT

pytest.importorskip("triton", reason="Triton is not installed: `make test-corpus` installs it")

pytestmark = [pytest.mark.slow, pytest.mark.needs_nvcc]

UNCOVERED = Path(__file__).with_name("uncovered_operations.txt")
CORPUS = [f"tests/tools/corpus/test_corpus_{name}.py" for name in ("attention", "cutlass", "matmul", "other")]
# Compilers of other versions choose other instructions: these make the list what it is.
COMPILERS = "nvcc 13.0, Triton 3.9 and CUTLASS 4.2"


def test_the_list_is_that_of_the_kernels(tmp_path: Path) -> None:
    cutlass_sources()  # without which the list is another
    path = tmp_path / "operations.txt"
    environment = os.environ | {"PTX_EMULATOR_OPERATIONS": str(path)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *CORPUS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ours = uncovered_operations.users(pool.map(build.ptx_file, build.instantiations()))
    missing, listed = ours.keys() - read(path), read(UNCOVERED)
    assert missing == listed, (
        f"not listed: {sorted(missing - listed)}; no longer uncovered: {sorted(listed - missing)}; "
        f"the list was made with {COMPILERS}"
    )
