"""mma.sync: the fragment layouts of the PTX manual, exact products, and the accuracy of the sum."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tools.ptx_emulator.harness import DEVICES, program, run

pytestmark = pytest.mark.parametrize("device", DEVICES)

ROWS, COLUMNS, LANES = 16, 8, 32
F32 = np.float32


def to_bits(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(F32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if kind == "bf16" else bits


def representable(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random float32 values that the type holds exactly."""
    x = rng.standard_normal(shape).astype(F32)
    if kind == "f16":
        return x.astype(np.float16).astype(F32)
    kept = 0xFFFF0000 if kind == "bf16" else 0xFFFFE000
    return (x.view(np.uint32) & np.uint32(kept)).view(F32)


def fragment_a(a: np.ndarray, kind: str) -> np.ndarray:
    """Registers of A (16, k) per lane: the manual's rows `groupID` and `groupID + 8`, columns by thread in group."""
    bits = to_bits(a, kind)
    k = a.shape[1]
    per_register = 1 if kind == "tf32" else 2
    registers = np.zeros((LANES, k // (4 * per_register) * 2), dtype=np.uint32)
    for lane in range(LANES):
        group, thread = divmod(lane, 4)
        for register in range(registers.shape[1]):
            row = group + 8 * (register % 2)
            column = thread * per_register + register // 2 * 4 * per_register
            value = int(bits[row, column])
            if per_register == 2:
                value |= int(bits[row, column + 1]) << 16
            registers[lane, register] = value
    return registers


def fragment_b(b: np.ndarray, kind: str) -> np.ndarray:
    """Registers of B (k, 8) per lane: column `groupID`."""
    bits = to_bits(b, kind)
    per_register = 1 if kind == "tf32" else 2
    registers = np.zeros((LANES, b.shape[0] // (4 * per_register)), dtype=np.uint32)
    for lane in range(LANES):
        group, thread = divmod(lane, 4)
        for register in range(registers.shape[1]):
            row = thread * per_register + register * 4 * per_register
            value = int(bits[row, group])
            if per_register == 2:
                value |= int(bits[row + 1, group]) << 16
            registers[lane, register] = value
    return registers


def fragment_c(c: np.ndarray) -> np.ndarray:
    """Elements of C (16, 8) per lane: rows `groupID` and `groupID + 8`, two neighbouring columns each."""
    elements = np.zeros((LANES, 4), dtype=c.dtype)
    for lane in range(LANES):
        group, thread = divmod(lane, 4)
        for i in range(4):
            elements[lane, i] = c[group + 8 * (i // 2), 2 * thread + i % 2]
    return elements


def matrix_c(elements: np.ndarray) -> np.ndarray:
    c = np.zeros((ROWS, COLUMNS), dtype=elements.dtype)
    for lane in range(LANES):
        group, thread = divmod(lane, 4)
        for i in range(4):
            c[group + 8 * (i // 2), 2 * thread + i % 2] = elements[lane, i]
    return c


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str, device: str, half_sum: bool = False) -> np.ndarray:
    k = a.shape[1]
    registers_a, registers_b = fragment_a(a, kind), fragment_b(b, kind)
    if half_sum:
        pairs = fragment_c(c.astype(np.float16).view(np.uint16)).astype(np.uint32)
        registers_c = np.ascontiguousarray(pairs[:, 0::2] | pairs[:, 1::2] << 16)
    else:
        registers_c = fragment_c(c).view(np.uint32)
    n_a, n_b, n_c = registers_a.shape[1], registers_b.shape[1], registers_c.shape[1]
    names = {
        "a": [f"%r{10 + i}" for i in range(n_a)],
        "b": [f"%r{20 + i}" for i in range(n_b)],
        "c": [f"%r{30 + i}" for i in range(n_c)] if half_sum else [f"%f{i}" for i in range(n_c)],
    }
    kind_c = "b32" if half_sum else "f32"
    lines = []
    for pointer, (name, count, load) in enumerate((("a", n_a, "b32"), ("b", n_b, "b32"), ("c", n_c, kind_c)), start=1):
        lines.append(f"mul.wide.u32 %wide, %thread, {4 * count};\nadd.u64 %rd{pointer}, %rd{pointer}, %wide;")
        lines += [f"ld.global.{load} {register}, [%rd{pointer}+{4 * i}];" for i, register in enumerate(names[name])]
    a_list, b_list, c_list = (", ".join(names[name]) for name in "abc")
    sum_type = "f16" if half_sum else "f32"
    lines.append(
        f"mma.sync.aligned.m16n8k{k}.row.col.{sum_type}.{kind}.{kind}.{sum_type} "
        f"{{{c_list}}}, {{{a_list}}}, {{{b_list}}}, {{{c_list}}};"
    )
    lines.append(f"mul.wide.u32 %wide, %thread, {4 * n_c};\nadd.u64 %rd0, %rd0, %wide;")
    lines += [f"st.global.{kind_c} [%rd0+{4 * i}], {register};" for i, register in enumerate(names["c"])]
    out = np.zeros((LANES, n_c), dtype=np.uint32)
    run(program("\n".join(lines), 4), [out, registers_a, registers_b, registers_c], LANES, device=device)
    if half_sum:
        halves = np.stack([out & 0xFFFF, out >> 16], axis=-1).reshape(LANES, 4).astype(np.uint16)
        return matrix_c(halves.view(np.float16)).astype(F32)
    return matrix_c(out.view(F32))


SHAPES = (("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4))


@pytest.mark.parametrize(("kind", "k"), SHAPES)
def test_layout(kind: str, k: int, device: str) -> None:
    """Small integers make every sum exact, so that one misplaced element shows."""
    rng = np.random.default_rng(0)
    a = rng.integers(-8, 9, (ROWS, k)).astype(F32)
    b = rng.integers(-8, 9, (k, COLUMNS)).astype(F32)
    c = rng.integers(-99, 100, (ROWS, COLUMNS)).astype(F32)
    np.testing.assert_array_equal(multiply(a, b, c, kind, device), a @ b + c)


@pytest.mark.parametrize(("kind", "k"), SHAPES)
def test_accuracy(kind: str, k: int, device: str) -> None:
    rng = np.random.default_rng(1)
    a, b = representable(rng, (ROWS, k), kind), representable(rng, (k, COLUMNS), kind)
    c = rng.standard_normal((ROWS, COLUMNS)).astype(F32)
    got = multiply(a, b, c, kind, device).astype(np.float64)
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    # Every addition, aligned to the largest term, may cut off a unit in the last place of a float32.
    largest = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64) + np.abs(c)
    assert (np.abs(got - exact) <= (k + 1) * 2.0**-23 * largest).all()


@pytest.mark.parametrize("k", (16, 8))
def test_half_accumulator(k: int, device: str) -> None:
    rng = np.random.default_rng(2)
    a = rng.integers(-4, 5, (ROWS, k)).astype(F32)
    b = rng.integers(-4, 5, (k, COLUMNS)).astype(F32)
    c = rng.integers(-99, 100, (ROWS, COLUMNS)).astype(F32)
    np.testing.assert_array_equal(multiply(a, b, c, "f16", device, half_sum=True), a @ b + c)


def test_tf32_ignores_the_low_bits(device: str) -> None:
    rng = np.random.default_rng(3)
    a, b = representable(rng, (ROWS, 8), "tf32"), representable(rng, (8, COLUMNS), "tf32")
    c = np.zeros((ROWS, COLUMNS), dtype=F32)
    noisy = (a.view(np.uint32) | 0x1FFF).view(F32)
    np.testing.assert_array_equal(multiply(noisy, b, c, "tf32", device), multiply(a, b, c, "tf32", device))


@pytest.mark.parametrize("kind", ("bf16", "f16", "tf32"))
def test_non_finite_values(kind: str, device: str) -> None:
    a = np.zeros((ROWS, 8), dtype=F32)
    b = np.ones((8, COLUMNS), dtype=F32)
    c = np.zeros((ROWS, COLUMNS), dtype=F32)
    a[0, 0], a[1, 1], a[2, 2], a[2, 3] = np.inf, -np.inf, np.inf, -np.inf
    c[3], c[4] = np.nan, np.inf
    b[4, 5] = np.inf
    got = multiply(a, b, c, kind, device)
    with np.errstate(invalid="ignore"):
        expected = np.array([[np.sum(a[i] * b[:, j]) + c[i, j] for j in range(COLUMNS)] for i in range(ROWS)])
    np.testing.assert_array_equal(got, expected)
