"""Every arithmetic instruction against the meaning that the PTX manual gives it, on values chosen to break it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import numpy as np
import pytest

from tests.tools.ptx_emulator.harness import DEVICES, apply

pytestmark = pytest.mark.parametrize("device", DEVICES)

DTYPES: dict[str, type[np.generic]] = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
    "b32": np.uint32, "b64": np.uint64, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
INTEGER_TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")


def bits_of(type_name: str) -> int:
    return int(type_name[1:])


def wrap(value: int, type_name: str) -> int:
    width = bits_of(type_name)
    value %= 1 << width
    return value - (1 << width) if type_name[0] == "s" and value >> (width - 1) else value


def interesting_integers(type_name: str) -> list[int]:
    width = bits_of(type_name)
    values = [0, 1, 2, 3, 7, 8, 31, 32, 33, 0x5A5A, (1 << width - 1) - 1, 1 << width - 1, (1 << width) - 1]
    values += [int(v) for v in np.random.default_rng(width).integers(0, 1 << 62, 4)]
    return [wrap(value, type_name) for value in values]


def pairs(type_name: str) -> tuple[np.ndarray, np.ndarray]:
    values = interesting_integers(type_name)
    a, b = zip(*itertools.product(values, values), strict=True)
    return np.array(a, dtype=DTYPES[type_name]), np.array(b, dtype=DTYPES[type_name])


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "mul.lo": lambda a, b, _: a * b,
    "mul.hi": lambda a, b, width: (a * b) >> width,
    "min": lambda a, b, _: min(a, b),
    "max": lambda a, b, _: max(a, b),
}


@pytest.mark.parametrize("type_name", INTEGER_TYPES)
@pytest.mark.parametrize("opcode", BINARY)
def test_integer_binary(opcode: str, type_name: str, device: str) -> None:
    a, b = pairs(type_name)
    got = apply(f"{opcode}.{type_name} {{d}}, {{0}}, {{1}};", [(type_name, a), (type_name, b)], type_name,
                DTYPES[type_name], device)  # fmt: skip
    width = bits_of(type_name)
    expected = [wrap(BINARY[opcode](int(x), int(y), width), type_name) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("type_name", INTEGER_TYPES)
def test_integer_division(type_name: str, device: str) -> None:
    a, b = pairs(type_name)
    a, b = a[b != 0], b[b != 0]
    operands = [(type_name, a), (type_name, b)]
    quotient = apply(f"div.{type_name} {{d}}, {{0}}, {{1}};", operands, type_name, DTYPES[type_name], device)
    remainder = apply(f"rem.{type_name} {{d}}, {{0}}, {{1}};", operands, type_name, DTYPES[type_name], device)
    expected = [truncated_quotient(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert quotient.tolist() == [wrap(q, type_name) for q in expected]
    assert remainder.tolist() == [wrap(int(x) - q * int(y), type_name) for q, x, y in zip(expected, a, b, strict=True)]


@pytest.mark.parametrize("type_name", ("u16", "s16", "u32", "s32"))
def test_wide_products(type_name: str, device: str) -> None:
    a, b = pairs(type_name)
    wide = f"{type_name[0]}{2 * bits_of(type_name)}"
    c = np.array([wrap(0x123456789ABCDEF * (i + 1), wide) for i in range(len(a))], dtype=DTYPES[wide])
    operands = [(type_name, a), (type_name, b)]
    product = apply(f"mul.wide.{type_name} {{d}}, {{0}}, {{1}};", operands, wide, DTYPES[wide], device)
    total = apply(
        f"mad.wide.{type_name} {{d}}, {{0}}, {{1}}, {{2}};", [*operands, (wide, c)], wide, DTYPES[wide], device
    )
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert product.tolist() == [wrap(value, wide) for value in exact]
    assert total.tolist() == [wrap(value + int(z), wide) for value, z in zip(exact, c, strict=True)]


@pytest.mark.parametrize("type_name", ("u32", "s32", "u64", "s64"))
def test_mad(type_name: str, device: str) -> None:
    a, b = pairs(type_name)
    c = b[::-1].copy()
    operands = [(type_name, a), (type_name, b), (type_name, c)]
    low = apply(f"mad.lo.{type_name} {{d}}, {{0}}, {{1}}, {{2}};", operands, type_name, DTYPES[type_name], device)
    width = bits_of(type_name)
    numbers = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert low.tolist() == [wrap(x * y + z, type_name) for x, y, z in numbers]
    if width == 32:
        high = apply(f"mad.hi.{type_name} {{d}}, {{0}}, {{1}}, {{2}};", operands, type_name, DTYPES[type_name], device)
        assert high.tolist() == [wrap((x * y >> 32) + z, type_name) for x, y, z in numbers]


def test_saturating_add(device: str) -> None:
    a, b = pairs("s32")
    got = apply("add.sat.s32 {d}, {0}, {1};", [("s32", a), ("s32", b)], "s32", np.int32, device)
    exact = a.astype(np.int64) + b.astype(np.int64)
    assert got.tolist() == np.clip(exact, -(2**31), 2**31 - 1).tolist()


@pytest.mark.parametrize("type_name", ("u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"))
def test_shifts_clamp_the_amount(type_name: str, device: str) -> None:
    width = bits_of(type_name)
    amounts = [0, 1, width - 1, width, width + 1, 63, 64, 255, 0x80000000]
    values = interesting_integers(type_name.replace("b", "u"))
    a, n = zip(*itertools.product(values, amounts), strict=True)
    dtype = DTYPES[type_name]
    operands = [(type_name, np.array(a, dtype=dtype)), ("u32", np.array(n, dtype=np.uint32))]
    right = apply(f"shr.{type_name} {{d}}, {{0}}, {{1}};", operands, type_name, dtype, device)
    left = apply(f"shl.b{width} {{d}}, {{0}}, {{1}};", operands, type_name, dtype, device)
    signed = type_name.replace("b", "u")
    assert right.tolist() == [x >> min(k, width) for x, k in zip(a, n, strict=True)]
    assert left.tolist() == [wrap(x << k if k < width else 0, signed) for x, k in zip(a, n, strict=True)]


def lookup3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


@pytest.mark.parametrize("table", (0x00, 0x80, 0x96, 0xE8, 0xCA, 0x1B, 0xFF))
def test_lop3(table: int, device: str) -> None:
    rng = np.random.default_rng(table)
    a, b, c = rng.integers(0, 2**32, (3, 64), dtype=np.uint32)
    got = apply(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", [("b32", a), ("b32", b), ("b32", c)], "b32",
                np.uint32, device)  # fmt: skip
    assert got.tolist() == [lookup3(int(x), int(y), int(z), table) for x, y, z in zip(a, b, c, strict=True)]


def permute(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * i
    return result


def test_prmt(device: str) -> None:
    rng = np.random.default_rng(0)
    a, b, selector = rng.integers(0, 2**32, (3, 256), dtype=np.uint32)
    operands = [("b32", a), ("b32", b), ("b32", selector)]
    got = apply("prmt.b32 {d}, {0}, {1}, {2};", operands, "b32", np.uint32, device)
    assert got.tolist() == [permute(int(x), int(y), int(s)) for x, y, s in zip(a, b, selector, strict=True)]


@pytest.mark.parametrize("mode", ("l.wrap", "l.clamp", "r.wrap", "r.clamp"))
def test_funnel_shift(mode: str, device: str) -> None:
    rng = np.random.default_rng(1)
    low, high = rng.integers(0, 2**32, (2, 96), dtype=np.uint32)
    amount = np.tile(np.array([0, 1, 16, 31, 32, 33, 64, 200], dtype=np.uint32), 12)
    operands = [("b32", low), ("b32", high), ("b32", amount)]
    got = apply(f"shf.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}};", operands, "b32", np.uint32, device)
    expected = []
    for x, y, n in zip(low.tolist(), high.tolist(), amount.tolist(), strict=True):
        n = n & 31 if "wrap" in mode else min(n, 32)
        whole = y << 32 | x
        expected.append((whole << n >> 32 if mode[0] == "l" else whole >> n) & 0xFFFFFFFF)
    assert got.tolist() == expected


@pytest.mark.parametrize("type_name", ("u32", "s32", "u64", "s64"))
def test_bit_fields(type_name: str, device: str) -> None:
    width = bits_of(type_name)
    cases = list(itertools.product(interesting_integers(type_name)[-6:], (0, 1, 5, 31, width - 1, width, 200),
                                   (0, 1, 8, 31, 32, width, 255)))  # fmt: skip
    values, positions, lengths = zip(*cases, strict=True)
    value = np.array(values, dtype=DTYPES[type_name])
    fields = [("u32", np.array(positions, dtype=np.uint32)), ("u32", np.array(lengths, dtype=np.uint32))]
    extracted = apply(f"bfe.{type_name} {{d}}, {{0}}, {{1}}, {{2}};", [(type_name, value), *fields], type_name,
                      DTYPES[type_name], device)  # fmt: skip
    expected = []
    for x, at, n in cases:
        # Beyond the top, bits are copies of the sign, or 0.
        extended = x if type_name[0] == "s" else x % (1 << width)
        field = (extended >> at) & ((1 << n) - 1)
        if type_name[0] == "s" and n > 0:
            sign = extended >> min(at + n - 1, width - 1) & 1
            field |= -sign << n
        expected.append(wrap(field, type_name))
    assert extracted.tolist() == expected
    unsigned = f"b{width}"
    into = value[::-1].copy()
    inserted = apply(f"bfi.{unsigned} {{d}}, {{0}}, {{1}}, {{2}}, {{3}};",
                     [(unsigned, value), (unsigned, into), *fields], unsigned, DTYPES[unsigned], device)  # fmt: skip
    reference = []
    for (x, at, n), y in zip(cases, into.tolist(), strict=True):
        mask = ((1 << n) - 1) << at
        reference.append(((x << at) & mask | y & ~mask) % (1 << width))
    assert inserted.tolist() == reference


@pytest.mark.parametrize("width", (32, 64))
def test_bit_counts(width: int, device: str) -> None:
    values = interesting_integers(f"u{width}")
    array = np.array(values, dtype=DTYPES[f"u{width}"])

    def count(opcode: str, kind: str = "b") -> list[int]:
        got = apply(f"{opcode}.{kind}{width} {{d}}, {{0}};", [(f"b{width}", array)], "b32", np.uint32, device)
        return [int(value) for value in got]

    assert count("popc") == [value.bit_count() for value in values]
    assert count("clz") == [width - value.bit_length() for value in values]
    assert count("bfind", "u") == [(value.bit_length() - 1) % 2**32 for value in values]
    signed = [wrap(value, f"s{width}") for value in values]
    expected = [((value if value >= 0 else ~value).bit_length() - 1) % 2**32 for value in signed]
    assert count("bfind", "s") == expected
    reversed_bits = apply(f"brev.b{width} {{d}}, {{0}};", [(f"b{width}", array)], f"b{width}", array.dtype.type, device)
    assert reversed_bits.tolist() == [int(f"{value:0{width}b}"[::-1], 2) for value in values]


@pytest.mark.parametrize(
    ("kind", "signs"), (("u32.u32", "uu"), ("s32.s32", "ss"), ("u32.s32", "us"), ("s32.u32", "su"))
)
def test_dp4a(kind: str, signs: str, device: str) -> None:
    rng = np.random.default_rng(2)
    a, b, c = rng.integers(0, 2**32, (3, 64), dtype=np.uint32)
    got = apply(
        f"dp4a.{kind} {{d}}, {{0}}, {{1}}, {{2}};", [("b32", a), ("b32", b), ("b32", c)], "b32", np.uint32, device
    )
    factors = [
        x.view(np.uint8 if sign == "u" else np.int8).reshape(-1, 4).astype(np.int64)
        for x, sign in zip((a, b), signs, strict=True)
    ]
    assert got.tolist() == ((factors[0] * factors[1]).sum(axis=1) + c.astype(np.int64)).astype(np.uint32).tolist()


COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("type_name", ("u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64"))
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparison_and_selection(comparison: str, type_name: str, device: str) -> None:
    if type_name[0] == "f":
        values = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40], dtype=DTYPES[type_name])
        a, b = (array.ravel() for array in np.meshgrid(values, values))
    else:
        a, b = pairs(type_name)
    body = f"setp.{comparison}.{type_name} %p1, {{0}}, {{1}};\nselp.u32 {{d}}, 11, 22, %p1;"
    got = apply(body, [(type_name, a), (type_name, b)], "u32", np.uint32, device)
    holds = [COMPARISONS[comparison](x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    # An ordered comparison with NaN is false, and so is "ne".
    if type_name[0] == "f":
        unordered = np.isnan(a) | np.isnan(b)
        holds = [h and not u for h, u in zip(holds, unordered, strict=True)]
    assert got.tolist() == [11 if h else 22 for h in holds]


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_unordered_comparison(comparison: str, device: str) -> None:
    values = np.array([0.0, -0.0, 1.0, np.inf, np.nan], dtype=np.float32)
    a, b = (array.ravel() for array in np.meshgrid(values, values))
    body = f"setp.{comparison}u.f32 %p1, {{0}}, {{1}};\nselp.u32 {{d}}, 1, 0, %p1;"
    got = apply(body, [("f32", a), ("f32", b)], "u32", np.uint32, device)
    expected = [
        int(x != x or y != y or COMPARISONS[comparison](x, y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize("operation", ("and", "or", "xor"))
def test_setp_combines_both_results(operation: str, device: str) -> None:
    a = np.array([1, 2, 3, 4] * 2, dtype=np.int32)
    c = np.array([0] * 4 + [1] * 4, dtype=np.uint32)
    body = (
        "setp.ne.u32 %p3, {1}, 0;\n"
        f"setp.lt.{operation}.s32 %p1|%p2, {{0}}, 3, !%p3;\n"
        "selp.u32 %r40, 1, 0, %p1;\nselp.u32 %r41, 2, 0, %p2;\nor.b32 {d}, %r40, %r41;"
    )
    got = apply(body, [("s32", a), ("u32", c)], "u32", np.uint32, device)
    logic: dict[str, Callable[[bool, bool], bool]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
    combine = logic[operation]
    expected = [
        int(combine(x < 3, z == 0)) | 2 * int(combine(not x < 3, z == 0))
        for x, z in zip(a.tolist(), c.tolist(), strict=True)
    ]
    assert got.tolist() == expected


def test_slct_and_logic_of_predicates(device: str) -> None:
    a = np.arange(8, dtype=np.float32)
    c = np.array([-1.0, -0.0, 0.0, 1.0, np.nan, -np.inf, np.inf, -1e-40], dtype=np.float32)
    got = apply("slct.f32.f32 {d}, {0}, 0fBF800000, {1};", [("f32", a), ("f32", c)], "f32", np.float32, device)
    assert got.tolist() == [float(x) if z >= 0 else -1.0 for x, z in zip(a, c, strict=True)]
    body = (
        "setp.gt.f32 %p1, {0}, 0f40000000;\nsetp.lt.f32 %p2, {0}, 0f40A00000;\nand.pred %p3, %p1, %p2;\n"
        "not.pred %p4, %p3;\n@%p4 mov.u32 {d}, 0;\n@!%p4 mov.u32 {d}, 1;"
    )
    assert apply(body, [("f32", a)], "u32", np.uint32, device).tolist() == [int(2 < x < 5) for x in a]


def test_copysign_takes_the_sign_of_its_first_operand(device: str) -> None:
    a = np.array([-1.0, 1.0, -0.0, 0.0], dtype=np.float32)
    b = np.array([2.0, -2.0, 3.0, -3.0], dtype=np.float32)
    got = apply("copysign.f32 {d}, {0}, {1};", [("f32", a), ("f32", b)], "f32", np.float32, device)
    assert got.tolist() == [-2.0, 2.0, -3.0, 3.0]
