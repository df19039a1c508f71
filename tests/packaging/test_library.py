"""Loading the library: how fast, and what is said when it can't be loaded. Each case is a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from anchor_attention._library import LIBRARY_VARIABLE, library_path

# Of what torch's own import takes, which tells how fast the machine is.
IMPORT_SHARE = 0.06
ELF_CLASS, ELF_MACHINE = 4, 18
RISCV = 243
MACHINE = platform.machine()


def import_package(before: str = "", after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import torch\n{before}\nimport anchor_attention\n{after}"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def message(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: anchor_attention"), result.stderr
    return last


def changed_library(directory: Path, position: int, value: int) -> str:
    content = bytearray(library_path().read_bytes())
    content[position] = value
    path = directory / "changed.so"
    path.write_bytes(content)
    return str(path)


def test_missing_library(tmp_path: Path) -> None:
    path = str(tmp_path / "none.so")
    text = message(import_package(**{LIBRARY_VARIABLE: path}))
    assert f"the compiled library {path} is missing; build it with 'pip install --no-build-isolation .'" in text
    assert LIBRARY_VARIABLE in text


def test_library_of_another_architecture(tmp_path: Path) -> None:
    path = changed_library(tmp_path, ELF_MACHINE, RISCV)
    text = message(import_package(**{LIBRARY_VARIABLE: path}))
    assert f"{path} is built for 64-bit riscv, but Python is 64-bit {MACHINE}; rebuild it" in text


def test_library_of_another_word_size(tmp_path: Path) -> None:
    path = changed_library(tmp_path, ELF_CLASS, 1)
    text = message(import_package(**{LIBRARY_VARIABLE: path}))
    assert f"{path} is built for 32-bit {MACHINE}, but Python is 64-bit {MACHINE}" in text


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"#!/bin/sh\necho this is no library\n" * 10])
def test_what_is_no_library(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(content)
    text = message(import_package(**{LIBRARY_VARIABLE: str(path)}))
    assert f"the compiled library {path} is not a shared library; rebuild it with" in text


@pytest.mark.parametrize("missing", [1, 100_000, -4096])
def test_library_cut_short(missing: int, tmp_path: Path) -> None:
    """The dynamic loader would end the process."""
    path = tmp_path / "short.so"
    content = library_path().read_bytes()
    path.write_bytes(content[:-missing])
    size = path.stat().st_size
    text = message(import_package(**{LIBRARY_VARIABLE: str(path)}))
    assert f"{path} is damaged: it has {size} of {len(content)} bytes; rebuild it with" in text


def test_library_that_needs_more_than_this_torch_has(tmp_path: Path) -> None:
    source, path = tmp_path / "newer.c", tmp_path / "newer.so"
    source.write_text("void torch_function_of_the_future(void); void use(void) { torch_function_of_the_future(); }")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    text = message(import_package(**{LIBRARY_VARIABLE: str(path)}))
    assert f"{path} can't be loaded with torch {torch.__version__} on this machine" in text
    assert "undefined symbol: torch_function_of_the_future" in text


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117", "2.9.0a0+git123"])
def test_torch_that_is_too_old(version: str) -> None:
    text = message(import_package(f"torch.__version__ = {version!r}"))
    assert text == f"ImportError: anchor_attention needs torch >= 2.10, found {version}"


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0a0+git123", "3.0.0"])
def test_torch_that_is_new_enough(version: str) -> None:
    result = import_package(f"torch.__version__ = {version!r}")
    assert result.returncode == 0, result.stderr


def test_import_takes_little_more_than_torch() -> None:
    """In processor time, the least of three processes, because others use the machine.

    What torch imports only because the package asks for it counts, too.
    """
    code = """
import time
begin = time.process_time()
import torch
between = time.process_time()
import anchor_attention
print((time.process_time() - between) / (between - begin))
"""
    shares = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(shares) <= IMPORT_SHARE, shares


def test_parts_that_take_long_to_import_wait_until_they_are_used() -> None:
    result = import_package(
        after="""
import sys
parts = ("converters", "streaming")
assert not any(f"anchor_attention.{part}" in sys.modules for part in parts)
for part in parts:
    assert getattr(anchor_attention, part) is sys.modules[f"anchor_attention.{part}"]
assert not hasattr(anchor_attention, "no_such_part")
"""
    )
    assert result.returncode == 0, result.stderr
