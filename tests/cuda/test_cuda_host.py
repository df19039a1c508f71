"""What the host code makes of a GPU, on a stand-in for the CUDA runtime."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools.nvcc import nvcc

from tests.installation import ROOT

pytestmark = pytest.mark.needs_nvcc

SUCCESS, LAUNCH_FAILURE = 0, 719


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The host code on the stand-in, and what stands in for torch's library for CUDA."""
    directory = tmp_path_factory.mktemp("gpu")
    host, torch_cuda = directory / "gpu_stand_in.so", directory / "libtorch_cuda.so"
    native, torch_directory = ROOT / "tests" / "native", Path(torch.__file__).parent
    # What only other operations need is dropped, and the stand-ins are bound before what torch has of the same name.
    compiler = "-fPIC,-fvisibility=hidden,-ffunction-sections,-Wall"
    linker = "--gc-sections,-Bsymbolic,--no-undefined"
    command = [nvcc(), "-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", compiler, "-Xlinker", linker]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{torch_directory / 'include'}"]
    command += [str(ROOT / "csrc" / "host" / "cuda.cpp"), str(native / "gpu_stand_in.cpp")]
    command += [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(host)]
    subprocess.run(command, check=True)
    command = ["g++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(native / "torch_cuda_stand_in.cpp")]
    subprocess.run([*command, "-o", str(torch_cuda)], check=True)
    return host, torch_cuda


@pytest.fixture(scope="module")
def gpu(libraries: tuple[Path, Path]) -> ctypes.CDLL:
    host, torch_cuda = libraries
    ctypes.CDLL(str(torch_cuda))
    gpu = ctypes.CDLL(str(host))
    gpu.call_rope.restype = ctypes.c_char_p
    return gpu


def call_in_a_process_of_its_own(host: Path, before: str) -> str:
    """What an operation on device 3 answers, and the stream that it used."""
    code = f"""
import ctypes, torch
{before}
gpu = ctypes.CDLL({str(host)!r})
gpu.call_rope.restype, gpu.launch_stream.restype = ctypes.c_char_p, ctypes.c_void_p
print(gpu.call_rope(9, 0, 0).decode(), gpu.launch_stream())
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_the_stream_is_found_however_torch_was_loaded(libraries: tuple[Path, Path], mode: str) -> None:
    """Python loads torch's libraries locally; a program that links them has their symbols everywhere."""
    host, torch_cuda = libraries
    before = f"ctypes.CDLL({str(torch_cuda)!r}, mode=ctypes.{mode})"
    assert call_in_a_process_of_its_own(host, before) == f"launched  {0x1003}"


def test_a_torch_without_cuda_is_named(libraries: tuple[Path, Path]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    expected = "anchor_attention: this torch is built without CUDA None"
    assert call_in_a_process_of_its_own(libraries[0], "") == expected


@pytest.mark.parametrize("capability", [(5, 0), (6, 1), (7, 0), (7, 5)])
def test_a_gpu_that_is_too_old_is_turned_away_before_a_launch(gpu: ctypes.CDLL, capability: tuple[int, int]) -> None:
    has = ".".join(map(str, capability))
    expected = f"anchor_attention: the GPU is too old: compute capability 8.0 (Ampere) is needed, cuda:3 has {has}"
    assert gpu.call_rope(*capability, SUCCESS).decode() == expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)])
def test_newer_gpus_are_launched_on(gpu: ctypes.CDLL, capability: tuple[int, int]) -> None:
    assert gpu.call_rope(*capability, SUCCESS).decode() == "launched "


def test_a_launch_that_fails_says_which_and_why(gpu: ctypes.CDLL) -> None:
    answer = gpu.call_rope(9, 0, LAUNCH_FAILURE).decode()
    assert answer == "launched anchor_attention: rope failed on the GPU: out of order"
