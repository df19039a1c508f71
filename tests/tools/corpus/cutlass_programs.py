"""Builds kernels of CUTLASS without a GPU, has launches filled in without a driver, and runs them on the emulator.

The sources come with PyPI's `nvidia-cutlass`: the library's headers, and the examples that are built of them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from tools.cuda_plans.build import cached_output
from tools.nvcc import nvcc
from tools.ptx_emulator import Counters, Memory, Module, TensorMap
from tools.ptx_emulator.launch import ptx_of_library

from tests.tools.corpus.programs import Array

_HERE = Path(__file__).parent
_EXAMPLE = "88_hopper_fmha"
# No code of a GPU: the library holds PTX. Assertions would ask the driver for its version.
_FLAGS = (
    "-shared", "-std=c++17", "-w", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=compute_90a",
    "-Xcompiler=-fPIC", "-Xlinker=-Bsymbolic", "-DNDEBUG", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL",
)  # fmt: skip
# TensorMapArguments of cutlass_launch.h.
_MAP = struct.Struct("<8s8xQ5Q4Q5H5B6B")
_MARK = b"tiledmap"
_MAP_ALIGNMENT = 64
# CUTLASS counts its named barriers from below.
_MEETING = """ {
.reg .b32 %warpgroup;
mov.u32 %warpgroup, %tid.x;
shr.u32 %warpgroup, %warpgroup, 7;
sub.u32 %warpgroup, 15, %warpgroup;
bar.sync %warpgroup, 128;
} """


def cutlass_sources() -> Path:
    """The folder of CUTLASS; skips the test where it is not installed."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        pytest.skip("CUTLASS is not installed: `make test-corpus` installs it")
    return Path(package.origin).parent / "source"


class Launch(ctypes.Structure):
    """The struct of this name in cutlass_launch.h."""

    _fields_ = (
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("shared_bytes", ctypes.c_int32),
        ("parameter_bytes", ctypes.c_int32),
        ("parameters", ctypes.c_uint8 * 4096),
    )


@dataclass(frozen=True)
class Kernels:
    """The kernels of one source, and host code that fills in a launch of each."""

    library: ctypes.CDLL
    module: Module

    def run(self, name: str, *arguments: Array | ctypes.Structure | int | float, seed: int = 0) -> Counters:
        """Runs a kernel with the arguments of its `launch_` function; arrays are updated in place."""
        memory, values = Memory(), []
        for position, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                values.append(ctypes.c_void_p(memory.register(argument, f"argument {position}", writable=True)))
            elif isinstance(argument, ctypes.Structure):
                values.append(ctypes.byref(argument))
            else:
                values.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument))
        launch = Launch()
        fill = self.library[f"launch_{name}"]
        fill.restype = ctypes.c_bool
        if not fill(ctypes.byref(launch), *values):
            raise ValueError(f"CUTLASS refuses {name} of {arguments}")
        parameters = _with_tensor_maps(bytes(launch.parameters[: launch.parameter_bytes]))
        return self.module.launch(
            name, launch.grid[:], launch.block[:], launch.shared_bytes, parameters, memory,
            seed=seed, concurrent_blocks=2, lax=True,
        )  # fmt: skip


def _with_tensor_maps(parameters: bytes) -> bytes:
    """The same with a tensor map wherever there are the arguments of one."""
    filled = bytearray(parameters)
    for place in range(0, len(filled), _MAP_ALIGNMENT):
        if not filled.startswith(_MARK, place):
            continue
        _, address, *numbers = _MAP.unpack_from(filled, place)
        dims, strides, box, steps = numbers[:5], numbers[5:9], numbers[9:14], numbers[14:19]
        data_type, rank, *others = numbers[19:]
        tensor_map = TensorMap(data_type, dims[:rank], strides[: rank - 1], box[:rank], steps[:rank], *others)
        encoded = tensor_map.encode(address)
        filled[place : place + len(encoded)] = encoded
    return bytes(filled)


def _with_meetings(ptx: str) -> str:
    """The same with a barrier of the warpgroup before every wgmma.fence and after every wgmma.wait_group.

    CUTLASS takes it that the four warps are in step there: one thread gives back what all of them have read, and a warp
    stores where others read. The manual promises it of the threads of a warp, and the emulator keeps to that.
    """
    ptx = re.sub(r"wgmma\.fence\.[^;]+;", rf"{_MEETING}\g<0>", ptx)
    return re.sub(r"wgmma\.wait_group\.[^;]+;", rf"\g<0>{_MEETING}", ptx)


@cache
def built(name: str, **case: str | int) -> Kernels:
    """The kernels of cutlass_<name>.cu with `case` defined; compiles what is not in the cache."""
    cutlass, source = cutlass_sources(), _HERE / f"cutlass_{name}.cu"
    defines = [f"-DCASE_{key.upper()}={value}" for key, value in case.items()]
    folders = [cutlass / "include", cutlass / "examples" / _EXAMPLE]
    includes = [word for folder in folders for word in ("-isystem", folder)]
    salt = " ".join([version("nvidia-cutlass"), *_FLAGS, *defines])
    library = cached_output("corpus", (source,), salt, f"{name}.so", [nvcc(), *_FLAGS, *defines, *includes, source])
    (ptx,) = ptx_of_library(library)
    return Kernels(ctypes.CDLL(str(library)), Module.from_ptx(_with_meetings(ptx)))
