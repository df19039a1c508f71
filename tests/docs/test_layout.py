"""Rules of the house that a compiler does not check."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import anchor_attention  # noqa: F401  (registers the operations)

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("csrc", "python", "tests", "tools", "benchmarks", "examples", "scripts")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"} and "build" not in path.parts
]


def test_kernels_know_no_torch() -> None:
    files = [path for path in CODE if "kernels" in path.parts and "csrc" in path.parts]
    files += [ROOT / "csrc" / name for name in ("params.h", "key_ranges.h", "key_ranges.cpp")]
    assert len(files) > 10
    for path in files:
        assert not re.search(r'#include *[<"](torch|ATen|c10)/', path.read_text()), path


def test_the_library_uses_stable_headers_only() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".cpp", ".h"}:
            for header in re.findall(r'#include *[<"]((?:torch|ATen|c10)/[^>"]+)', path.read_text()):
                assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), f"{path}: {header}"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_instruction_sets_share_no_code() -> None:
    """A weak function that two sets define is kept once, maybe compiled for a processor that isn't there."""
    objects = sorted((ROOT / "build" / "cmake").rglob("cpu_*.dir/**/*.o"))
    assert objects, "build the library first"
    for path in objects:
        symbols = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        isa = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
        for line in symbols.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            # A pointer to the run-time library's handler of exceptions is the same for all.
            if name == "DW.ref.__gxx_personality_v0":
                continue
            if kind in "WVuB" and "anchor_attention::cpu::" + isa not in name:
                raise AssertionError(f"{path.name} of {isa} defines {name}, which another set may define, too")


def test_every_operation_is_documented_by_its_schema() -> None:
    registration = (ROOT / "csrc" / "registration.cpp").read_text()
    names = set(re.findall(r'"(\w+)\(', registration))
    assert names == {
        "attention",
        "attention_backward",
        "attention_jvp",
        "attention_double_backward",
        "rope",
        "rope_backward",
        "canonical_key_ranges",
        "cpu_instruction_sets",
    }
    assert all(hasattr(torch.ops.anchor_attention, name) for name in names)
