"""Matrices in shared memory as wgmma reads them: images, descriptors, random values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH = {"bf16": 2, "f16": 2, "tf32": 4}  # bytes
_MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of a swizzled line: mode of the descriptor
Floats = NDArray[np.float32]


def to_bits(x: Floats, kind: str) -> NDArray[np.uint16] | NDArray[np.uint32]:
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if kind == "bf16" else bits


def representable(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Floats:
    """Random float32 values that the type holds exactly."""
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "f16":
        return x.astype(np.float16).astype(np.float32)
    return (x.view(np.uint32) & np.uint32(0xFFFF0000 if kind == "bf16" else 0xFFFFE000)).view(np.float32)


class Layout:
    """A matrix (rows of M or N, K) in shared memory: bytes, descriptor fields, and what a step along K adds.

    span: bytes of a swizzled line, 0 for none. outer: the rows are contiguous rather than K.
    """

    def __init__(self, matrix: Floats, kind: str, span: int, outer: bool) -> None:
        bits = to_bits(matrix, kind)
        n_rows, depth = bits.shape
        width = bits.itemsize
        row, k = np.meshgrid(np.arange(n_rows), np.arange(depth), indexing="ij")
        if not outer and span:
            self.stride, self.leading, self.step = 8 * span, 0, 32
            line, piece, byte = row, k * width // 16, k * width % 16
        elif not outer:
            self.stride, self.leading = 128, n_rows // 8 * 128
            self.step = 2 * self.leading
            place = k * width // 16 * self.leading + row // 8 * self.stride + row % 8 * 16 + k * width % 16
        elif span:
            per_line = span // width
            self.stride = 8 * span
            self.leading = depth // 8 * self.stride
            self.step = 2 * self.stride
            line, piece, byte = row // per_line * depth + k, row % per_line * width // 16, row * width % 16
        else:
            self.leading, self.stride = 128, depth // 8 * 128
            self.step = 2 * self.leading
            place = row // 8 * self.stride + k // 8 * self.leading + k % 8 * 16 + row % 8 * width
        if span:
            moved = piece ^ (line * span // 128 % (span // 16))
            place = line * span + moved * 16 + byte
        image = np.zeros(bits.nbytes, np.uint8)
        for i in range(width):
            image[place + i] = bits.view(np.uint8).reshape(n_rows, depth, width)[:, :, i]
        self.words = image.view(np.uint32)
        self.mode = _MODES[span]

    def descriptor(self, register: str, address: str) -> str:
        """PTX that puts the descriptor for the 1024-aligned shared `address` into a 64-bit register."""
        fixed = self.mode << 62 | (self.stride >> 4) << 32 | (self.leading >> 4) << 16
        return (
            f"shr.u32 %r60, {address}, 4;\ncvt.u64.u32 {register}, %r60;\nor.b64 {register}, {register}, {fixed:#x};\n"
        )
