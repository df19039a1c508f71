"""Compiles the interpreter on first use and again when its sources, the compiler or the processor change."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from tools.locks import once_at_a_time

# Elsewhere where a test plants mistakes in a copy.
_SOURCES = Path(os.environ.get("PTX_EMULATOR_SOURCES") or Path(__file__).parent / "src")
_MODULE = "emulator_native"
_BUILD_ROOT = Path(__file__).parents[2] / "build" / "ptx_emulator"
# -ffp-contract=off and -frounding-math: PTX says where an operation is fused and how it rounds.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fwrapv", "-frounding-math",
          "-fno-trapping-math", "-fPIC", "-fvisibility=hidden")  # fmt: skip


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _environment(compiler: str) -> bytes:
    """What every object file depends on: compiler, processor, flags, headers, Python."""
    target = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, check=True)
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True)
    headers = b"\0".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.h")))
    return target.stdout + version.stdout + " ".join(_FLAGS).encode() + sys.version.encode() + headers


def _compile_one(compiler: str, source: Path, target: Path) -> None:
    import pybind11

    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    # A rename is atomic: whoever finds the file finds all of it.
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        command = [compiler, *_FLAGS, f"-DEMULATOR_MODULE={_MODULE}", *includes, "-c", str(source), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the emulator does not compile: {source.name}\n{result.stderr}")
        os.replace(made, target)


def _build() -> Path:
    compiler = os.environ.get("CXX", "g++")
    environment = _environment(compiler)
    # The largest file first, so that it does not end alone.
    sources = sorted(_SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    objects = [_BUILD_ROOT / f"{path.stem}-{_digest(environment, path.read_bytes())}.o" for path in sources]
    library = _BUILD_ROOT / _digest(*(path.name.encode() for path in objects)) / f"{_MODULE}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        once_at_a_time(_BUILD_ROOT / "lock"),
        ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
        tempfile.TemporaryDirectory(dir=library.parent) as directory,
    ):
        if library.exists():
            return library
        list(pool.map(lambda pair: _compile_one(compiler, *pair), zip(sources, objects, strict=True)))
        linked = Path(directory) / library.name
        subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(linked)], check=True)
        os.replace(linked, library)
    return library


@cache
def native() -> ModuleType:
    """The compiled interpreter; compiles what is not up to date."""
    library = _build()
    spec = importlib.util.spec_from_file_location(_MODULE, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {library}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
