"""Builds what the emulated tests need, once per content: the planning module and the kernels' PTX."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from tools.locks import once_at_a_time
from tools.nvcc import nvcc

_ROOT = Path(__file__).parents[2]
_CSRC = _ROOT / "csrc"
_CUDA = _CSRC / "kernels" / "cuda"
# Architecture that is compiled for where none is asked for; wgmma exists for one architecture only.
_ARCHITECTURES = {"common": "80", "sm80": "80", "sm90": "90a"}
_NVCC_FLAGS = ("-std=c++20", "-lineinfo", f"-I{_CSRC}")
_MODULE = "cuda_plans_native"


def _plan_sources() -> tuple[Path, ...]:
    """The bindings, and the sources that the library's build lists."""
    text = (_ROOT / "cmake" / "sources.cmake").read_text()
    (listed,) = re.findall(r"set\(CUDA_PLAN_SOURCES([^)]*)\)", text)
    return (Path(__file__).parent / "bindings.cpp", *(_ROOT / name for name in listed.split()))


_INCLUDED = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@cache
def _includes(source: Path) -> frozenset[Path]:
    """The project's files that a file includes."""
    named = (source.parent / name if (source.parent / name).exists() else _CSRC / name
             for name in _INCLUDED.findall(source.read_text()))  # fmt: skip
    return frozenset(path.resolve() for path in named if path.exists())


def inputs(sources: Iterable[Path]) -> list[Path]:
    """Sources and what they include, directly or not: what a change of any other file leaves as it is."""
    found: set[Path] = set()
    new = {path.resolve() for path in sources}
    while new:
        found |= new
        new = {path for source in new for path in _includes(source)} - found
    return sorted(found)


def cached_output(
    kind: str, sources: tuple[Path, ...], salt: str, name: str, command: Sequence[object], *, keep_report: bool = False
) -> Path:
    """The output of `command` (which gets `-o PATH` appended), run if no cached output of the same inputs exists.

    With `keep_report` what the command prints is kept in place of its output.
    """
    digest = hashlib.sha256(salt.encode())
    for path in inputs(sources):
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    target = _ROOT / "build" / kind / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    with once_at_a_time(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=target.parent) as directory:
        if target.exists():
            return target
        output = Path(directory) / name
        result = subprocess.run([*map(str, command), "-o", output], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{name} does not compile:\n{result.stdout}{result.stderr}")
        if keep_report:
            output.write_text(result.stdout + result.stderr)
        os.replace(output, target)
    return target


@cache
def plans() -> ModuleType:
    """The compiled planning functions."""
    import pybind11

    sources = _plan_sources()
    includes = [f"-I{path}" for path in (_CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden",
        f"-DCUDA_PLANS_MODULE={_MODULE}", *includes, *sources,
    ]  # fmt: skip
    library = cached_output("cuda_plans", sources, sys.version, f"{_MODULE}.so", command)
    spec = importlib.util.spec_from_file_location(_MODULE, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {library}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generation(instantiation: str) -> str:
    """The folder of kernels that an instantiation belongs to: "sm90" for names that begin so."""
    if instantiation.startswith("sm90_"):
        return "sm90"
    return "sm80" if instantiation.startswith(("attention_", "derivatives_")) else "common"


def instantiations() -> list[str]:
    """Names of all of them."""
    prefixes = {"common": "", "sm80": "", "sm90": "sm90_"}
    return sorted(
        prefix + path.stem
        for folder, prefix in prefixes.items()
        for path in (_CUDA / folder / "instantiations").glob("*.cu")
    )


def source_file(instantiation: str) -> Path:
    """The file that instantiates the kernels."""
    return _CUDA / generation(instantiation) / "instantiations" / f"{instantiation.removeprefix('sm90_')}.cu"


def compile_command(instantiation: str) -> list[str | Path]:
    """The nvcc command of an instantiation, without a target and an output."""
    return [nvcc(), *_NVCC_FLAGS, source_file(instantiation)]


def ptx_file(instantiation: str, architecture: str | None = None) -> Path:
    """PTX of an instantiation."""
    target = f"-arch=compute_{architecture or _ARCHITECTURES[generation(instantiation)]}"
    command = [*compile_command(instantiation), "-ptx", target]
    salt = target + " ".join(_NVCC_FLAGS[:-1])
    return cached_output("ptx", (source_file(instantiation),), salt, f"{instantiation}.ptx", command)


def compiler_report(instantiation: str) -> str:
    """What the compiler says of the machine code of an sm_90a instantiation: registers, spills, warnings."""
    source = source_file(instantiation)
    command = [*compile_command(instantiation), "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    return cached_output("reports", (source,), "", f"{instantiation}.txt", command, keep_report=True).read_text()


def primitives_ptx() -> Path:
    """PTX of the kernels around single primitives."""
    source = Path(__file__).parent / "primitives.cu"
    return cached_output(
        "ptx", (source,), "primitives", "primitives.ptx", [nvcc(), *_NVCC_FLAGS, source, "-ptx", "-arch=compute_80"]
    )


def primitives_sm90_ptx() -> Path:
    """PTX of the kernels around the primitives of sm_90a."""
    source = Path(__file__).parent / "primitives_sm90.cu"
    command = [nvcc(), *_NVCC_FLAGS, source, "-ptx", "-arch=compute_90a"]
    return cached_output("ptx", (source,), "primitives_sm90", "primitives_sm90.ptx", command)


def primitives_library() -> Path:
    """The same kernels as a library for a GPU, with `run_kernel`."""
    source = Path(__file__).parent / "primitives.cu"
    command = [nvcc(), *_NVCC_FLAGS, source, "-shared", "-Xcompiler=-fPIC", "-arch=native"]
    return cached_output("primitives", (source,), "native", "primitives.so", command)
