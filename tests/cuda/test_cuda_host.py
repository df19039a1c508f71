"""What the host code makes of a GPU, on a stand-in for the CUDA runtime."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from tools.nvcc import nvcc

from tests.installation import ROOT

pytestmark = pytest.mark.needs_nvcc

SUCCESS, LAUNCH_FAILURE = 0, 719


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("gpu") / "gpu_stand_in.so"
    torch_directory = Path(torch.__file__).parent
    # What only other operations need is dropped, and the stand-ins are bound before what torch has of the same name.
    compiler = "-fPIC,-fvisibility=hidden,-ffunction-sections,-Wall"
    linker = "--gc-sections,-Bsymbolic,--no-undefined"
    command = [nvcc(), "-std=c++20", "-O1", "-shared", "-cudart", "none", "-Xcompiler", compiler, "-Xlinker", linker]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{torch_directory / 'include'}"]
    command += [str(ROOT / "csrc" / "host" / "cuda.cpp"), str(ROOT / "tests" / "native" / "gpu_stand_in.cpp")]
    command += [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    gpu = ctypes.CDLL(str(library))
    gpu.call_rope.restype = ctypes.c_char_p
    return gpu


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
