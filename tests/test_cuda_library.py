"""The GPU code inside the library that is loaded: as it was built, not as a test compiles it."""

from __future__ import annotations

import re
import subprocess

from anchor_attention._library import library_path

from .emulator.launch import cuobjdump


def listing(*options: str) -> str:
    """What cuobjdump says of the library; empty of one that was built without CUDA."""
    return subprocess.run([cuobjdump(), *options, str(library_path())], capture_output=True, text=True).stdout


def test_the_library_has_native_code_and_ptx_for_what_comes_later() -> None:
    natives = set(re.findall(r"\.(sm_\d+a?)\.cubin", listing("--list-elf")))
    assert {"sm_80", "sm_90", "sm_90a"} <= natives, (
        f"{library_path()} has GPU code for {natives}: it was built without nvcc"
    )
    assert re.search(r"\.sm_90\.ptx", listing("--list-ptx"))


def test_no_kernel_spills() -> None:
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing("--dump-resource-usage")
    )
    assert len(usage) > 150
    spilling = {name: (stack, local) for name, _, stack, local in usage if (stack, local) != ("0", "0")}
    assert not spilling
