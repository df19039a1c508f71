"""Every PTX wrapper of the kernels against its definition in the PTX manual, emulated and, where one is, on a GPU.

The expectations are the same: the hardware proves the emulator.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tools.cuda_plans.build import primitives_library, primitives_ptx
from tools.cuda_plans.run import from_storage, to_storage
from tools.ptx_emulator import Memory, Module

pytestmark = [pytest.mark.emulator, pytest.mark.needs_nvcc]

Words = NDArray[np.uint32]
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
DEVICES = ["emulated", *(["cuda"] if torch.cuda.is_available() else [])]
# Signed zeros, subnormals, ties of every rounding below, the largest finite number, infinities, NaN.
SPECIALS = np.array(
    [0, 0x80000000, 1, 0x807FFFFF, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0xBF801000, 0x3F800FFF,
     0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001,
     0x38800000, 0x387FC000],
    np.uint32,
)  # fmt: skip


@cache
def _module() -> Module:
    return Module.from_ptx(primitives_ptx())


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(primitives_library()))


def run(device: str, kernel: str, words: Words) -> Words:
    """The kernel's output, as many words as its input, on one warp."""
    source = np.ascontiguousarray(words, np.uint32).reshape(-1)
    out = np.zeros(max(source.size, 128), np.uint32)
    source = np.concatenate([source, np.zeros(out.size - source.size, np.uint32)])
    if device == "cuda":
        pointer = ctypes.POINTER(ctypes.c_uint32)
        arguments = (source.ctypes.data_as(pointer), out.ctypes.data_as(pointer), source.size)
        assert _library().run_kernel(kernel.encode(), *arguments) == 0
        return out
    memory = Memory()
    params = [memory.register(source, "in"), memory.register(out, "out", writable=True, poisoned=True)]
    _module().launch(kernel, 1, 32, 0, params, memory)
    return out


def float_words(values: NDArray[Any]) -> Words:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def random_floats(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Every exponent that half precision has, both signs."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1.0, 1.0], count) * 2.0 ** rng.uniform(-26, 17, count)).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dtype"), [("mma_bf16", "bfloat16"), ("mma_f16", "float16"), ("mma_tf32", "tf32")])
def test_mma(device: str, kernel: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    per_word = 1 if dtype == "tf32" else 2
    k = 8 * per_word
    a, b, d = rng.normal(size=(16, k)), rng.normal(size=(k, 8)), rng.normal(size=(16, 8)).astype(np.float32)
    if dtype == "tf32":
        # The bits that the type does not have are ignored.
        a_bits, b_bits = float_words(a), float_words(b)
        a, b = ((bits & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64) for bits in (a_bits, b_bits))
    else:
        a_bits, b_bits = (to_storage(x, dtype).astype(np.uint32) for x in (a, b))
        a, b = from_storage(a_bits.astype(np.uint16), dtype), from_storage(b_bits.astype(np.uint16), dtype)

    def packed(bits: Words, elements: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Words:
        parts = [bits[at] << np.uint32(16 * i) for i, at in enumerate(elements)]
        return np.array(np.bitwise_or.reduce(parts), np.uint32)

    words = []
    for register in range(4):
        row, column = G + 8 * (register % 2), T * per_word + 4 * per_word * (register // 2)
        words.append(packed(a_bits, [(row, column + i) for i in range(per_word)]))
    for register in range(2):
        row = T * per_word + 4 * per_word * register
        words.append(packed(b_bits, [(row + i, G) for i in range(per_word)]))
    at = [(G + 8 * (register // 2), 2 * T + register % 2) for register in range(4)]
    words += [float_words(d[place]) for place in at]
    out = run(device, kernel, np.stack(words))[:128].view(np.float32).reshape(4, 32)
    # Products are exact; each of the k + 1 numbers, and the sum, may lose what lies below 24 bits of the largest.
    bound = (k + 2) * 2.0**-23 * (np.abs(a) @ np.abs(b) + np.abs(d))
    for register, place in enumerate(at):
        error = np.abs(out[register] - (a @ b + d)[place])
        assert (error <= bound[place]).all(), error.max()


@pytest.mark.parametrize("device", DEVICES)
def test_ldmatrix(device: str) -> None:
    words = np.random.default_rng(2).integers(0, 1 << 32, 128, np.uint32)
    halves = words.view(np.uint16).reshape(4, 8, 8).astype(np.uint32)
    plain = halves[:, G, 2 * T] | halves[:, G, 2 * T + 1] << 16
    transposed = halves[:, 2 * T, G] | halves[:, 2 * T + 1, G] << 16
    np.testing.assert_array_equal(run(device, "ldmatrix", words).reshape(4, 32), plain)
    np.testing.assert_array_equal(run(device, "ldmatrix_transposed", words).reshape(4, 32), transposed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_bytes", [4, 8, 16])
def test_cp_async(device: str, n_bytes: int) -> None:
    words = np.random.default_rng(3).integers(0, 1 << 32, (32, 4), np.uint32)
    expected = np.full((32, 4), 0xFFFFFFFF, np.uint32)
    expected[:, : n_bytes // 4] = np.where(LANES[:, None] % 2 == 0, words[:, : n_bytes // 4], 0)
    np.testing.assert_array_equal(run(device, f"cp_async_{n_bytes}", words).reshape(32, 4), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dtype"), [("pack_bf16x2", "bfloat16"), ("pack_f16x2", "float16")])
def test_packing_rounds_to_nearest_even(device: str, kernel: str, dtype: str) -> None:
    low = np.concatenate([SPECIALS.view(np.float32), random_floats(32 - SPECIALS.size)])
    high = random_floats(32, seed=1)
    out = run(device, kernel, np.stack([float_words(low), float_words(high)]))[:32]
    torch_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    for values, bits in ((low, out & 0xFFFF), (high, out >> 16)):
        expected = torch.from_numpy(values).to(torch_dtype).to(torch.float64).numpy()
        np.testing.assert_array_equal(from_storage(bits.astype(np.uint16), dtype), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "dtype"), [("bf16_to_float", "bfloat16"), ("f16_to_float", "float16")])
def test_widening_is_exact(device: str, kernel: str, dtype: str) -> None:
    bits = np.random.default_rng(4).integers(0, 1 << 16, 32, np.uint32)
    bits[:8] = [0, 0x8000, 1, 0x03FF, 0x7C00, 0xFC00, 0x7F80, 0xFF80]
    out = run(device, kernel, bits)[:32].view(np.float32)
    np.testing.assert_array_equal(out.astype(np.float64), from_storage(bits.astype(np.uint16), dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_round_to_tf32_goes_to_nearest_and_ties_away_from_zero(device: str) -> None:
    values = np.concatenate([SPECIALS.view(np.float32), random_floats(32 - SPECIALS.size, seed=2)])
    out = run(device, "round_to_tf32", float_words(values))[:32]
    finite = np.isfinite(values) & (np.abs(values) < 3.4e38)
    expected = (float_words(values) + np.uint32(0x1000)) & ~np.uint32(0x1FFF)
    np.testing.assert_array_equal(out[finite], expected[finite])
    nan = np.isnan(values)
    assert np.isnan(out.view(np.float32)[nan]).all()
    infinite = np.isinf(values)
    np.testing.assert_array_equal(out.view(np.float32)[infinite], values[infinite])


@pytest.mark.parametrize("device", DEVICES)
def test_exp2_and_log2_are_as_exact_as_documented(device: str) -> None:
    x = np.concatenate([np.linspace(-125, 127, 24), [0, -0.0, 1, -1, 0.5, 1e-6, -np.inf, np.inf]]).astype(np.float32)
    y = run(device, "exp2_approx", float_words(x))[:32].view(np.float32).astype(np.float64)
    np.testing.assert_allclose(y, np.exp2(x.astype(np.float64)), rtol=2.0**-22)
    x = np.concatenate([2.0 ** np.linspace(-125, 126, 24), [0, 1, 0.51, 1.99, 0.99, 1.01, np.inf, 2]]).astype(
        np.float32
    )
    y = run(device, "log2_approx", float_words(x))[:32].view(np.float32).astype(np.float64)
    with np.errstate(divide="ignore"):
        expected = np.log2(x.astype(np.float64))
    np.testing.assert_allclose(y, expected, rtol=2.0**-22, atol=2.0**-22)


@pytest.mark.parametrize("device", DEVICES)
def test_exp2_by_a_polynomial(device: str) -> None:
    """Between every two neighbouring halves of integers, and where powers become zero."""
    rng = np.random.default_rng(6)
    for start in range(-126, 126, 16):
        x = np.minimum(start + 16 * rng.random(32), 126).astype(np.float32)
        y = run(device, "exp2_polynomial", float_words(x))[:32].view(np.float32).astype(np.float64)
        np.testing.assert_allclose(y, np.exp2(x.astype(np.float64)), rtol=2.0**-22.5)
    x = np.full(32, -127.5, np.float32)
    x[:8] = [0, -0.0, 1, 126, -126.6, -1000, -np.inf, np.nan]
    y = run(device, "exp2_polynomial", float_words(x))[:32].view(np.float32)
    np.testing.assert_array_equal(y[:8], np.array([1, 1, 2, 2.0**126, 0, 0, 0, np.nan], np.float32))
    assert not y[8:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_maximum_keeps_nan(device: str) -> None:
    a, b = random_floats(32), random_floats(32, seed=1)
    a[0] = b[1] = np.nan
    a[2], b[2] = -np.inf, 3
    out = run(device, "maximum_or_nan", np.stack([float_words(a), float_words(b)]))[:32].view(np.float32)
    np.testing.assert_array_equal(out, np.maximum(a, b))


@pytest.mark.parametrize("device", DEVICES)
def test_shared_accesses(device: str) -> None:
    words = np.random.default_rng(5).integers(0, 1 << 30, (4, 32), np.uint32)
    out = run(device, "shared_accesses", words)
    np.testing.assert_array_equal(out[:32], words[3, LANES ^ 1])
    np.testing.assert_array_equal(out[32:64], words[0, LANES ^ 1])
    np.testing.assert_array_equal(out[64:96], words[1, LANES ^ 1])


@pytest.mark.parametrize("device", DEVICES)
def test_ordering(device: str) -> None:
    addends = np.uint32(1) << (LANES % 30).astype(np.uint32)
    out = run(device, "ordering", addends)
    assert out[0] == addends.sum()
    before = out[32:64].astype(np.int64)
    order = np.argsort(before)
    np.testing.assert_array_equal(before[order], np.cumsum(addends[order]) - addends[order])
    np.testing.assert_array_equal(out[96:128], np.full(32, addends[0]))
