"""The host code of the CUDA operations, without a GPU: on a driver that records what it is asked and runs nothing.

Each call below is a process of its own, which loads three libraries as Python loads them when a GPU is there: torch's
part for CUDA, the driver, and the operations' host code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from tools.locks import once_at_a_time
from tools.nvcc import nvcc

ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
# A few bytes that begin as a cubin of CUDA 12 does.
_MACHINE_CODE = b"\x7fELF\x02\x01\x01\x33\x07" + bytes(55)


def _listed(name: str) -> list[Path]:
    """A list of sources of the library's build."""
    text = (ROOT / "cmake" / "sources.cmake").read_text()
    return [ROOT / word for word in text.partition(f"set({name}")[2].partition(")")[0].split()]


def _device_code_script() -> Any:
    spec = importlib.util.spec_from_file_location("device_code", ROOT / "cmake" / "device_code.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_code"] = module
    spec.loader.exec_module(module)
    return module


def device_code_table(directory: Path) -> str:
    """The C++ table of device code, of images that hold no instructions: names and targets are those of the build."""
    script = _device_code_script()
    stems = []
    precisions = (("bfloat16", "8Bfloat16"), ("float16", "7Float16"), ("float32", "4Tf32"))
    for name, mangled in precisions:
        kernels = ("15attention_merge", "24attention_row_statistics", "4rope", "19rope_freqs_gradient")
        stems.append((f"elementwise_{name}", "cuda", [f"{kernel}IN{mangled}EEv" for kernel in kernels]))
    for name, mangled in precisions[:2]:
        for size in (32, 48, 64, 96, 128):
            tile = f"IN{mangled}ELi{size}E"
            kernels = ("17attention_forward", "24attention_backward_query", "22attention_backward_key")
            entries = [f"{kernel}{tile}L12KeyGradientsE0EEv" for kernel in kernels]
            stems.append((f"attention_{name}_{size}", "sm80", entries))
            entries = [f"17attention_forward{tile}Ev", f"24attention_query_gradient{tile}Ev"]
            entries += [f"18attention_backward{tile}L13QueryGradientE{i}EEv" for i in (0, 1)]
            stems.append((f"sm90_{name}_{size}", "sm90", entries))
    stems.append(("upload", "cuda", ["6uploadv"]))
    paths = []
    for name, namespace, entries in stems:
        hopper = namespace == "sm90"
        bodies = "".join(f".visible .entry _ZN16anchor_attention4{namespace}{entry}(\n" for entry in entries)
        path = directory / name
        target = "sm_90a" if hopper else "sm_80"
        Path(f"{path}.ptx").write_text(f".version {script.PTX_VERSION}\n.target {target}\n{bodies}")
        for architecture in ("90a",) if hopper else ("80", "90"):
            Path(f"{path}.sm_{architecture}.cubin").write_bytes(_MACHINE_CODE)
        paths.append(path)
    text: str = script.table(paths)
    return text


def _digest(sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(
        {*sources, *(ROOT / "csrc").rglob("*.h"), *_HERE.glob("*.cpp"), ROOT / "cmake" / "device_code.py"}
    ):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def build() -> Path:
    """The folder of the three libraries, which are built once per content."""
    import torch

    # The stand-ins for torch's guard are bound before what torch has of the same name.
    host = [*_listed("CUDA_HOST_SOURCES"), *_listed("CUDA_PLAN_SOURCES"), ROOT / "csrc/host/checks.cpp"]
    host.append(_HERE / "gpu_stand_in.cpp")
    directory = ROOT / "build" / "cuda_host" / f"{_digest(host)}-{torch.__version__}"
    with once_at_a_time(directory.parent / f"{directory.name}.lock"):
        if not directory.is_dir():
            scratch = directory.parent / f"{directory.name}.unfinished"
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / "images").mkdir(parents=True)
            _compile(scratch, host, Path(torch.__file__).parent)
            scratch.rename(directory)
    return directory


def _compile(directory: Path, host_sources: Sequence[Path], torch_directory: Path) -> None:
    table = directory / "device_code.cpp"
    table.write_text(device_code_table(directory / "images"))
    common = [os.environ.get("CXX", "g++"), "-std=gnu++20", "-O2", "-Wall", "-fPIC", "-fvisibility=hidden"]
    common += [f"-isystem{include_directory()}", f"-I{ROOT / 'csrc'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    common += [f"-isystem{torch_directory / 'include'}"]
    jobs: list[tuple[list[Any], Path | None]] = [
        ([*common, "-c", source, "-o", directory / f"{i}.o"], directory / f"{i}.o")
        for i, source in enumerate([*host_sources, table])
    ]
    for source, name in (("torch_cuda_stand_in.cpp", "libtorch_cuda.so"), ("driver_stand_in.cpp", "libcuda.so.1")):
        command = [*common, "-shared", "-fvisibility=default", _HERE / source, f"-Wl,-soname,{name}"]
        jobs.append(([*command, "-o", directory / name], None))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _run(job[0]), jobs))
    objects = [output for _, output in jobs if output is not None]
    link = [common[0], "-shared", *objects, "-Wl,-Bsymbolic,--no-undefined", f"-L{torch_directory / 'lib'}"]
    _run([*link, "-ltorch_cpu", "-lc10", "-ldl", "-o", directory / "libhost.so"])


def _run(command: Sequence[object]) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the host code of the CUDA operations does not compile:\n{result.stderr}")


def include_directory() -> Path:
    """Where the toolkit of nvcc, which may be a script, has cuda.h."""
    command = [nvcc(), "--dryrun", "-cubin", "-arch=sm_80", "-x", "cu", "/dev/null", "-o", "/dev/null"]
    commands = subprocess.run(command, capture_output=True, text=True).stderr
    (top,) = re.findall(r"^#\$ TOP=(.*)$", commands, flags=re.MULTILINE)
    return Path(top) / "include"


def _torch_library() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


_PROLOGUE = """
import ctypes, json
directory = {directory!r}
{import_torch}
if {torch_cuda!r}:
    ctypes.CDLL(directory + "/libtorch_cuda.so", mode=getattr(ctypes, {torch_cuda!r}))
if {driver!r}:
    driver = ctypes.CDLL(directory + "/libcuda.so.1")
    driver.launches.restype = ctypes.c_char_p
    driver.context_of_thread.restype = ctypes.c_void_p
    driver.set_context_of_thread.argtypes = [ctypes.c_void_p]
    driver.configure(*{configuration!r})
host = ctypes.CDLL(directory + "/libhost.so")
host.call_rope.restype = host.error.restype = ctypes.c_char_p
host.call_attention.restype = ctypes.c_double
host.call_attention.argtypes = [ctypes.c_int64] * 5 + [ctypes.c_int, ctypes.c_int64]
def attention(groups, queries, keys, heads, head_dim, backward=False, repeats=1):
    nanoseconds = host.call_attention(groups, queries, keys, heads, head_dim, backward, repeats)
    return nanoseconds if nanoseconds >= 0 else host.error().decode()
def launches():
    return [line.split() for line in driver.launches().decode().splitlines()]
"""


def run(
    code: str,
    *,
    version: int = 13000,
    capability: tuple[int, int] = (9, 0),
    launch_result: int = 0,
    quiet: bool = False,
    torch_cuda: str = "RTLD_LOCAL",
    driver: bool = True,
    python: str = "",
) -> Any:
    """The JSON value that `code` gives to ``answer``, on the libraries.

    Args:
        code: Python with ``host``, ``driver``, ``attention(...)`` and ``launches()`` at hand.
        version: Of the driver, as it counts: 12040 is CUDA 12.4.
        capability: Of the GPU.
        launch_result: What every launch ends with.
        quiet: Launches are not recorded.
        torch_cuda: How torch's part for CUDA is loaded; empty: not at all.
        driver: Whether there is one.
        python: An interpreter whose torch is used, all of it; else only the library of this one's with the stable ABI.
    """
    prologue = _PROLOGUE.format(
        directory=str(build()), torch_cuda=torch_cuda, driver=driver,
        import_torch="import torch" if python else f"ctypes.CDLL({str(_torch_library())!r})",
        configuration=(version, *capability, launch_result, int(quiet)),
    )  # fmt: skip
    program = f"{prologue}\n{code}\nprint(json.dumps(answer))"
    result = subprocess.run([python or sys.executable, "-c", program], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the host code failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])
