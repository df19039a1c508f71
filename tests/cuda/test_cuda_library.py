"""The GPU code inside the library that is loaded: as it was built, not as a test compiles it."""

from __future__ import annotations

import json
import re

import pytest
from tools.cuda_resources import RESULTS, machine_code
from tools.device_code import Image, images, resource_usage

from anchor_attention._library import library_path

# Without it the library is built for the CPU alone.
pytestmark = pytest.mark.needs_nvcc


@pytest.fixture(scope="module")
def code() -> list[Image]:
    found = images(library_path())
    assert found, f"{library_path()} has no GPU code: it was built without nvcc"
    return found


def test_the_library_has_native_code_and_ptx_for_what_comes_later(code: list[Image]) -> None:
    assert {image.target for image in code} == {"sm_80", "sm_90", "sm_90a", "ptx"}
    for module in {image.module for image in code}:
        own = {image.target: image.entries for image in code if image.module == module}
        assert set(own) == ({"sm_90a"} if module.startswith("sm90_") else {"sm_80", "sm_90", "ptx"})
        assert len({frozenset(entries) for entries in own.values()}) == 1 and all(own.values()), module


def test_drivers_of_cuda_12_load_the_code_that_its_assembler_made(code: list[Image]) -> None:
    """Machine code has that assembler's format, or else the library asks for a driver of CUDA 13."""
    versions = {image.abi_version for image in code if image.target != "ptx"}
    if versions == {8}:
        pytest.skip("assembled by CUDA 13: nvidia-cuda-nvcc-cu12 was not installed")
    assert versions == {7}
    ptx = [image.data for image in code if image.target == "ptx"]
    assert all(re.findall(rb"^\.version (\S+)", text, flags=re.MULTILINE) == [b"8.1"] for text in ptx)


def test_no_kernel_spills(code: list[Image]) -> None:
    usage = {(image.name, kernel): row for image in code if image.target != "ptx"
             for kernel, row in resource_usage(image).items()}  # fmt: skip
    assert len(usage) > 150
    assert {key: row for key, row in usage.items() if row["spilled_bytes"]} == {}


def test_exponentials_lie_between_the_products_of_hopper(code: list[Image]) -> None:
    """The compiler orders instructions as it likes: nothing in the source keeps it from waiting first."""
    kernels = {name: row for image in code if image.target == "sm_90a" for name, row in machine_code(image).items()}
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
