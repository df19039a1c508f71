"""The kernels on AMX tile registers: a model of the registers, and the kernels on it and on the processor's own."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_attention import cpu_instruction_sets
from tests import native

ROOT = Path(__file__).parents[2]
SETS = ["amx_model", *(name for name in cpu_instruction_sets().runnable if name == "amx")]


@pytest.fixture(scope="module")
def module() -> object:
    return native.load()


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("rows", "pairs", "columns"), [(16, 16, 16), (3, 16, 16), (16, 5, 16), (16, 16, 7), (1, 1, 1)])
def test_model_multiplies_within_the_configured_shape(module: object, rows: int, pairs: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((16, 32))).bfloat16().double().numpy() for _ in range(2))
    c = rng.standard_normal((16, 16)).astype(np.float32)
    bits = (_bfloat16_bits(a.astype(np.float32)), _bfloat16_bits(b.astype(np.float32)))
    out = module.tile_multiply_add([rows, rows, pairs], [4 * columns, 4 * pairs, 4 * columns], [0, 1, 2], c, *bits)
    # B holds pairs of neighbours on the summed axis: element (2k + i, n) is at row k, column 2n + i.
    unpaired = b.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    expected = np.zeros((16, 16))
    expected[:rows, :columns] = c[:rows, :columns] + a[:rows, : 2 * pairs] @ unpaired[: 2 * pairs, :columns]
    np.testing.assert_allclose(out, expected, rtol=0, atol=40 * 2**-24 * np.abs(expected).max())


def test_model_takes_denormals_as_zero(module: object) -> None:
    zeros = np.zeros((16, 16), dtype=np.float32)
    denormal, large = np.full((16, 32), 0x0001, dtype=np.uint16), np.full((16, 32), 0x7F00, dtype=np.uint16)
    shapes = ([16, 16, 16], [64, 64, 64], [0, 1, 2])
    assert (module.tile_multiply_add(*shapes, zeros, denormal, large) == 0).all()
    assert (module.tile_multiply_add(*shapes, zeros + np.float32(1e-40), denormal, large) == 0).all()


@pytest.mark.parametrize(
    ("rows", "row_bytes", "operands", "message"),
    [
        ([17, 16, 16], [64, 64, 64], [0, 1, 2], "larger than 16 rows"),
        ([16, 16, 16], [68, 64, 64], [0, 1, 2], "larger than 16 rows"),
        ([16, 16, 0], [64, 64, 64], [0, 1, 2], "rows without bytes"),
        ([16, 16, 16], [64, 64, 64], [0, 1, 1], "not different"),
        ([16, 16, 16], [64, 64, 64], [0, 1, 3], "leaves out"),
        ([8, 16, 16], [64, 64, 64], [0, 1, 2], "C and A differ"),
        ([16, 16, 16], [32, 64, 64], [0, 1, 2], "C and B differ"),
        ([16, 16, 16], [64, 32, 64], [0, 1, 2], "A's columns are not B's rows"),
        ([16, 16, 16], [64, 62, 64], [0, 1, 2], "whole numbers"),
    ],
)
def test_model_refuses_what_the_processor_would(
    module: object, rows: list[int], row_bytes: list[int], operands: list[int], message: str
) -> None:
    c, bits = np.zeros((16, 16), dtype=np.float32), np.zeros((16, 32), dtype=np.uint16)
    with pytest.raises(RuntimeError, match=message):
        module.tile_multiply_add(rows, row_bytes, operands, c, bits, bits)


def test_model_refuses_tiles_without_configuration(module: object) -> None:
    with pytest.raises(RuntimeError, match="no tiles are configured"):
        module.use_unconfigured_tile()


def _instructions(path: Path) -> dict[str, list[str]]:
    """The instructions of each function of an object file, as the disassembler prints them."""
    printed = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    functions: dict[str, list[str]] = {}
    for line in printed.stdout.splitlines():
        if name := re.search(r"<(\w+)>:$", line):
            instructions = functions.setdefault(name[1], [])
        elif "\t" in line:
            instructions.append(line.split("\t", 1)[1].strip())
    return functions


@pytest.mark.xfail(platform.machine() != "x86_64", reason="the compiler knows no tiles", strict=True)
def test_assembly_is_what_the_intrinsics_make(tmp_path: Path) -> None:
    """Nothing but the object code shows it where the processor has no tiles."""
    out = tmp_path / "tile_encodings.o"
    flags = ["-std=c++20", "-O2", "-march=sapphirerapids", f"-I{ROOT / 'csrc'}", "-DANCHOR_ATTENTION_ISA=encodings"]
    source = ROOT / "tests" / "native" / "tile_encodings.cpp"
    subprocess.run([os.environ.get("CXX", "c++"), *flags, "-c", str(source), "-o", str(out)], check=True)
    # What follows an operation and its return is padding.
    code = {name: instructions[:2] for name, instructions in _instructions(out).items()}
    mnemonics = {
        "configure": "ldtilecfg",
        "release": "tilerelease",
        "zero": "tilezero",
        "load": "tileloadd",
        "store": "tilestored",
        "multiply_add": "tdpbf16ps",
    }
    for name, mnemonic in mnemonics.items():
        assert code[f"ours_{name}"][0].split()[0] == mnemonic
        assert code[f"ours_{name}"] == code[f"theirs_{name}"]


@pytest.fixture(scope="module")
def library_with_model() -> Path:
    return native.build_library_with_amx_model()


@pytest.mark.parametrize(
    "cases",
    [
        "ops/test_attention.py",
        "ops/test_derivatives.py",
        "cpu/test_cpu_attention.py",
        "cpu/test_edge_shapes.py",
        "cpu/split_float32_cases.py",
    ],
)
@pytest.mark.parametrize("name", SETS)
def test_operation(library_with_model: Path, name: str, cases: str) -> None:
    environment = os.environ | {"ANCHOR_ATTENTION_CPU_ISA": name, "HYPOTHESIS_PROFILE": "brief"}
    if name == "amx_model":
        environment["ANCHOR_ATTENTION_LIBRARY"] = str(library_with_model)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{cases}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
