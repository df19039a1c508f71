"""Builds and imports the test module over the torch-free C++."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = (Path(__file__).with_name("bindings.cpp"), ROOT / "csrc" / "key_ranges.cpp")
HEADERS = tuple(ROOT / "csrc" / name for name in ("key_ranges.h", "params.h", "kernels/cpu/simd.h"))


def load() -> ModuleType:
    """Compiles the module where its sources have changed, and imports it."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES + HEADERS)).hexdigest()[:16]
    library = ROOT / "build" / "native" / digest / f"anchor_attention_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC",
                "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}",
                f"-I{sysconfig.get_path('include')}", *map(str, SOURCES), "-o", str(unfinished),
            ],
            check=True,
        )  # fmt: skip
        unfinished.rename(library)
    spec = importlib.util.spec_from_file_location("anchor_attention_native", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
