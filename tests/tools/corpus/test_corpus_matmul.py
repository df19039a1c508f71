"""Products of matrices by Triton: every transpose and type, through pointers and through tensor maps."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: `make test-corpus` installs it")

from tests.tools.corpus import kernels
from tests.tools.corpus.programs import TYPES, Pointer, Tiles, check, loaded, run, stored, unit_roundoff
from tests.tools.corpus.references import laid_out, operands

TRANSPOSES = [(False, False), (False, True), (True, False), (True, True)]


def by_pointers(
    capability: int, kind: str, transposed: tuple[bool, bool], shape: tuple[int, int, int] = (112, 96, 80),
    block: tuple[int, int, int] = (64, 64, 32), warps: int = 4, precision: str = "tf32",
) -> None:  # fmt: skip
    """Blocks that do not fill the matrices, unless the shape is one of theirs."""
    a, b, expected, bound = operands(kind, shape, exact=precision == "tf32")
    if precision == "tf32x3":
        # Each operand is split in two parts of 11 bits; the product of the two small ones is left out.
        left, right = np.abs(a).astype(np.float64), np.abs(b).astype(np.float64)
        bound = 3 * bound + 2.0**-20 * (left @ right)
    rows, columns, depth = shape
    out = np.full((rows, columns), np.nan, np.float32)
    strides = {
        "a_row": 1 if transposed[0] else depth, "a_depth": rows if transposed[0] else 1,
        "b_depth": 1 if transposed[1] else columns, "b_column": depth if transposed[1] else 1,
    }  # fmt: skip
    constants = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH"), block, strict=True)) | {"PRECISION": precision}
    constants |= {name: stride for name, stride in strides.items() if stride == 1}
    arguments = [
        *(Pointer(laid_out(x, t), kind) for x, t in zip((a, b), transposed, strict=True)),
        Pointer(out, "fp32"), *shape, *(stride for stride in strides.values() if stride != 1),
    ]  # fmt: skip
    grid = [-(-rows // block[0]), -(-columns // block[1])]
    program = run(kernels.matmul, grid, arguments, constants, capability, warps)
    assert ("wgmma" in program.ptx) == (capability == 90)
    check(out, expected, bound, "product")


@pytest.mark.parametrize("transposed", TRANSPOSES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("capability", [80, 90])
def test_matmul(capability: int, kind: str, transposed: tuple[bool, bool]) -> None:
    by_pointers(capability, kind, transposed)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kind", "transposed", "shape", "warps"),
    [
        ("bf16", (False, True), (128, 128, 128), 8),
        ("fp16", (False, True), (64, 256, 128), 4),
        ("fp16", (True, False), (64, 32, 128), 4),
    ],
)
def test_matmul_in_large_blocks(
    capability: int, kind: str, transposed: tuple[bool, bool], shape: tuple[int, int, int], warps: int
) -> None:
    by_pointers(capability, kind, transposed, shape, (shape[0], shape[1], 64), warps)


@pytest.mark.parametrize("capability", [80, 90])
def test_matmul_of_split_float32(capability: int) -> None:
    by_pointers(capability, "fp32", (False, False), (64, 64, 64), precision="tf32x3")


def by_tma(
    kind: str, transposed: tuple[bool, bool], shape: tuple[int, int, int] = (128, 128, 128),
    block: tuple[int, int, int] = (64, 64, 64), warps: int = 4, out_kind: str | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Returns the swizzles of a, b and c."""
    out_kind = out_kind or kind
    a, b, expected, bound = operands(kind, shape)
    out = stored(np.full((shape[0], shape[1]), np.nan), out_kind)
    boxes = [(block[0], block[2]), (block[2], block[1])]
    arguments = [
        Tiles(laid_out(x, t), kind, box[::-1] if t else box)
        for x, t, box in zip((a, b), transposed, boxes, strict=True)
    ]
    arguments.append(Tiles(out, out_kind, (block[0], block[1])))
    constants = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH"), block, strict=True))
    constants |= {"A_TRANSPOSED": transposed[0], "B_TRANSPOSED": transposed[1]}
    grid = [-(-shape[0] // block[0]), -(-shape[1] // block[1])]
    program = run(kernels.matmul_by_tma, grid, [*arguments, shape[2]], constants, 90, warps)
    assert "cp.async.bulk.tensor" in program.ptx
    check(loaded(out, out_kind), expected, bound + 1.01 * unit_roundoff(out_kind) * np.abs(expected), "product")
    return program.swizzles


@pytest.mark.parametrize("transposed", TRANSPOSES)
@pytest.mark.parametrize("kind", TYPES)
def test_matmul_by_tma(kind: str, transposed: tuple[bool, bool]) -> None:
    by_tma(kind, transposed, block=(64, 64, 32 if kind == "fp32" else 64))


@pytest.mark.parametrize("transposed", TRANSPOSES)
@pytest.mark.parametrize(("depth", "columns", "swizzle"), [(16, 16, 1), (32, 32, 2), (64, 128, 3)])
def test_matmul_in_every_swizzle(depth: int, columns: int, swizzle: int, transposed: tuple[bool, bool]) -> None:
    """Rows of 32, 64 and 128 bytes and, where a block is wider, several of them."""
    used = by_tma("bf16", transposed, (128, max(columns, 64), 128), (64, columns, depth))
    assert used == (3 if transposed[0] else swizzle, swizzle, swizzle)


@pytest.mark.parametrize(
    ("shape", "block", "warps", "out_kind"),
    [
        ((128, 128, 128), (128, 128, 64), 8, None),
        ((64, 256, 128), (64, 256, 64), 4, None),
        ((128, 128, 256), (64, 64, 128), 4, None),
        ((104, 72, 80), (64, 64, 64), 4, None),
        ((128, 128, 128), (64, 64, 64), 4, "fp32"),
    ],
)
def test_matmul_by_tma_of_other_shapes(
    shape: tuple[int, int, int], block: tuple[int, int, int], warps: int, out_kind: str | None
) -> None:
    by_tma("bf16", (False, True), shape, block, warps, out_kind)
