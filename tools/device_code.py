"""The GPU code that the library carries: machine code and PTX, as cmake/device_code.py put it there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.ptx_emulator.launch import cuda_tool

_MARK = b"anchor-attention-gpu-code"
_ALIGNMENT = 64
_ABI_VERSION_BYTE = 8


@dataclass(frozen=True)
class Image:
    """The kernels of one source for one target.

    Attributes:
        name: Of the file that it was: ``attention_bfloat16_64.sm_80.cubin``, or with ``ptx`` for both of the last.
        data: The file's bytes.
    """

    name: str
    data: bytes

    @property
    def target(self) -> str:
        """Such as ``sm_80``, or ``ptx``."""
        return self.name.removesuffix(".cubin").rpartition(".")[2]

    @property
    def module(self) -> str:
        """The source, which images for other targets share."""
        return self.name.partition(".")[0]

    @property
    def abi_version(self) -> int:
        """Of machine code: 7 is that of CUDA 12, which its drivers and newer ones load; 8 is that of CUDA 13."""
        return self.data[_ABI_VERSION_BYTE]

    @property
    def entries(self) -> set[str]:
        """Mangled names of its kernels."""
        found = re.findall(rb"\.visible \.entry (\w+)\(" if self.target == "ptx" else rb"\0\.text\.(\w+)", self.data)
        return {name.decode() for name in found}


def images(library: Path) -> list[Image]:
    """All of a library; none of one that was built without CUDA."""
    content = library.read_bytes()
    found = []
    for mark in re.finditer(re.escape(_MARK), content):
        # Not the mark in code that looks for it: each image's lies at a multiple of the alignment.
        position = mark.end()
        name_size, size = (int.from_bytes(content[position + 8 * i : position + 8 * (i + 1)], "little") for i in (0, 1))
        position += 16
        name = content[position : position + name_size]
        if not re.fullmatch(rb"\w+\.(ptx|sm_\w+\.cubin)", name):
            continue
        begin = -(-(position + name_size - mark.start()) // _ALIGNMENT) * _ALIGNMENT + mark.start()
        found.append(Image(name.decode(), content[begin : begin + size]))
    return found


def resource_usage(image: Image) -> dict[str, dict[str, int]]:
    """What each kernel of an image of machine code takes, by mangled name: ``registers``, and ``spilled_bytes``, which
    are those of a thread's stack and local memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / image.name
        cubin.write_bytes(image.data)
        command = [cuda_tool("cuobjdump"), "--dump-resource-usage", cubin]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    return {
        name: {"registers": int(registers), "spilled_bytes": int(stack) + int(local)}
        for name, registers, stack, local in found
    }
