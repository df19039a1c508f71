"""Compiles Triton kernels without a GPU, and runs them on the emulator with NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tools.ptx_emulator import Counters, Memory, Module, TensorMap

Array = NDArray[Any]
ROOT = Path(__file__).parents[3]
CACHE = ROOT / "build" / "corpus"
# Read when Triton is loaded. Products and sums are fused, as nvcc fuses them for us.
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Triton's names of types that a bulk copy moves, with their enumerators in CUtensorMapDataType.
_TENSOR_MAP_TYPES = {"u8": 0, "i32": 4, "fp16": 6, "fp32": 7, "bf16": 9}
_WARP = 32
TYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Tiles:
    """A matrix that a kernel reaches through a tensor map, in boxes of `block` elements."""

    array: Array
    kind: str
    block: tuple[int, int]

    @property
    def signature(self) -> str:
        return f"tensordesc<{self.kind}[{self.block[0]},{self.block[1]}]>"


@dataclass(frozen=True)
class Pointer:
    """An array that a kernel reaches through its address, with Triton's name of its type."""

    array: Array
    kind: str

    @property
    def signature(self) -> str:
        return f"*{self.kind}"


Argument = Tiles | Pointer | int | float


def _signature(argument: Argument) -> str:
    if isinstance(argument, Tiles | Pointer):
        return argument.signature
    return "i32" if isinstance(argument, int) else "fp32"


@dataclass(frozen=True)
class Program:
    """A compiled kernel: its PTX and what a launch has to know."""

    name: str
    ptx: str
    warps: int
    shared_bytes: int
    maps: tuple[tuple[int, tuple[int, int]], ...]  # swizzle and box of each, in the order of the arguments

    @property
    def swizzles(self) -> tuple[int, ...]:
        return tuple(swizzle for swizzle, _ in self.maps)

    def run(self, grid: Sequence[int], arguments: Sequence[Argument], seed: int = 0, lax: bool = True) -> Counters:
        """Runs it; the arrays of the arguments are updated in place."""
        module, memory = _module(self.ptx), Memory()
        values: list[Any] = []
        maps = iter(self.maps)
        for position, argument in enumerate(arguments):
            if isinstance(argument, int | float):
                values.append(argument)
                continue
            address = memory.register(argument.array, f"argument {position}", writable=True)
            if isinstance(argument, Pointer):
                values.append(address)
                continue
            rows, columns = argument.array.shape
            swizzle, box = next(maps)
            tensor_map = TensorMap(
                _TENSOR_MAP_TYPES[argument.kind], (columns, rows), (columns * argument.array.itemsize,),
                box[::-1], swizzle=swizzle,
            )  # fmt: skip
            # Extents and strides follow the map, for the kernel's own use.
            values += [tensor_map.encode(address), rows, columns, columns, 1]
        # Behind the arguments: memory for the compiler's own needs, which these kernels do not have.
        values += [0] * (len(module.kernels[self.name].parameters) - len(values))
        return module.launch(
            self.name, grid, self.warps * _WARP, self.shared_bytes, values, memory,
            seed=seed, concurrent_blocks=2, lax=lax,
        )  # fmt: skip


@cache
def _module(ptx: str) -> Module:
    return Module.from_ptx(ptx)


def compiled(
    kernel: Any, arguments: Sequence[Argument], constants: Mapping[str, Any], capability: int, warps: int = 4,
    stages: int = 3,
) -> Program:  # fmt: skip
    """The kernel for arguments of these types and for compute capability `capability` / 10.

    constants: values of parameters that the kernel knows when it is compiled; the arguments are those of the others.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    free = iter(arguments)
    signature = {name: "constexpr" if name in constants else _signature(next(free)) for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    # So that copies are wide, the compiler is told of addresses and strides that are multiples of 16.
    values = dict(zip((name for name in names if name not in constants), arguments, strict=True))
    divisible = [name for name, x in values.items() if isinstance(x, Pointer) or (isinstance(x, int) and x % 16 == 0)]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    built = triton.compile(
        ASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", capability, _WARP),
        options={"num_warps": warps, "num_stages": stages},
    )
    if built.metadata.global_scratch_size or built.metadata.profile_scratch_size:
        raise NotImplementedError(f"{built.metadata.name} wants scratch memory")
    maps = tuple((int(meta["swizzle"]), tuple(meta["block_size"])) for meta in built.metadata.tensordesc_meta or ())
    return Program(built.metadata.name, built.asm["ptx"], warps, built.metadata.shared, maps)


def run(
    kernel: Any, grid: Sequence[int], arguments: Sequence[Argument], constants: Mapping[str, Any], capability: int,
    warps: int = 4, stages: int = 3, lax: bool = True,
) -> Program:  # fmt: skip
    """Compiles and runs a kernel."""
    program = compiled(kernel, arguments, constants, capability, warps, stages)
    program.run(grid, arguments, lax=lax)
    return program


def stored(values: Array, kind: str) -> Array:
    """Float values → what memory holds of them."""
    if kind == "fp32":
        return values.astype(np.float32)
    if kind == "fp16":
        return values.astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loaded(array: Array, kind: str) -> NDArray[np.float64]:
    """What memory holds → float64."""
    if kind == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    """Normally distributed, and exact as operands of a product: of 32 bits, the tensor cores read 19."""
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "fp32":
        values = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return stored(values, kind)


def unit_roundoff(kind: str) -> float:
    return {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}[kind]


def check(computed: Array, expected: Array, bound: Array | float, what: str) -> None:
    """Every element within its bound, and none that is not a number."""
    error = np.abs(computed - expected)
    good = error <= bound
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert good.all(), (
        f"{what}: {(~good).sum()} of {error.size} wrong, {computed[worst]} for {expected[worst]} at {worst}"
    )
