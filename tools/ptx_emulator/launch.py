"""Modules, memory and launches: what a test uses."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import errors
from .build import native
from .counters import Counters
from .coverage import record
from .errors import EmulatorError
from .lower import LoweredKernel, lay_out_module, lower
from .ptx import TYPE_BYTES, parse

# In the order of FaultKind.
_FAULTS: tuple[type[EmulatorError], ...] = (
    errors.RaceError,
    errors.OutOfBoundsError,
    errors.UninitializedReadError,
    errors.MisalignedError,
    errors.DeadlockError,
    errors.DivergenceError,
    errors.TrapError,
    errors.UnsupportedInstructionError,
    errors.MbarrierError,
)
_MAX_THREADS = 1024
Dim = int | Sequence[int]
Parameter = int | float | bytes | np.generic | ctypes.Structure


@dataclass(frozen=True)
class Product:
    """A wgmma that a warp has issued: its shape, and the descriptors of A (0 for one in registers) and B."""

    warp: int
    shape: str
    a: int
    b: int


class Memory:
    """Global memory: the arrays that kernels may touch. The arrays must outlive it and keep their storage."""

    def __init__(self) -> None:
        self._native = native().GlobalMemory()
        self._arrays: dict[str, tuple[int, np.ndarray]] = {}

    def register(
        self, array: np.ndarray, name: str, writable: bool = False, poisoned: bool = False, write_once: bool = False
    ) -> int:
        """Device address of the array's first element.

        The array is used in place, whatever its strides: everything between its first and its last byte becomes
        accessible. With `poisoned`, a byte may be read only after a kernel has written it; the array's bytes are set
        to 0xff, a NaN in every floating-point type. With `write_once`, which needs `poisoned`, a second write to a byte
        is reported as a race: for outputs whose tiles must not overlap.
        """
        if write_once and not poisoned:
            raise ValueError(f"write_once needs poisoned, for {name!r}")
        if name in self._arrays:
            raise ValueError(f"name {name!r} is already registered")
        if array.size and poisoned and not array.flags.c_contiguous:
            raise ValueError(f"a poisoned array must be contiguous, {name!r} has strides {array.strides}")
        if writable and not array.flags.writeable:
            raise ValueError(f"array {name!r} is read-only")
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (0, 0)
        if poisoned:
            array.view(np.uint8).reshape(-1)[...] = 0xFF
        base: int = self._native.add(name, low, high - low, writable, poisoned, write_once)
        self._arrays[name] = (base, array)
        return base + (array.__array_interface__["data"][0] - low if array.size else 0)

    def release(self, name: str) -> None:
        """Forget a registered array."""
        base, _ = self._arrays.pop(name)
        self._native.remove(base)

    def unwritten(self, name: str) -> np.ndarray:
        """Which elements of a poisoned array still hold a byte that no kernel wrote: bool, in the array's shape."""
        base, array = self._arrays[name]
        written = np.frombuffer(self._native.written(base), dtype=np.uint8)
        if written.size != array.nbytes:
            raise ValueError(f"array {name!r} is not poisoned")
        missing = written.reshape(*array.shape, array.itemsize) == 0
        return np.asarray(missing.any(axis=-1))


class Module:
    """A loaded PTX module. Kernels are lowered when they are first used; `load_all` does it for every one at once."""

    def __init__(self, text: str) -> None:
        self.text = parse(text)
        self._layout = lay_out_module(self.text)
        self._lowered: dict[str, LoweredKernel] = {}
        self._variables = {
            variable.name: np.frombuffer(bytearray(variable.initial or bytes(variable.size)), dtype=np.uint8)
            for variable in self.text.variables.values()
            if variable.space == "global"
        }

    @classmethod
    def from_ptx(cls, source: str | Path) -> Module:
        """From the path of a .ptx file, or from PTX text."""
        if isinstance(source, str) and ".version" in source:
            return cls(source)
        return cls(Path(source).read_text())

    @classmethod
    def from_library(cls, library: str | Path) -> list[Module]:
        """The PTX modules inside a shared library."""
        return [cls(text) for text in ptx_of_library(library)]

    @property
    def kernels(self) -> dict[str, KernelInfo]:
        """By name: parameters, launch bounds and sizes. Raises UnsupportedInstructionError where one cannot run."""
        return {name: KernelInfo(self.lowered(name)) for name in self.text.kernels}

    def find(self, pattern: str) -> str:
        """The one kernel whose name matches the regular expression."""
        names = [name for name in self.text.kernels if re.search(pattern, name)]
        if len(names) != 1:
            raise KeyError(f"{len(names)} kernels match {pattern!r}: {names}")
        return names[0]

    def lowered(self, name: str) -> LoweredKernel:
        if name not in self._lowered:
            if name not in self.text.kernels:
                raise KeyError(f"no kernel {name!r}, only {sorted(self.text.kernels)}")
            self._lowered[name] = lower(self.text, self._layout, self.text.kernels[name])
        return self._lowered[name]

    def load_all(self) -> None:
        """Lower every kernel now. Raises UnsupportedInstructionError."""
        for name in self.text.kernels:
            self.lowered(name)

    def launch(
        self,
        kernel: str,
        grid: Dim,
        block: Dim,
        shared_bytes: int,
        params: bytes | Sequence[Parameter],
        memory: Memory,
        *,
        seed: int = 0,
        concurrent_blocks: int = 1,
        spin_limit: int = 50_000_000,
        reluctant_warps: Sequence[int] = (),
        products: list[Product] | None = None,
        lax: bool = False,
    ) -> Counters:
        """Run a grid to its end.

        grid, block: up to three extents. shared_bytes: dynamic shared memory. params: one value per parameter, or the
        whole parameter buffer. seed: decides the order of warps and of atomics. concurrent_blocks: how many blocks
        run at a time; the others wait for one of them to end. spin_limit: warp instructions without a store, a barrier
        or an exit after which the program counts as stuck. reluctant_warps: warps of a block that run only where none
        of its others can, a schedule that random ones hardly ever come close to. products: gets every
        wgmma, warp by warp, in the order of issue. lax: pass over what other people's
        kernels do less strictly than ours, as README.md says.

        Raises the EmulatorError that names what the program did wrong.
        """
        lowered = self.lowered(kernel)
        record(lowered)
        grid_extents, block_extents = _extents("grid", grid), _extents("block", block)
        n_threads = int(np.prod(block_extents))
        if n_threads > _MAX_THREADS:
            raise ValueError(f"block {block_extents} has {n_threads} threads, more than {_MAX_THREADS}")
        _check_launch_bounds(lowered, block_extents)
        if shared_bytes < 0 or concurrent_blocks < 1:
            raise ValueError(f"shared_bytes {shared_bytes} and concurrent_blocks {concurrent_blocks} must be positive")
        buffer = params if isinstance(params, bytes) else pack_parameters(lowered, params)
        info = KernelInfo(lowered)
        if len(buffer) != info.parameter_bytes:
            raise ValueError(f"params has {len(buffer)} bytes, kernel {kernel} takes {info.parameter_bytes}")
        memory._native.forget_variables()
        for number, (name, array) in enumerate(self._variables.items()):
            memory._native.place_variable(number, name, array.ctypes.data, array.nbytes, True)
        counts, fault, issued = native().launch(
            lowered.native, memory._native, grid_extents, block_extents, shared_bytes, buffer,
            self._layout.constants, seed, concurrent_blocks, spin_limit,
            sum(1 << warp for warp in reluctant_warps), products is not None, lax,
        )  # fmt: skip
        if products is not None:
            names = lowered.operations
            products += [Product(warp, names[place].split(".")[4], a, b) for warp, place, a, b in issued]
        if fault is not None:
            raise _error(lowered, fault)
        return Counters(lowered, counts)


class KernelInfo:
    """`parameters` in order, `reqntid` and `maxntid` (None when absent), sizes in bytes."""

    def __init__(self, lowered: LoweredKernel) -> None:
        self.name = lowered.name
        self.parameters = lowered.text.parameters
        self.reqntid = lowered.text.directives.get("reqntid")
        self.maxntid = lowered.text.directives.get("maxntid")
        self.static_shared_bytes = lowered.static_shared_bytes
        self.local_bytes = lowered.local_bytes
        self.n_instructions = len(lowered.operations) - 1
        last = self.parameters[-1] if self.parameters else None
        self.parameter_bytes = last.offset + last.size if last else 0


def cuda_tool(name: str) -> str:
    """$CUOBJDUMP or $NVDISASM, the tool on the path, or the one of the package nvidia-cuda-<name>."""
    packaged = (str(path) for path in sorted(Path(sysconfig.get_paths()["platlib"]).glob(f"nvidia/*/bin/{name}")))
    tool = os.environ.get(name.upper()) or shutil.which(name) or next(packaged, None)
    if tool is None:
        raise FileNotFoundError(f"{name} is needed to read a library: pip install nvidia-cuda-{name}")
    return tool


def ptx_of_library(library: str | Path) -> list[str]:
    """The texts of the PTX modules inside a shared library, extracted with `cuobjdump`."""
    with tempfile.TemporaryDirectory() as directory:
        command = [cuda_tool("cuobjdump"), "--extract-ptx", "all", str(Path(library).resolve())]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
        return [path.read_text() for path in sorted(Path(directory).glob("*.ptx"))]


def _extents(name: str, value: Dim) -> list[int]:
    extents = [value] if isinstance(value, int) else list(value)
    extents += [1] * (3 - len(extents))
    if len(extents) != 3 or any(extent < 1 for extent in extents):
        raise ValueError(f"{name} {value} must have one to three positive extents")
    return extents


def _check_launch_bounds(lowered: LoweredKernel, block: list[int]) -> None:
    n_threads = int(np.prod(block))
    required = lowered.text.directives.get("reqntid")
    if required is not None and list(required) + [1] * (3 - len(required)) != block:
        raise ValueError(f"block {block} of kernel {lowered.name} must be {required}")
    allowed = lowered.text.directives.get("maxntid")
    if allowed is not None and n_threads > int(np.prod(allowed)):
        raise ValueError(f"block {block} of kernel {lowered.name} exceeds {allowed}")


def pack_parameters(lowered: LoweredKernel, values: Sequence[Parameter]) -> bytes:
    """The parameter buffer of a kernel: each value at its parameter's offset, in its type."""
    parameters = lowered.text.parameters
    if len(values) != len(parameters):
        raise ValueError(f"kernel {lowered.name} takes {len(parameters)} parameters, not {len(values)}")
    buffer = bytearray(parameters[-1].offset + parameters[-1].size if parameters else 0)
    for parameter, value in zip(parameters, values, strict=True):
        if isinstance(value, int):
            data = (value % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
        elif isinstance(value, float):
            data = struct.pack("<d" if TYPE_BYTES[parameter.type] == 8 else "<f", value)
        elif isinstance(value, np.generic):
            data = value.tobytes()
        else:
            data = bytes(value)
        if len(data) != parameter.size:
            raise ValueError(f"parameter {parameter.name} has {parameter.size} bytes, not {len(data)}: {value!r}")
        buffer[parameter.offset : parameter.offset + parameter.size] = data
    return bytes(buffer)


def _error(lowered: LoweredKernel, fault: tuple[int, str, Sequence[int], int, int, int]) -> EmulatorError:
    kind, message, block, warp, lane, pc = fault
    places: Mapping[str, str] = {match: _place(lowered, int(match)) for match in re.findall(r"\{pc(\d+)\}", message)}
    for number, place in places.items():
        message = message.replace(f"{{pc{number}}}", f"({place})")
    where = "" if pc < 0 else f", {_place(lowered, pc)}: {lowered.locations[pc].text}"
    return _FAULTS[kind](
        f"{message}\n  in kernel {lowered.name}, block {tuple(block)}, warp {warp}, thread {warp * 32 + lane}{where}"
    )


def _place(lowered: LoweredKernel, pc: int) -> str:
    location = lowered.locations[pc]
    return f"PTX line {location.ptx_line}" + (f", {location.source}" if location.source else "")
