"""The GPU code inside the library that is loaded: as it was built, not as a test compiles it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from tools.cuda_resources import RESULTS, machine_code
from tools.ptx_emulator.launch import cuda_tool

from anchor_attention._library import library_path

pytestmark = pytest.mark.needs_nvcc


def listing(*options: str) -> str:
    """What cuobjdump says of the library; empty of one that was built without CUDA."""
    return subprocess.run(
        [cuda_tool("cuobjdump"), *options, str(library_path())], capture_output=True, text=True
    ).stdout


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


def test_exponentials_lie_between_the_products_of_hopper(tmp_path: Path) -> None:
    """The compiler orders instructions as it likes: nothing in the source keeps it from waiting first."""
    command = [cuda_tool("cuobjdump"), "--extract-elf", "sm_90a", library_path().resolve()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    kernels = {name: row for cubin in tmp_path.glob("*.cubin") for name, row in machine_code(cubin).items()}
    committed = json.loads((RESULTS / "cuda_hopper.json").read_text())
    checked = 0
    for name, row in committed.items():
        wanted = row["sm_90a"].get("mufu_under_products")
        match = re.fullmatch(r"sm90_(forward|backward)_(bfloat16|float16)_(\d+)", name)
        if wanted is None or match is None:
            continue
        kernel_pass, precision, head_dim = match.groups()
        gradient = ".*QueryGradientE1" if kernel_pass == "backward" else ""
        pattern = rf"sm90\d+attention_{kernel_pass}I.*\d{precision.capitalize()}ELi{head_dim}E{gradient}"
        (found,) = (counts for kernel, counts in kernels.items() if re.search(pattern, kernel))
        assert found["mufu_under_products"] >= 0.9 * wanted, name
        assert found["local_memory"] == 0, name
        checked += 1
    assert checked == 20
