"""Mistakes in reading the PTX manual, planted in a copy of the emulator: the corpus notices each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools.ptx_emulator import build

from tests.tools.corpus.programs import ROOT

pytest.importorskip("triton", reason="Triton is not installed: `make test-corpus` installs it")

pytestmark = pytest.mark.slow

# Products with every transpose, through every path to the tensor cores and in every swizzle; an attention.
CASES = (
    "tests/tools/corpus/test_corpus_matmul.py::test_matmul",
    "tests/tools/corpus/test_corpus_matmul.py::test_matmul_in_every_swizzle",
    "tests/tools/corpus/test_corpus_matmul.py::test_matmul_by_tma_of_other_shapes",
    "tests/tools/corpus/test_corpus_attention.py::test_attention",
)
_WARPGROUP, _BULK, _MATRIX, _PRODUCT = "warpgroup.cpp", "bulk_copy.cpp", "copy_instructions.cpp", "tensor_core.cpp"
# By what is misread: file, right, wrong.
MISREADINGS = {
    "a swizzle that takes its bits one higher, alike in copies and in products": (
        (_WARPGROUP, "(address >> 7 & mask_) << 4", "(address >> 8 & mask_) << 4"),
        (_BULK, "(address >> 7 & mask) << 4", "(address >> 8 & mask) << 4"),
    ),
    "swizzles of 64 and of 32 bytes exchanged": ((_WARPGROUP, "16u >> mode;", "mode == 1 ? 8 : mode == 2 ? 2 : 4;"),),
    "leading and stride offsets of an outer-major operand exchanged": (
        (_WARPGROUP, "chunk / width_ * leading_ + k % 8", "chunk / width_ * stride_ + k % 8"),
        (_WARPGROUP, "k / 8 * stride_);", "k / 8 * leading_);"),
    ),
    "the stride offset taken for four rows": ((_WARPGROUP, "row / 8 * stride_ + chunk", "row / 4 * stride_ + chunk"),),
    "transposes of A and of B exchanged": (
        (_WARPGROUP, "!a_in_registers && rest[4] != 0", "!a_in_registers && rest[5] != 0"),
        (_WARPGROUP, "rest[a_in_registers ? 4 : 5] != 0", "rest[4] != 0"),
    ),
    "the second and the third register of A exchanged": (
        (
            _WARPGROUP,
            "a[lane / 4 + i % 2 * 8][lane % 4 * kPerRegister + i / 2 * 4 * kPerRegister + j]",
            "a[lane / 4 + i / 2 * 8][lane % 4 * kPerRegister + i % 2 * 4 * kPerRegister + j]",
        ),
    ),
    "accumulators of the two halves of the rows exchanged": (
        (_WARPGROUP, "sum[lane / 4 + i / 2 % 2 * 8][i / 4 * 8", "sum[lane / 4 + (1 - i / 2 % 2) * 8][i / 4 * 8"),
    ),
    "ldmatrix that transposes without .trans": (
        (_MATRIX, "fragment(matrices[i], lane, Transposed)", "fragment(matrices[i], lane, !Transposed)"),
    ),
    "rows of mma's A in pairs of registers exchanged": (
        (_PRODUCT, "a[lane / 4][k] = Type::part(low[lane], i);", "a[lane / 4][k] = Type::part(high[lane], i);"),
        (_PRODUCT, "a[lane / 4 + 8][k] = Type::part(high[lane], i);", "a[lane / 4 + 8][k] = Type::part(low[lane], i);"),
    ),
    "the first two coordinates of a tensor exchanged": (
        (_BULK, "= map.address + (at[0] + first) *", "= map.address + (at[1] + first) *"),
        (_BULK, "const int64_t i = at[axis] +", "const int64_t i = at[axis == 1 ? 0 : axis] +"),
    ),
}


def outcome(sources: Path | None) -> tuple[int, str]:
    """Exit status and report of the cases with the emulator made of `sources`."""
    environment = dict(os.environ)
    environment.pop("PYTEST_XDIST_WORKER", None)
    if sources is not None:
        environment["PTX_EMULATOR_SOURCES"] = str(sources)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *CASES]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_the_cases_pass_without_a_mistake() -> None:
    status, report = outcome(None)
    assert status == 0, report


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_misreading_is_noticed(misreading: str, tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(build._SOURCES, sources)
    for name, right, wrong in MISREADINGS[misreading]:
        text = (sources / name).read_text()
        assert right in text, f"{right!r} is not in {name}"
        (sources / name).write_text(text.replace(right, wrong))
    status, report = outcome(sources)
    # Some case fails; a status above 1 would say that pytest itself, or the build, did.
    assert status == 1 and "does not compile" not in report, report
