"""Small PTX programs for the conformance tests, and one way to run them on the emulator and on a GPU alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import DTypeLike
from tools.ptx_emulator.launch import Dim, Memory, Module
from tools.ptx_emulator.tensor_map import TensorMap

from tests.tools.ptx_emulator import cuda_driver

# The hardware proves the emulator: where there is a GPU, every conformance test runs on both.
DEVICES = ("emulated", "cuda") if cuda_driver.available() else ("emulated",)
# sm_90a code runs on compute capability 9.0 only.
HOPPER_DEVICES = ("emulated", "cuda") if cuda_driver.compute_capability() == (9, 0) else ("emulated",)
devices = pytest.mark.parametrize("device", DEVICES)
hopper_devices = pytest.mark.parametrize("device", HOPPER_DEVICES)

_PREAMBLE = """
.version {version}
.target {target}
.address_size 64
.visible .entry program({parameters}){directives}
{{
.reg .pred %p<16>;
.reg .b16 %h<16>;
.reg .b32 %r<64>;
.reg .b64 %rd<32>;
.reg .f32 %f<32>;
.reg .f64 %fd<16>;
.reg .b32 %thread, %byte;
.reg .b64 %wide, %map<4>;
mov.u32 %thread, %tid.x;
"""


def program(body: str, n_pointers: int, target: str = "sm_80", n_maps: int = 0, directives: str = "") -> str:
    """PTX text of a kernel `program` whose parameters are pointers, then tensor maps.

    The pointers arrive in %rd0, %rd1, …, the addresses of the maps in %map0, …; %thread is set.
    """
    parameters = [f".param .u64 p{i}" for i in range(n_pointers)]
    parameters += [f".param .align 64 .b8 m{i}[128]" for i in range(n_maps)]
    loads = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(n_pointers))
    loads += "".join(f"mov.b64 %map{i}, m{i};\ncvta.param.u64 %map{i}, %map{i};\n" for i in range(n_maps))
    version = "7.8" if target == "sm_80" else "8.1"
    head = _PREAMBLE.format(version=version, target=target, parameters=", ".join(parameters), directives=directives)
    return head + loads + body + "\nret;\n}\n"


_REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def _register(type_name: str, index: int) -> tuple[str, str, int]:
    """A register for a value of a PTX type, the type that loads and stores it, and its size."""
    size = int(type_name[1:]) // 8 if type_name[1:].isdigit() else {"bf16": 2}.get(type_name, 4)
    prefix = {"f32": "%f", "f64": "%fd"}.get(type_name, _REGISTERS[size])
    memory_type = type_name if type_name in ("f32", "f64") else f"b{8 * size}" if size > 1 else type_name
    return f"{prefix}{index + (16 if prefix == '%rd' else 4)}", memory_type, size


def elementwise(instruction: str, inputs: Sequence[str], output: str, target: str = "sm_80") -> str:
    """A program in which thread i computes one instruction on element i of every input array.

    instruction: with `{d}` for the result and `{0}`, `{1}`, … for the operands. inputs, output: PTX types. Pointers:
    the output, then the inputs.
    """
    lines = []
    names = []
    for index, type_name in enumerate(inputs):
        register, memory_type, size = _register(type_name, index)
        lines.append(f"mul.wide.u32 %wide, %thread, {size};\nadd.u64 %rd{index + 1}, %rd{index + 1}, %wide;")
        lines.append(f"ld.global.{memory_type} {register}, [%rd{index + 1}];")
        names.append(register)
    result, memory_type, size = _register(output, 8)
    lines.append(instruction.format(*names, d=result))
    lines.append(f"mul.wide.u32 %wide, %thread, {size};\nadd.u64 %rd0, %rd0, %wide;")
    lines.append(f"st.global.{memory_type} [%rd0], {result};")
    return program("\n".join(lines), len(inputs) + 1, target)


def run(
    text: str,
    arrays: Sequence[np.ndarray],
    block: Dim,
    grid: Dim = 1,
    shared_bytes: int = 0,
    device: str = "emulated",
    maps: Sequence[tuple[int, TensorMap]] = (),
    seed: int = 0,
    kernel: str = "program",
    lax: bool = False,
) -> None:
    """Run a kernel of a PTX text; the arrays are its pointers and are updated in place.

    maps: the index of an array and the tensor map that begins at its first element.
    """
    if device == "cuda":
        cuda_driver.launch(text, kernel, arrays, block, grid, shared_bytes, maps)
        return
    memory = Memory()
    addresses = [memory.register(array, f"array {i}", writable=True) for i, array in enumerate(arrays)]
    encoded = [tensor_map.encode(addresses[i]) for i, tensor_map in maps]
    module = Module.from_ptx(text)
    module.launch(kernel, grid, block, shared_bytes, [*addresses, *encoded], memory, seed=seed, lax=lax)


def apply(
    instruction: str,
    inputs: Sequence[tuple[str, np.ndarray]],
    output: str,
    dtype: DTypeLike,
    device: str,
    target: str = "sm_80",
) -> np.ndarray:
    """The result of one instruction on arrays of equal length; inputs are (PTX type, array)."""
    n = len(inputs[0][1])
    result = np.zeros(n, dtype=dtype)
    text = elementwise(instruction, [name for name, _ in inputs], output, target)
    block = 256
    for first in range(0, n, block):
        part = slice(first, min(first + block, n))
        out = result[part].copy()
        run(text, [out, *(np.ascontiguousarray(array[part]) for _, array in inputs)], len(out), device=device)
        result[part] = out
    return result
