"""Builds and imports the test module over the torch-free C++."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
from tools.locks import once_at_a_time

ROOT = Path(__file__).parents[2]
SOURCES = (Path(__file__).with_name("bindings.cpp"), ROOT / "csrc" / "key_ranges.cpp")
HEADERS = (
    *(
        ROOT / "csrc" / name
        for name in ("key_ranges.h", "params.h", "kernels/cpu/vector/simd.h", "kernels/cpu/amx/tile_config.h")
    ),
    Path(__file__).with_name("tile_model.h"),
)


def load(*flags: str) -> ModuleType:
    """Compiles the module with further flags where its sources have changed, and imports it."""
    sources = b"".join(path.read_bytes() for path in SOURCES + HEADERS)
    digest = hashlib.sha256(sources + " ".join(flags).encode()).hexdigest()[:16]
    library = ROOT / "build" / "native" / digest / f"anchor_attention_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    with once_at_a_time(library.parent / "lock"):
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run(
                [
                    os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC",
                    "-fvisibility=hidden", *flags, f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}",
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


def build_library_with_amx_model() -> Path:
    """The library with the kernels for AMX on a model of its registers, as instruction set "amx_model"."""
    folder = ROOT / "build" / "amx_model"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None, "the tests build with cmake: pip install cmake"
    options = ["-DANCHOR_ATTENTION_CUDA=OFF", "-DANCHOR_ATTENTION_CPU_SETS=amx_model;baseline"]
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython3_EXECUTABLE={sys.executable}", *options]
    with once_at_a_time(folder / ".lock"):
        for command in (configure, [cmake, "--build", str(folder), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "libanchor_attention.so"
