"""Floating-point instructions and conversions: rounding modes, flushed subnormals, saturation, NaN, approximations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import DTypeLike

from tests.tools.ptx_emulator.harness import DEVICES, apply

pytestmark = pytest.mark.parametrize("device", DEVICES)

F32 = np.float32
CANONICAL_NAN = 0x7FFFFFFF
SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, -7.25, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 1.1754944e-38, 3.4028235e38,
     -3.4028235e38, 1e-20, 16777217.0, 0.1, 2.0**-24, 1 + 2.0**-23],
    dtype=F32,
)  # fmt: skip


def crossed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(values, values)
    return a.ravel(), b.ravel()


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x).astype(F32)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, with one NaN."""
    expected_bits = np.where(np.isnan(expected), CANONICAL_NAN, expected.view(np.uint32))
    np.testing.assert_array_equal(got.view(np.uint32), expected_bits.astype(np.uint32))


def round_fraction(exact: Fraction, mode: str) -> float:
    """The float32 that a rounding mode gives; `exact` is within the finite range."""
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = max(math.floor(math.log2(magnitude)) - 25, -149)
    # log2 is inexact: settle the exponent so that the quotient has 24 bits.
    while magnitude / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and magnitude / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    scaled = exact / Fraction(2) ** exponent
    down = math.floor(scaled)
    if scaled == down:
        integer = down
    elif mode == "rn":
        twice = scaled - down
        integer = down + (1 if twice > Fraction(1, 2) or (twice == Fraction(1, 2) and down % 2) else 0)
    else:
        integer = {"rz": down if exact > 0 else down + 1, "rm": down, "rp": down + 1}[mode]
    return math.ldexp(integer, exponent)


BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div.rn": np.divide,
}  # fmt: skip


@pytest.mark.parametrize("ftz", ("", ".ftz"))
@pytest.mark.parametrize("opcode", BINARY)
def test_binary(opcode: str, ftz: str, device: str) -> None:
    a, b = crossed(SPECIAL)
    got = apply(f"{opcode}{ftz}.f32 {{d}}, {{0}}, {{1}};", [("f32", a), ("f32", b)], "f32", F32, device)
    with np.errstate(all="ignore"):
        expected = flushed(BINARY[opcode](flushed(a), flushed(b))) if ftz else BINARY[opcode](a, b)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
@pytest.mark.parametrize("opcode", ("add", "mul", "div", "fma", "sqrt", "rcp"))
def test_rounding_modes(opcode: str, mode: str, device: str) -> None:
    rng = np.random.default_rng(3)
    scale = F32(2.0) ** rng.integers(-20, 20, (3, 256)).astype(F32)
    a, b, c = (rng.standard_normal((3, 256)).astype(F32) * scale).astype(F32)
    exact_values = [[Fraction(float(x)) for x in array] for array in (a, b, c)]
    arity = {"fma": 3, "sqrt": 1, "rcp": 1}.get(opcode, 2)
    if opcode == "sqrt":
        a = np.abs(a)
    operands = [("f32", x) for x in (a, b, c)[:arity]]
    places = ", ".join(f"{{{i}}}" for i in range(arity))
    got = apply(f"{opcode}.{mode}.f32 {{d}}, {places};", operands, "f32", F32, device)
    if opcode == "sqrt":
        # A float64 root of a float32 is never close enough to a rounding boundary to mislead, unless it is exact.
        exact = [Fraction(math.sqrt(float(x))) for x in a]
    else:
        formula: dict[str, Callable[..., Fraction]] = {
            "add": lambda x, y, z: x + y, "mul": lambda x, y, z: x * y, "div": lambda x, y, z: x / y,
            "fma": lambda x, y, z: x * y + z, "rcp": lambda x, y, z: 1 / x,
        }  # fmt: skip
        exact = [formula[opcode](x, y, z) for x, y, z in zip(*exact_values, strict=True)]
    np.testing.assert_array_equal(got, np.array([round_fraction(value, mode) for value in exact], dtype=F32))


@pytest.mark.parametrize("opcode", ("add.sat", "mul.sat", "fma.rn.sat"))
def test_saturation(opcode: str, device: str) -> None:
    a, b = crossed(SPECIAL)
    c = np.full_like(a, 0.25)
    arity = 3 if "fma" in opcode else 2
    operands = [("f32", x) for x in (a, b, c)[:arity]]
    got = apply(f"{opcode}.f32 {{d}}, {', '.join(f'{{{i}}}' for i in range(arity))};", operands, "f32", F32, device)
    with np.errstate(all="ignore"):
        wide = a.astype(np.float64) * b + 0.25 if "fma" in opcode else (a + b if "add" in opcode else a * b)
        expected = np.where(np.isnan(wide), 0, np.clip(wide.astype(F32), 0, 1)).astype(F32)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("suffix", ("", ".NaN", ".ftz"))
@pytest.mark.parametrize("opcode", ("min", "max"))
def test_min_max(opcode: str, suffix: str, device: str) -> None:
    a, b = crossed(SPECIAL)
    got = apply(f"{opcode}{suffix}.f32 {{d}}, {{0}}, {{1}};", [("f32", a), ("f32", b)], "f32", F32, device)
    expected = []
    for x, y in zip(*((flushed(a), flushed(b)) if suffix == ".ftz" else (a, b)), strict=True):
        if np.isnan(x) or np.isnan(y):
            both = np.isnan(x) and np.isnan(y)
            expected.append(F32(np.nan) if both or suffix == ".NaN" else (y if np.isnan(x) else x))
            continue
        # Negative zero is smaller than positive zero.
        ordered = sorted((x, y), key=lambda v: (float(v), not np.signbit(v)))
        expected.append(ordered[0 if opcode == "min" else 1])
    assert_same_bits(got, np.array(expected, dtype=F32))


# Opcode, reference, the largest error that the PTX manual allows (absolute, or relative to the result), inputs.
APPROXIMATIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float, tuple[float, float]]] = {
    "ex2.approx": (np.exp2, 0.0, 2.0**-22, (-120, 120)),
    "lg2.approx": (np.log2, 2.0**-22, 2.0**-22, (1e-3, 1e4)),
    "rcp.approx": (lambda x: 1 / x, 0.0, 2.0**-23, (-1e6, 1e6)),
    "sqrt.approx": (np.sqrt, 0.0, 2.0**-22.9, (0, 1e9)),
    "rsqrt.approx": (lambda x: 1 / np.sqrt(x), 0.0, 2.0**-22.9, (1e-6, 1e9)),
    "sin.approx": (np.sin, 2.0**-20.5, 0.0, (-math.pi, math.pi)),
    "cos.approx": (np.cos, 2.0**-20.5, 0.0, (-math.pi, math.pi)),
    "tanh.approx": (np.tanh, 0.0, 2.0**-10.9, (-5, 5)),
}


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
def test_approximations(opcode: str, device: str) -> None:
    reference, absolute, relative, (low, high) = APPROXIMATIONS[opcode]
    x = np.random.default_rng(4).uniform(low, high, 512).astype(F32)
    got = apply(f"{opcode}.f32 {{d}}, {{0}};", [("f32", x)], "f32", F32, device).astype(np.float64)
    expected = reference(x.astype(np.float64))
    # Rounding the float64 result to float32 may add half a unit in the last place.
    allowed = absolute + (relative + 2.0**-24) * np.abs(expected)
    assert (np.abs(got - expected) <= allowed).all()


def test_approximations_at_the_edges(device: str) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -200.0, 200.0, -130.0], dtype=F32)

    def value(opcode: str) -> np.ndarray:
        return apply(f"{opcode}.f32 {{d}}, {{0}};", [("f32", x)], "f32", F32, device)

    nan = np.nan
    np.testing.assert_array_equal(value("ex2.approx.ftz"), np.array([1, 1, np.inf, 0, nan, 1, 0, np.inf, 0], dtype=F32))
    assert value("ex2.approx")[-1] == F32(2.0**-130)
    np.testing.assert_array_equal(value("lg2.approx.ftz")[:6], np.array([-np.inf, -np.inf, np.inf, nan, nan, -np.inf]))
    np.testing.assert_array_equal(value("rcp.approx.ftz")[:6], np.array([np.inf, -np.inf, 0.0, -0.0, nan, np.inf]))
    np.testing.assert_array_equal(value("sqrt.approx.ftz")[:6], np.array([0, -0.0, np.inf, nan, nan, 0]))


def test_division_approximations(device: str) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 256)).astype(F32)
    exact = a.astype(np.float64) / b
    for opcode in ("div.approx", "div.full", "div.approx.ftz", "div.full.ftz"):
        got = apply(f"{opcode}.f32 {{d}}, {{0}}, {{1}};", [("f32", a), ("f32", b)], "f32", F32, device)
        # At most 2 units in the last place.
        assert (np.abs(got - exact) <= 2 * np.spacing(np.abs(exact).astype(F32))).all()
    huge = np.full(4, 2.0**127, dtype=F32)
    small = np.array([1.0, -1.0, 2.0, 0.0], dtype=F32)
    got = apply("div.approx.f32 {d}, {0}, {1};", [("f32", small), ("f32", huge)], "f32", F32, device)
    np.testing.assert_array_equal(got, np.zeros(4))


@pytest.mark.parametrize("mode", ("rni", "rzi", "rmi", "rpi"))
@pytest.mark.parametrize("type_name", ("s32", "u32", "s64", "u64", "s16", "u8"))
def test_float_to_integer_saturates(type_name: str, mode: str, device: str) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3.7, -3.7, 1e10, -1e10, 1e30, -1e30, np.inf, -np.inf, np.nan, 300.0,
                  65536.5], dtype=F32)  # fmt: skip
    width = int(type_name[1:])
    signed = type_name[0] == "s"
    # A result narrower than its register is extended to it.
    register = type_name if width >= 32 else f"{type_name[0]}32"
    dtype: DTypeLike = {"s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64}[register]
    got = apply(f"cvt.{mode}.{type_name}.f32 {{d}}, {{0}};", [("f32", x)], register, dtype, device)
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    expected = []
    for value in rounding(x.astype(np.float64)):
        if np.isnan(value):
            expected.append(0)
        else:
            expected.append(low if value <= low else high if value >= high else int(value))
    nan_is_specified = width <= 32
    keep = ~np.isnan(x) | nan_is_specified
    assert got[keep].tolist() == np.array(expected, dtype=object)[keep].tolist()


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
def test_integer_to_float(mode: str, device: str) -> None:
    values = [0, 1, -1, 16777216, 16777217, 16777219, -16777217, 2**31 - 1, -(2**31), 33554433]
    x = np.array(values, dtype=np.int32)
    got = apply(f"cvt.{mode}.f32.s32 {{d}}, {{0}};", [("s32", x)], "f32", F32, device)
    assert got.tolist() == [round_fraction(Fraction(value), mode) for value in values]
    wide = np.array([value * 2**31 + 12345 for value in values], dtype=np.int64)
    got = apply(f"cvt.{mode}.f32.s64 {{d}}, {{0}};", [("s64", wide)], "f32", F32, device)
    assert got.tolist() == [round_fraction(Fraction(int(value)), mode) for value in wide]


def sixteen_bit_cases() -> np.ndarray:
    rng = np.random.default_rng(6)
    near = (1 + np.arange(-3, 4) * 2.0**-12).astype(F32)
    edges = np.array([65504, 65519.99, 65520, 65536, 1e9, 6e-8, 3e-8, 2.9e-8, 6.1e-5, 3.39e38, 3.4e38], dtype=F32)
    return np.concatenate([SPECIAL, near, edges, -edges, rng.standard_normal(150).astype(F32)])


def bfloat_bits(x: np.ndarray, mode: str) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.uint64)
    if mode == "rn":
        bits = bits + 0x7FFF + (bits >> 16 & 1)
    return np.where(np.isnan(x), 0x7FFF, bits >> 16).astype(np.uint16)


def half_bits(x: np.ndarray, mode: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float16)
    bits = nearest.view(np.uint16).copy()
    if mode == "rz":
        away = np.abs(nearest.astype(np.float64)) > np.abs(x.astype(np.float64))
        bits[away] -= 1
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16)


@pytest.mark.parametrize("mode", ("rn", "rz"))
@pytest.mark.parametrize("type_name", ("bf16", "f16"))
def test_conversion_to_sixteen_bits(type_name: str, mode: str, device: str) -> None:
    reference = bfloat_bits if type_name == "bf16" else half_bits
    a = sixteen_bit_cases()
    b = a[::-1].copy()
    single = apply(f"cvt.{mode}.{type_name}.f32 {{d}}, {{0}};", [("f32", a)], "b16", np.uint16, device)
    np.testing.assert_array_equal(single, reference(a, mode))
    pair = apply(
        f"cvt.{mode}.{type_name}x2.f32 {{d}}, {{0}}, {{1}};", [("f32", a), ("f32", b)], "b32", np.uint32, device
    )
    np.testing.assert_array_equal(pair >> 16, reference(a, mode))
    np.testing.assert_array_equal(pair & 0xFFFF, reference(b, mode))
    relu = apply(f"cvt.{mode}.relu.{type_name}.f32 {{d}}, {{0}};", [("f32", a)], "b16", np.uint16, device)
    np.testing.assert_array_equal(relu, reference(np.where(a < 0, F32(0), np.where(a == 0, F32(0), a)), mode))
    if mode == "rn":
        # .satfinite is an instruction of sm_90.
        finite = apply(
            f"cvt.rn.satfinite.{type_name}.f32 {{d}}, {{0}};", [("f32", a)], "b16", np.uint16, device, "sm_90"
        )
        infinity = 0x7F80 if type_name == "bf16" else 0x7C00
        limited = np.where((single & 0x7FFF) == infinity, single - 1, single)
        np.testing.assert_array_equal(finite, limited)
    back = apply(f"cvt.f32.{type_name} {{d}}, {{0}};", [("b16", single)], "f32", F32, device)
    wide = (
        single.astype(np.uint32) << 16 if type_name == "bf16" else single.view(np.float16).astype(F32).view(np.uint32)
    )
    assert_same_bits(back, wide.view(F32))


def test_tf32_rounds_ties_away(device: str) -> None:
    a = sixteen_bit_cases()
    got = apply("cvt.rna.tf32.f32 {d}, {0};", [("f32", a)], "b32", np.uint32, device)
    bits = a.view(np.uint32).astype(np.uint64)
    expected = np.where(np.isinf(a), bits, (bits + 0x1000) & ~np.uint64(0x1FFF))
    finite = ~np.isnan(a)
    np.testing.assert_array_equal(got[finite], expected[finite].astype(np.uint32))
    assert np.isnan(got[~finite].view(F32)).all()


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
def test_double_to_float(mode: str, device: str) -> None:
    x = np.array([0.1, -0.1, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e-42, -1e-42, 1e30 / 3], dtype=np.float64)
    got = apply(f"cvt.{mode}.f32.f64 {{d}}, {{0}};", [("f64", x)], "f32", F32, device)
    assert got.tolist() == [round_fraction(Fraction(value), mode) for value in x.tolist()]


@pytest.mark.parametrize("opcode", ("add", "mul", "fma.rn", "fma.rn.relu", "min", "max"))
@pytest.mark.parametrize("type_name", ("f16", "bf16"))
def test_packed_halves(type_name: str, opcode: str, device: str) -> None:
    # bfloat16 additions and products are native from sm_90 on.
    target = "sm_90" if type_name == "bf16" and opcode in ("add", "mul") else "sm_80"
    rng = np.random.default_rng(7)
    values = rng.standard_normal((3, 2, 128)).astype(F32)
    to_bits = half_bits if type_name == "f16" else bfloat_bits
    bits = [[to_bits(half, "rn") for half in operand] for operand in values]

    def widened(half: np.ndarray) -> np.ndarray:
        narrow = half.view(np.float16).astype(F32) if type_name == "f16" else (half.astype(np.uint32) << 16).view(F32)
        return narrow.astype(np.float64)

    packed = [(low.astype(np.uint32) | high.astype(np.uint32) << 16) for low, high in bits]
    arity = 3 if "fma" in opcode else 2
    places = ", ".join(f"{{{i}}}" for i in range(arity))
    got = apply(f"{opcode}.{type_name}x2 {{d}}, {places};", [("b32", p) for p in packed[:arity]], "b32", np.uint32,
                device, target)  # fmt: skip
    for i, half in enumerate((got & 0xFFFF, got >> 16)):
        x, y, z = (widened(operand[i]) for operand in bits)
        exact = {"add": x + y, "mul": x * y, "min": np.minimum(x, y), "max": np.maximum(x, y)}.get(opcode, x * y + z)
        if "relu" in opcode:
            exact = np.maximum(exact, 0)
        # float64 holds sums and products of these exactly; one rounding to 16 bits remains.
        error = np.abs(widened(half.astype(np.uint16)) - exact)
        digits, smallest = (11, 2.0**-24) if type_name == "f16" else (8, 2.0**-133)
        assert (error <= np.maximum(np.abs(exact) * 2.0**-digits, smallest / 2)).all()


def test_float64(device: str) -> None:
    values = np.array([0.1, -3.0, 1e300, -0.0, np.inf, 2.0**-1074], dtype=np.float64)
    a, b = crossed(values)
    with np.errstate(all="ignore"):
        for opcode, reference in (("add.rn", a + b), ("mul.rn", a * b), ("div.rn", a / b), ("min", np.fmin(a, b))):
            got = apply(f"{opcode}.f64 {{d}}, {{0}}, {{1}};", [("f64", a), ("f64", b)], "f64", np.float64, device)
            np.testing.assert_array_equal(got, reference)


def test_immediates_keep_their_bits(device: str) -> None:
    x = np.zeros(1, dtype=F32)
    for text, value in itertools.chain(
        (("0f3F800000", 1.0), ("0fFF800000", -np.inf), ("0f00000001", 2.0**-149)), (("0d3FF8000000000000", 1.5),)
    ):
        got = apply(f"add.f32 {{d}}, {{0}}, {text};", [("f32", x)], "f32", F32, device)
        assert got[0] == value
