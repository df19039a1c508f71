"""Copies, atomics, reductions, transposes, functions and conversions by Triton."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import DTypeLike

pytest.importorskip("triton", reason="Triton is not installed: `make test-corpus` installs it")

from tests.tools.corpus import kernels
from tests.tools.corpus.programs import Array, Pointer, Tiles, check, compiled, random_matrix, run, stored

capabilities = pytest.mark.parametrize("capability", [80, 90])


@pytest.mark.parametrize(
    ("kind", "columns", "swizzle"), [("bf16", 16, 1), ("bf16", 32, 2), ("fp16", 64, 3), ("fp32", 64, 3)]
)
def test_copies_by_tma(kind: str, columns: int, swizzle: int) -> None:
    """Boxes that stand out over the edges: what is beyond is not written."""
    source = random_matrix(np.random.default_rng(columns), (72, columns + 16), kind)
    target = stored(np.full(source.shape, np.nan), kind)
    tiles = [Tiles(x, kind, (64, columns)) for x in (source, target)]
    program = run(kernels.copy_by_tma, [2, 2], tiles, {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": columns}, 90)
    assert program.swizzles == (swizzle, swizzle)
    np.testing.assert_array_equal(target, source)


def test_sums_by_tma() -> None:
    source = np.random.default_rng(0).standard_normal((192, 32)).astype(np.float32)
    total = np.zeros((64, 32), np.float32)
    run(kernels.add_by_tma, [3], [Tiles(x, "fp32", (64, 32)) for x in (source, total)], {"BLOCK_ROWS": 64}, 90)
    parts = source.reshape(3, 64, 32).astype(np.float64)
    check(total, parts.sum(0), 2.0**-22 * np.abs(parts).sum(0), "sum")


@capabilities
def test_atomics(capability: int) -> None:
    n, n_bins = 1000, 40
    rng = np.random.default_rng(1)
    x, bin_of = rng.standard_normal(n).astype(np.float32), rng.integers(3, n_bins, n).astype(np.int32)
    sums, counts, total = np.zeros(n_bins, np.float32), np.zeros(n_bins, np.int32), np.zeros(1, np.float32)
    largest, smallest = np.full(1, -9, np.float32), np.full(1, 99, np.int32)
    arguments = [
        Pointer(x, "fp32"), Pointer(bin_of, "i32"), Pointer(sums, "fp32"), Pointer(counts, "i32"),
        Pointer(total, "fp32"), Pointer(largest, "fp32"), Pointer(smallest, "i32"), n,
    ]  # fmt: skip
    run(kernels.atomics, [4], arguments, {"BLOCK": 256}, capability)
    sizes = np.bincount(bin_of, np.abs(x).astype(np.float64), n_bins)
    check(sums, np.bincount(bin_of, x.astype(np.float64), n_bins), n * 2.0**-24 * sizes, "sums")
    np.testing.assert_array_equal(counts, np.bincount(bin_of, minlength=n_bins))
    assert abs(total[0] - x.sum(dtype=np.float64)) <= n * 2.0**-24 * sizes.sum()
    assert largest[0] == x.max() and smallest[0] == bin_of.min()


@capabilities
def test_compare_and_swap(capability: int) -> None:
    locks, winners = np.zeros(4, np.int32), np.zeros(4, np.int32)
    run(kernels.compare_and_swap, [12], [Pointer(locks, "i32"), Pointer(winners, "i32")], {"BLOCK": 4}, capability)
    assert (locks == 1).all() and (winners == 1).all()


@capabilities
def test_reductions(capability: int) -> None:
    shape = (16, 64)
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    sums, maxima, places = np.zeros(64, np.float32), np.zeros(16, np.float32), np.zeros(16, np.int32)
    running, ordered = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    arguments = [
        Pointer(x, "fp32"), Pointer(sums, "fp32"), Pointer(maxima, "fp32"), Pointer(places, "i32"),
        Pointer(running, "fp32"), Pointer(ordered, "fp32"),
    ]  # fmt: skip
    run(kernels.reductions, [1], arguments, {"ROWS": 16, "COLUMNS": 64}, capability)
    exact = x.astype(np.float64)
    check(sums, exact.sum(0), 16 * 2.0**-24 * np.abs(exact).sum(0), "sums")
    check(running, exact.cumsum(1), 64 * 2.0**-24 * np.abs(exact).cumsum(1), "running sums")
    np.testing.assert_array_equal(maxima, x.max(1))
    np.testing.assert_array_equal(places, x.argmax(1))
    np.testing.assert_array_equal(ordered, np.sort(x, 1))


@capabilities
@pytest.mark.parametrize(
    ("kind", "dtype"), [("i8", np.int8), ("i16", np.int16), ("fp32", np.float32), ("i64", np.int64)]
)
def test_transposes(capability: int, kind: str, dtype: DTypeLike) -> None:
    x = np.random.default_rng(3).integers(0, 100, (70, 50)).astype(dtype)
    y = np.zeros((50, 70), dtype)
    constants = {"ROWS": 70, "COLUMNS": 50, "BLOCK": 32}
    run(kernels.transpose, [3, 2], [Pointer(x, kind), Pointer(y, kind)], constants, capability)
    np.testing.assert_array_equal(y, x.T)


@capabilities
def test_functions(capability: int) -> None:
    n = 512
    x = 3 * np.random.default_rng(4).standard_normal(n).astype(np.float32)
    y = np.full((8, n), np.nan, np.float32)
    run(kernels.functions, [1], [Pointer(x, "fp32"), Pointer(y, "fp32")], {"BLOCK": n}, capability)
    exact = x.astype(np.float64)
    size = np.abs(exact)
    expected = [
        np.exp(exact), np.log(size + 1), np.sqrt(size), 1 / np.sqrt(size + 1), np.vectorize(math.erf)(exact),
        np.floor(exact), 1 / (1 + np.exp(-exact)), 1 / (size + 1),
    ]  # fmt: skip
    for row, values in zip(y, expected, strict=True):
        # The exponent x · log2(e) is rounded, and so is size + 1, of which the logarithm is taken.
        check(row, values, 2.0**-21 * np.abs(values) * (1 + size) + 2.0**-22, "function")


def philox(seed: int, n: int) -> Array:
    """First words of Philox-4x32 with ten rounds, for the counters (i, 0, 0, 0)."""
    words = [np.arange(n, dtype=np.uint64), *(np.zeros(n, np.uint64) for _ in range(3))]
    keys = [seed, 0]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            second >> np.uint64(32) ^ words[1] ^ np.uint64(keys[0]), second & low,
            first >> np.uint64(32) ^ words[3] ^ np.uint64(keys[1]), first & low,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words[0].astype(np.uint32)


@capabilities
def test_random_bits(capability: int) -> None:
    y = np.zeros(1024, np.uint32)
    run(kernels.random_bits, [4], [Pointer(y, "i32"), 7], {"BLOCK": 256}, capability)
    np.testing.assert_array_equal(y, philox(7, 1024))


@capabilities
def test_conversions(capability: int) -> None:
    n = 256
    x = (40 * np.random.default_rng(5).standard_normal(n)).astype(np.float32)
    half, bfloat, byte = np.zeros(n, np.float16), np.zeros(n, np.uint16), np.zeros(n, np.int8)
    quotient, remainder, wide = np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int64)
    arguments = [
        Pointer(x, "fp32"), Pointer(half, "fp16"), Pointer(bfloat, "bf16"), Pointer(byte, "i8"),
        Pointer(quotient, "i32"), Pointer(remainder, "i32"), Pointer(wide, "i64"),
    ]  # fmt: skip
    run(kernels.conversions, [1], arguments, {"BLOCK": n}, capability)
    whole = np.trunc(x).astype(np.int32)
    np.testing.assert_array_equal(half, x.astype(np.float16))
    np.testing.assert_array_equal(bfloat, stored(x, "bf16"))
    np.testing.assert_array_equal(byte, whole.astype(np.int8))
    # As in C, a quotient is cut toward zero.
    np.testing.assert_array_equal(quotient, np.trunc(whole / 7).astype(np.int32))
    np.testing.assert_array_equal(remainder, np.fmod(whole, 7))
    np.testing.assert_array_equal(wide, whole.astype(np.int64) * 0x100000001)


@capabilities
def test_division_of_doubles(capability: int) -> None:
    """Starts from rcp.approx.ftz.f64 and refines."""
    n = 128
    rng = np.random.default_rng(6)
    x, y, z = rng.standard_normal(n), rng.standard_normal(n), np.zeros(n)
    arguments = [Pointer(array, "fp64") for array in (x, y, z)]
    program = compiled(kernels.double_division, arguments, {"BLOCK": n}, capability)
    program.run([1], arguments)
    np.testing.assert_array_equal(z, x / y)
