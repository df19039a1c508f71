"""Builds what the emulated tests need, once per content: the planning module and the kernels' PTX."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parents[2]
_CSRC = _ROOT / "csrc"
_CUDA = _CSRC / "kernels" / "cuda"
_PLAN_SOURCES = (
    Path(__file__).parent / "bindings.cpp",
    _CSRC / "key_ranges.cpp",
    *(_CUDA / "sm80" / f"{name}.cpp" for name in ("plan_attention", "plan_rope", "schedule")),
)
INSTANTIATIONS = _CUDA / "sm80" / "instantiations"
_NVCC_FLAGS = ("-std=c++20", "-lineinfo", f"-I{_CSRC}")
_MODULE = "cuda_plans_native"


@cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*_CSRC.glob("*.h"), *_CUDA.rglob("*.h"), *_CUDA.rglob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cached(kind: str, sources: tuple[Path, ...], salt: str, name: str, command: Sequence[object]) -> Path:
    """The output of `command` (which gets `-o PATH` appended), run if no cached output of the same inputs exists."""
    digest = hashlib.sha256((_headers_digest() + salt).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = _ROOT / "build" / kind / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        output = Path(directory) / name
        result = subprocess.run([*map(str, command), "-o", output], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{name} does not compile:\n{result.stdout}{result.stderr}")
        os.replace(output, target)
    return target


@cache
def plans() -> ModuleType:
    """The compiled planning functions."""
    import pybind11

    includes = [f"-I{path}" for path in (_CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden",
        f"-DCUDA_PLANS_MODULE={_MODULE}", *includes, *_PLAN_SOURCES,
    ]  # fmt: skip
    library = _cached("cuda_plans", _PLAN_SOURCES, sys.version, f"{_MODULE}.so", command)
    spec = importlib.util.spec_from_file_location(_MODULE, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {library}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc() -> str:
    """The CUDA compiler."""
    found = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        raise RuntimeError("the emulated kernel tests need nvcc: put it on PATH or set NVCC")
    return found


def compile_command(instantiation: str) -> list[str | Path]:
    """The nvcc command of `instantiations/<instantiation>.cu`, without a target and an output."""
    return [nvcc(), *_NVCC_FLAGS, INSTANTIATIONS / f"{instantiation}.cu"]


def ptx_file(instantiation: str, architecture: int = 80) -> Path:
    """PTX of `instantiations/<instantiation>.cu`."""
    source = INSTANTIATIONS / f"{instantiation}.cu"
    target = f"-arch=compute_{architecture}"
    command = [*compile_command(instantiation), "-ptx", target]
    return _cached("ptx", (source,), target + " ".join(_NVCC_FLAGS[:-1]), f"{instantiation}.ptx", command)


def primitives_ptx() -> Path:
    """PTX of the kernels around single primitives."""
    source = Path(__file__).parent / "primitives.cu"
    return _cached(
        "ptx", (source,), "primitives", "primitives.ptx", [nvcc(), *_NVCC_FLAGS, source, "-ptx", "-arch=compute_80"]
    )


def primitives_library() -> Path:
    """The same kernels as a library for a GPU, with `run_kernel`."""
    source = Path(__file__).parent / "primitives.cu"
    command = [nvcc(), *_NVCC_FLAGS, source, "-shared", "-Xcompiler=-fPIC", "-arch=native"]
    return _cached("primitives", (source,), "native", "primitives.so", command)
