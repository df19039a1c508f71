"""Every PTX wrapper of sm_90a against its definition in the PTX manual, emulated and, where one is, on a Hopper GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from tools.cuda_plans.build import primitives_sm90_ptx
from tools.ptx_emulator import TensorMap

from tests.tools.ptx_emulator.harness import HOPPER_DEVICES
from tests.tools.ptx_emulator.harness import run as run_text
from tests.tools.ptx_emulator.layout import Layout, representable, to_bits

pytestmark = [pytest.mark.emulator, pytest.mark.needs_nvcc]

THREADS, ROWS = 128, 64
FLOAT32 = 7
LANES = np.arange(32)
devices = pytest.mark.parametrize("device", HOPPER_DEVICES)
# N: bytes of a swizzled line that N's columns fill.
SPANS = {32: 64, 48: 32, 64: 128, 96: 64, 128: 128}


@cache
def _text() -> str:
    return primitives_sm90_ptx().read_text()


def run(
    device: str, kernel: str, *arrays: np.ndarray, block: int = THREADS, maps: Sequence[tuple[int, TensorMap]] = ()
) -> None:
    """Run a kernel whose parameters are the arrays, then the maps of some of them."""
    run_text(_text(), arrays, block, device=device, maps=maps, kernel=kernel)


def box_map(tensor: np.ndarray, data_type: int, box: tuple[int, ...], swizzle: int) -> TensorMap:
    return TensorMap(data_type, tensor.shape[::-1], tensor.strides[-2::-1], box, swizzle=swizzle)


@devices
def test_boxes_travel_between_tensors(device: str) -> None:
    """2 KiB from (batch, head, token, channel) to another place in a tensor of other strides, not all inside."""
    rng = np.random.default_rng(0)
    source = rng.integers(-99, 99, (2, 3, 20, 48)).astype(np.float32)
    target = rng.integers(-99, 99, (1, 2, 40, 64)).astype(np.float32)
    expected = target.copy()
    read, written = (32, 12, 2, 1), (40, 30, 1, 0)
    for token in range(16):
        for channel in range(32):
            y = (written[3], written[2], written[1] + token, written[0] + channel)
            if y[2] >= 40 or y[3] >= 64:
                continue
            inside = read[1] + token < 20 and read[0] + channel < 48
            value = source[read[3], read[2], read[1] + token, read[0] + channel] if inside else 0
            expected[y] = value
    at = np.array([*read, *written], np.int32)
    run(
        device, "tma_store", at, source, target,
        maps=[(1, box_map(source, FLOAT32, (32, 16, 1, 1), 3)), (2, box_map(target, FLOAT32, (32, 16, 1, 1), 3))],
    )  # fmt: skip
    np.testing.assert_array_equal(target, expected)


@devices
def test_bulk_copies_of_bytes(device: str) -> None:
    source = np.random.default_rng(1).integers(-99, 99, THREADS).astype(np.float32)
    stored, added = np.full(THREADS, 7, np.float32), np.full(THREADS, 7, np.float32)
    run(device, "bulk_store", source, stored)
    run(device, "bulk_add", source, added)
    np.testing.assert_array_equal(stored, 2 * source)
    np.testing.assert_array_equal(added, 2 * source + 7)


@devices
def test_stmatrix(device: str) -> None:
    registers = np.random.default_rng(2).integers(0, 1 << 32, (4, 32), np.uint32)
    row, column = LANES // 4, LANES % 4 * 2
    expected = np.zeros((4, 8, 8), np.uint16)
    for i in range(2):
        expected[:, row, column + i] = (registers >> np.uint32(16 * i)).astype(np.uint16)
    out = np.zeros(128, np.uint32)
    run(device, "stmatrix", registers, out, block=32)
    np.testing.assert_array_equal(out, expected.view(np.uint32).reshape(-1))


@devices
def test_named_barriers(device: str) -> None:
    values = np.random.default_rng(3).integers(0, 1 << 32, 64, np.uint32)
    out = np.zeros(64, np.uint32)
    run(device, "named_barriers", values, out)
    np.testing.assert_array_equal(out, values)


@devices
def test_registers_change_hands(device: str) -> None:
    out = np.zeros(3 * THREADS, np.uint32)
    run(device, "registers", out, block=3 * THREADS)
    np.testing.assert_array_equal(out, np.arange(3 * THREADS))


@devices
@pytest.mark.parametrize(
    ("name", "kind", "outer_a", "outer_b"),
    (("kk", "bf16", False, False), ("mn", "f16", True, True), ("rk", "f16", None, False), ("rn", "bf16", None, True)),
)
@pytest.mark.parametrize("n", SPANS)
def test_wgmma(n: int, name: str, kind: str, outer_a: bool | None, outer_b: bool, device: str) -> None:
    """Both operands in shared memory or one in registers (outer_a None), either axis contiguous."""
    span = SPANS[n]
    depth = span // 2
    rng = np.random.default_rng(n)
    a, b = representable(rng, (ROWS, depth), kind), representable(rng, (n, depth), kind)
    d = rng.standard_normal((ROWS, n)).astype(np.float32)
    product = a.astype(np.float64) @ b.T.astype(np.float64)
    # Products are exact; an instruction may lose, of each number that it adds, what is below 24 bits of the largest.
    bound = (depth + 2) * 2.0**-23 * (np.abs(a) @ np.abs(b).T + np.abs(d))
    tile_a = to_bits(a, kind).view(np.uint32) if outer_a is None else Layout(a, kind, span, outer_a).words
    out = d.copy()
    run(device, f"wgmma_{n}_{name}", np.ascontiguousarray(tile_a), Layout(b, kind, span, outer_b).words, out)
    error = np.abs(out - (product + d))
    assert (error <= bound).all(), error.max()
