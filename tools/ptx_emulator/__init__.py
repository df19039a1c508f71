"""Runs PTX on the CPU, faithfully enough to find what is wrong with it: see README.md.

>>> module = Module.from_ptx("kernel.ptx")
>>> memory = Memory()
>>> x = memory.register(input_array, "x")
>>> y = memory.register(output_array, "y", writable=True, poisoned=True)
>>> counters = module.launch("kernel", grid=4, block=128, shared_bytes=0, params=[x, y, 1000], memory=memory)
"""

from .counters import Counters, InstructionCount
from .errors import (
    DeadlockError,
    DivergenceError,
    EmulatorError,
    MbarrierError,
    MisalignedError,
    OutOfBoundsError,
    PtxSyntaxError,
    RaceError,
    TrapError,
    UninitializedReadError,
    UnsupportedInstructionError,
)
from .launch import KernelInfo, Memory, Module, Product
from .tensor_map import TensorMap, encode_tensor_map

__all__ = [
    "Counters",
    "DeadlockError",
    "DivergenceError",
    "EmulatorError",
    "InstructionCount",
    "KernelInfo",
    "MbarrierError",
    "Memory",
    "MisalignedError",
    "Module",
    "OutOfBoundsError",
    "Product",
    "PtxSyntaxError",
    "RaceError",
    "TensorMap",
    "TrapError",
    "UninitializedReadError",
    "UnsupportedInstructionError",
    "encode_tensor_map",
]
