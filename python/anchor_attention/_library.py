"""Loads the compiled operations, or says why they can't be loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch

MIN_TORCH = (2, 10)
LIBRARY_VARIABLE = "ANCHOR_ATTENTION_LIBRARY"
REINSTALL = "'pip install --no-build-isolation .'"

_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER = 64
_ELF_BITS = {1: "32-bit", 2: "64-bit"}
_ELF_MACHINES = {3: "x86", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}


class CpuInstructionSets(NamedTuple):
    """Instruction sets that the CPU kernels are compiled for, best first.

    Attributes:
        selected: The one in use: the best, or the one that ``$ANCHOR_ATTENTION_CPU_ISA`` names.
        runnable: Those that this processor can run.
        compiled: All that are in the library.
    """

    selected: str
    runnable: tuple[str, ...]
    compiled: tuple[str, ...]


def cpu_instruction_sets() -> CpuInstructionSets:
    """Returns the instruction sets of the CPU kernels, and which one is in use.

    Raises:
        RuntimeError: If ``$ANCHOR_ATTENTION_CPU_ISA`` names none that this processor can run.
    """
    selected, runnable, compiled = torch.ops.anchor_attention.cpu_instruction_sets()
    return CpuInstructionSets(selected, tuple(runnable.split(",")), tuple(compiled.split(",")))


def library_path() -> Path:
    """Path of the shared library: ``$ANCHOR_ATTENTION_LIBRARY`` where it is set, else the one in the package."""
    override = os.environ.get(LIBRARY_VARIABLE)
    return Path(override) if override else Path(__file__).with_name("libanchor_attention.so")


def cmake_prefix() -> Path:
    """Directory for ``CMAKE_PREFIX_PATH``, with which ``find_package(anchor_attention)`` finds this installation.

    Raises:
        FileNotFoundError: If the package was not installed, so that it has no CMake configuration.
    """
    prefix = Path(__file__).resolve().parent
    if not (prefix / "share" / "cmake" / "anchor_attention" / "anchor_attention-config.cmake").is_file():
        raise FileNotFoundError(
            f"anchor_attention: {prefix} has no share/cmake/anchor_attention/anchor_attention-config.cmake; "
            f"install the package with {REINSTALL}"
        )
    return prefix


def load() -> None:
    """Registers ``torch.ops.anchor_attention.*``.

    Raises:
        ImportError: If torch is too old, the library is missing, or it was built for another architecture or torch.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise ImportError(f"anchor_attention needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found {torch.__version__}")
    path = library_path()
    if not path.is_file():
        raise ImportError(
            f"anchor_attention: the compiled library {path} is missing; build it with {REINSTALL} "
            f"or point {LIBRARY_VARIABLE} to one"
        )
    defect = _defect(path)
    if defect is None:
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            return
        except OSError as error:
            # torch's error names only the path; the loader's own message is its cause.
            defect = f"can't be loaded with torch {torch.__version__} on this machine ({error.__cause__ or error})"
    raise ImportError(f"anchor_attention: the compiled library {path} {defect}; rebuild it with {REINSTALL}")


def _defect(path: Path) -> str | None:
    """Finds defects that the dynamic loader handles badly: it ends the process over a truncated file, and reports a
    library for another architecture as a missing file."""
    header = _elf_header(path)
    if not header.startswith(_ELF_MAGIC) or len(header) < _ELF_HEADER:
        return "is not a shared library"
    built_for, needed = _architecture(header), _architecture(_elf_header(Path("/proc/self/exe")))
    if built_for != needed:
        return f"is built for {built_for}, but Python is {needed}"
    # The section headers come last in a 64-bit file: their offset, size and number.
    order = _byte_order(header)
    sections = [int.from_bytes(header[begin:end], order) for begin, end in ((40, 48), (58, 60), (60, 62))]
    complete, size = sections[0] + sections[1] * sections[2], path.stat().st_size
    if built_for.startswith("64-bit") and size < complete:
        return f"is damaged: it has {size} of {complete} bytes"
    return None


def _elf_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_ELF_HEADER)


def _byte_order(header: bytes) -> Literal["little", "big"]:
    return "little" if header[5] == 1 else "big"


def _architecture(header: bytes) -> str:
    machine = int.from_bytes(header[18:20], _byte_order(header))
    return f"{_ELF_BITS.get(header[4], 'unknown')} {_ELF_MACHINES.get(machine, f'machine {machine}')}"
