"""The sweep over variants without a GPU: every variant applies, and what is measured is weighed rightly."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from benchmarks.gpu import sweep, variants
from benchmarks.gpu.variants import ROOT, VARIANTS, Variant

from anchor_attention._library import library_path


def test_names_are_distinct_and_rows_keep_what_tiles_assert(tmp_path: Path) -> None:
    """Each tree differs from the sources in one file, which compiles: a table asserts what the kernels assume of it."""
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    for variant in VARIANTS:
        tree = variants.make_tree(variant, tmp_path)
        changed = [path for path in tree.rglob("*") if path.is_file()
                   and path.read_bytes() != (ROOT / path.relative_to(tree)).read_bytes()]  # fmt: skip
        assert changed == [tree / variant.file], variant.name
        if variant.file.endswith(".h"):
            command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-x", "c++", f"-I{tree / 'csrc'}"]
            subprocess.run([*command, str(tree / variant.file)], check=True)


def test_a_line_that_has_changed_is_named() -> None:
    with pytest.raises(ValueError, match=r"gone: 'kOld = 1' occurs 0 times in some\.h, not once"):
        Variant("gone", "forward", (64,), "some.h", "kOld = 1", "kOld = 2").apply("kNew = 1")


def test_the_best_is_named_only_where_it_gains() -> None:
    name = VARIANTS[0].name

    def record(seconds: float, size: str, head_dim: int = 64, kernel_pass: str = "forward") -> sweep.Record:
        return {"pass": kernel_pass, "head_dim": head_dim, "size": size, "seconds": [seconds] * 3}

    results = [(sweep.SHIPPED, record(1.0, "2k")), (name, record(0.9, "2k")), (sweep.SHIPPED, record(1.0, "4k")),
               (name, record(0.99, "4k")), (sweep.SHIPPED, record(1.0, "2k", kernel_pass="backward")),
               (name, record(0.5, "2k", kernel_pass="backward")), (name, record(0.5, "16k"))]  # fmt: skip
    lines = sweep.table(results).splitlines()
    assert f"| forward | 64 | 2k | {name} | 0.900 |" in lines
    assert f"| forward | 64 | 4k | {sweep.SHIPPED} | 1.000 |" in lines
    # It can't change the backward: what differs there is noise. Without the shipped choice there is nothing to compare.
    assert f"| backward | 64 | 2k | {sweep.SHIPPED} | 1.000 |" in lines and not any("16k" in line for line in lines)
    assert f"| {name} | 0.900 | 0.990 |  |" in lines


def test_a_dry_run_measures_every_library_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these one is broken: it costs its own result and no other."""
    monkeypatch.setattr(sweep, "PROCESS_SECONDS", 300)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    shutil.copy(library_path(), libraries / f"{sweep.SHIPPED}.so")
    (libraries / "broken.so").write_text("no library")
    out = tmp_path / "out"
    sweep.main([str(libraries), "--out", str(out), "--device", "cpu", "--quick", "--minutes", "15"])
    printed = capsys.readouterr().out
    assert printed.count("next: ") == 4 and printed.count("LOST: broken") == 2, printed
    assert f"| forward | 64 | 512 | {sweep.SHIPPED} | 1.000 |" in (out / "sweep.md").read_text()
