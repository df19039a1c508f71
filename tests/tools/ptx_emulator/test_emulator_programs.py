"""Programs that nvcc compiled: pipelines, reductions, divergent loops, mathematics; sound and with planted defects."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tools.nvcc import find_nvcc, nvcc
from tools.ptx_emulator import Counters, Memory, Module, RaceError, UninitializedReadError
from tools.ptx_emulator.launch import Parameter

from tests.tools.ptx_emulator.fixtures import generate

PTX = Path(generate.__file__).with_name("programs.ptx")
SOURCE = PTX.with_suffix(".cu").read_text().splitlines()
SEEDS = range(4)


@pytest.fixture(scope="module")
def module() -> Module:
    """The committed text; where nvcc is, it must be what nvcc makes of the source."""
    text = PTX.read_text()
    if find_nvcc() is not None:
        body = re.compile(r"^\.version.*\n", re.MULTILINE)
        assert body.sub("", generate.compile_programs()) == body.sub("", text), (
            "run python -m tests.tools.ptx_emulator.fixtures.generate"
        )
    return Module.from_ptx(text)


class Weights(ctypes.Structure):
    _fields_ = (("value", ctypes.c_float * 8), ("stride", ctypes.c_int64))


def test_reduction_with_a_struct_parameter(module: Module) -> None:
    rng = np.random.default_rng(0)
    # Integers: every order of summation gives the same float.
    padded = rng.integers(-9, 10, (6, 140)).astype(np.float32)
    weights = rng.integers(-3, 4, 8).astype(np.float32)
    out = np.zeros((2, 3), dtype=np.float32)
    memory = Memory()
    parameters: list[Parameter] = [
        memory.register(padded, "in"),
        memory.register(out, "out", writable=True, poisoned=True),
        Weights((ctypes.c_float * 8)(*weights), 140),
    ]
    module.launch("weighted_rows", (3, 2), 128, 0, parameters, memory)
    np.testing.assert_array_equal(out.ravel(), padded[:, :128] @ np.tile(weights, 16))
    assert not memory.unwritten("out").any()


def run_multiply(module: Module, kernel: str, k: int, seed: int) -> tuple[Counters, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-4, 5, (64, k)).astype(np.float32) for _ in range(2))
    halves = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
    c = np.zeros((64, 64), dtype=np.float32)
    memory = Memory()
    parameters = [memory.register(x, name) for x, name in zip(halves, "ab", strict=True)]
    parameters += [memory.register(c, "c", writable=True, poisoned=True, write_once=True), k]
    return module.launch(kernel, 1, 128, 0, parameters, memory, seed=seed), c, a @ b.T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", (32, 64, 160))
def test_pipelined_matrix_product(module: Module, k: int, seed: int) -> None:
    counters, c, expected = run_multiply(module, "multiply_sound", k, seed)
    np.testing.assert_array_equal(c, expected)
    assert counters.tensor_core() == {"m16n8k16.f32.bf16.bf16.f32": 4 * 8 * k // 16}
    # Rows of 64 bytes, 80 apart: eight of them are in different banks for a matrix load, but of two rows that a quarter
    # of a warp copies, the second one's end wraps around to the banks of the first.
    for operation, entry in counters.shared_memory().items():
        copies = operation.startswith("cp.async")
        assert entry["conflicts"] == (4 * entry["requests"] if copies else 0)
    assert counters.global_memory()["cp.async.cg.shared.global"] == {"requests": 4 * 4 * k // 32, "sectors": 8 * k}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "errors", "line"),
    (
        ("multiply_no_wait", (UninitializedReadError,), "ldmatrix"),
        ("multiply_no_barrier", (UninitializedReadError, RaceError), "ldmatrix|cp.async"),
        ("multiply_early_reuse", (RaceError, UninitializedReadError), "cp.async|ldmatrix"),
    ),
)
def test_pipeline_defects(
    module: Module, kernel: str, errors: tuple[type[Exception], ...], line: str, seed: int
) -> None:
    with pytest.raises(errors) as caught:
        run_multiply(module, kernel, 160, seed)
    report = str(caught.value)
    assert f"in kernel {kernel}, block (0, 0, 0), warp" in report
    place = re.search(r"PTX line (\d+), programs\.cu:(\d+)", report)
    assert place is not None
    assert re.search(line, PTX.read_text().splitlines()[int(place[1]) - 1])
    # The compiler places inline assembly at the last line of its statement.
    assert re.search(line, " ".join(SOURCE[int(place[2]) - 4 : int(place[2])]))


def run_transpose(module: Module, kernel: str, seed: int) -> Counters:
    matrix = np.arange(1024, dtype=np.float32).reshape(32, 32)
    out = np.zeros_like(matrix)
    memory = Memory()
    parameters = [
        memory.register(matrix, "in"),
        memory.register(out, "out", writable=True, poisoned=True, write_once=True),
    ]
    counters = module.launch(kernel, 1, (32, 8), 0, parameters, memory, seed=seed)
    np.testing.assert_array_equal(out, matrix.T)
    return counters


def test_bank_conflicts_of_a_transposition(module: Module) -> None:
    # 32 column reads of 32 words in one bank.
    for kernel, conflicts in (("transpose_plain", 32 * 31), ("transpose_padded", 0)):
        assert run_transpose(module, kernel, 0).totals()["bank_conflicts"] == conflicts


def test_divergent_loops(module: Module) -> None:
    numbers = np.arange(1, 257, dtype=np.uint32)
    out = np.zeros_like(numbers)
    memory = Memory()
    parameters = [memory.register(numbers, "in"), memory.register(out, "out", writable=True)]
    counters = module.launch("collatz", 2, 128, 0, parameters, memory)

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n, count = (3 * n + 1 if n % 2 else n // 2), count + 1
        return count

    expected = [steps(int(n)) for n in numbers]
    assert out.tolist() == expected
    # Lanes reconverge: a warp runs its loop as often as its slowest lane, not as often as all lanes together.
    slowest = sum(max(expected[first : first + 32]) for first in range(0, 256, 32))
    shuffle = next(i for i in counters.instructions() if i.operation.startswith("shfl"))
    assert (shuffle.warps, shuffle.threads) == (8, 256)
    loop = max(i.warps for i in counters.instructions())
    assert slowest <= loop <= slowest + 8


def run_histogram(module: Module, seed: int) -> None:
    data = np.random.default_rng(2).integers(0, 256, 5001).astype(np.uint8)
    bins = np.zeros(256, dtype=np.uint32)
    memory = Memory()
    parameters = [memory.register(data, "in"), memory.register(bins, "out", writable=True), len(data)]
    module.launch("histogram", 3, 96, 0, parameters, memory, seed=seed, concurrent_blocks=2)
    np.testing.assert_array_equal(bins, np.bincount(data, minlength=256))


@pytest.mark.parametrize("seed", SEEDS)
def test_histogram(module: Module, seed: int) -> None:
    run_histogram(module, seed)


def test_mathematical_library(module: Module) -> None:
    x = np.random.default_rng(3).uniform(-6, 6, 128).astype(np.float32)
    out = np.zeros((128, 6), dtype=np.float32)
    memory = Memory()
    parameters = [memory.register(x, "in"), memory.register(out, "out", writable=True, poisoned=True)]
    module.launch("mathematics", 1, 128, 0, parameters, memory)
    wide = x.astype(np.float64)
    expected = np.stack(
        [np.exp(wide), np.log(np.abs(x) + np.float32(0.5), dtype=np.float64), 1 / (wide * wide + 3),
         np.sqrt(np.abs(wide)), np.tanh(wide), np.exp(wide) * 1e-3], axis=1)  # fmt: skip
    # The CUDA programming guide bounds these functions by 2 units in the last place; the argument of the reciprocal
    # adds two roundings of its own.
    spacing = np.spacing(np.maximum(np.abs(expected), 2.0**-20).astype(np.float32)).astype(np.float64)
    assert (np.abs(out - expected) <= 3 * spacing).all()


def run_last_block(module: Module, concurrent_blocks: int, seed: int) -> None:
    values = np.random.default_rng(4).integers(-50, 50, 8 * 64).astype(np.float32)
    partial, ticket, out = np.zeros(8, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    memory = Memory()
    parameters = [
        memory.register(values, "in"),
        memory.register(partial, "partial", writable=True, poisoned=True),
        memory.register(ticket, "ticket", writable=True),
        memory.register(out, "out", writable=True, poisoned=True),
    ]
    module.launch("last_block_sums", 8, 64, 0, parameters, memory, seed=seed, concurrent_blocks=concurrent_blocks)
    assert out[0] == values.sum()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("concurrent_blocks", (1, 4))
def test_last_block_adds_up(module: Module, concurrent_blocks: int, seed: int) -> None:
    run_last_block(module, concurrent_blocks, seed)


def test_repeated_launches_agree(module: Module) -> None:
    """The result does not depend on the seed, and buffers can be released and registered again."""
    memory = Memory()
    numbers = np.arange(1, 65, dtype=np.uint32)
    results = []
    for seed in SEEDS:
        out = np.zeros_like(numbers)
        parameters = [memory.register(numbers, "in"), memory.register(out, "out", writable=True)]
        module.launch("collatz", 2, 32, 0, parameters, memory, seed=seed)
        memory.release("in")
        memory.release("out")
        results.append(out.tolist())
    assert all(result == results[0] for result in results)


def library_with_ptx(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that nvcc builds, or without nvcc a file that a stand-in for cuobjdump reads."""
    library = directory / "libprograms.so"
    if find_nvcc() is not None:
        command = [nvcc(), "-shared", "-Xcompiler", "-fPIC", "-std=c++20", "-lineinfo", "-cudart", "none"]
        command += ["-gencode", "arch=compute_80,code=[sm_80,compute_80]", str(PTX.with_suffix(".cu"))]
        command += ["-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        return library
    library.write_bytes(PTX.read_bytes())
    tool = directory / "cuobjdump"
    tool.write_text('#!/bin/sh\ncp "$3" programs.sm_80.ptx\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUOBJDUMP", str(tool))
    return library


def test_ptx_comes_out_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (extracted,) = Module.from_library(library_with_ptx(tmp_path, monkeypatch))
    assert set(extracted.text.kernels) == set(Module.from_ptx(PTX).text.kernels)
    _, c, expected = run_multiply(extracted, "multiply_sound", 64, 0)
    np.testing.assert_array_equal(c, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "pattern"),
    (
        ("multiply_sound", r"bar\.sync\s+0;|cp\.async\.wait_group \d;"),
        ("last_block_sums", r"bar\.sync\s+0;|membar\.gl;"),
        ("histogram", r"bar\.sync\s+0;"),
        ("transpose_plain", r"bar\.sync\s+0;"),
    ),
)
def test_every_synchronisation_is_missed_when_it_is_gone(kernel: str, pattern: str, seed: int) -> None:
    """Each barrier, fence and wait of a sound kernel is deleted in turn."""
    text = PTX.read_text()
    begin = text.index(f".entry {kernel}(")
    end = text.find(".entry", begin + 1)
    places = [match for match in re.finditer(pattern, text) if begin < match.start() < (end if end > 0 else len(text))]
    assert places
    runs: dict[str, Callable[[Module], object]] = {
        "multiply_sound": lambda module: run_multiply(module, kernel, 160, seed),
        "last_block_sums": lambda module: run_last_block(module, 4, seed),
        "histogram": lambda module: run_histogram(module, seed),
        "transpose_plain": lambda module: run_transpose(module, kernel, seed),
    }
    runs[kernel](Module.from_ptx(text))
    for place in places:
        mutant = Module.from_ptx(text[: place.start()] + text[place.end() :])
        with pytest.raises((RaceError, UninitializedReadError)):
            runs[kernel](mutant)
