"""Tensor maps for the emulated TMA unit, described and checked as cuTensorMapEncodeTiled does."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

# In the order of CUtensorMapDataType: bytes per element.
_ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)
_FLOAT32 = 7
# In the order of CUtensorMapSwizzle: bytes of the lines within which 16-byte pieces are exchanged, 0 for none.
_SWIZZLE_SPAN = (0, 32, 64, 128)
_MAGIC = 0x544D4150
_BYTES = 128


@dataclass(frozen=True)
class TensorMap:
    """The arguments of cuTensorMapEncodeTiled but for the address; enumerators by their values in cuda.h.

    dims, box, element_strides: elements, innermost first, `rank` of each. strides: bytes, of the dimensions behind the
    innermost.
    """

    data_type: int
    dims: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    element_strides: Sequence[int] | None = None
    interleave: int = 0
    swizzle: int = 0
    l2_promotion: int = 0
    oob_fill: int = 0

    def encode(self, address: int) -> bytes:
        """The 128 bytes for the emulator. Raises ValueError where the driver refuses, or the emulator does not know."""
        steps = self.element_strides or [1] * len(self.dims)
        return encode_tensor_map(
            self.data_type, len(self.dims), address, self.dims, self.strides, self.box, steps,
            self.interleave, self.swizzle, self.l2_promotion, self.oob_fill,
        )  # fmt: skip


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def encode_tensor_map(
    data_type: int,
    rank: int,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int],
    interleave: int = 0,
    swizzle: int = 0,
    l2_promotion: int = 0,
    oob_fill: int = 0,
) -> bytes:
    """cuTensorMapEncodeTiled for the emulator: the same arguments, enumerators by value, checked the same way.

    Returns 128 bytes that only the emulator understands. Raises ValueError with the argument's name and value where the
    driver would refuse it, and where the emulator does not implement it: interleaving, element strides, NaN as fill,
    and swizzled boxes whose rows do not fill the swizzled lines.
    """
    _require(0 <= data_type < len(_ELEMENT_BYTES), f"data_type {data_type} is unknown")
    _require(1 <= rank <= 5, f"rank {rank} is not from 1 to 5")
    _require(address % 16 == 0 and address > 0, f"address {address:#x} is not a multiple of 16")
    lengths = {"dims": (dims, rank), "strides": (strides, rank - 1), "box": (box, rank),
               "element_strides": (element_strides, rank)}  # fmt: skip
    for name, (values, length) in lengths.items():
        _require(len(values) == length, f"{name} {list(values)} has not {length} entries")
    _require(all(1 <= size <= 1 << 32 for size in dims), f"dims {list(dims)} are not from 1 to 2^32")
    _require(all(s % 16 == 0 and 0 <= s < 1 << 40 for s in strides), f"strides {list(strides)} are not multiples of 16")
    _require(all(1 <= size <= 256 for size in box), f"box {list(box)} is not from 1 to 256")
    width = _ELEMENT_BYTES[data_type]
    inner = box[0] * width
    _require(inner % 16 == 0, f"box {list(box)} has rows of {inner} bytes, not a multiple of 16")
    _require(0 <= swizzle < len(_SWIZZLE_SPAN), f"swizzle {swizzle} is not implemented")
    span = _SWIZZLE_SPAN[swizzle]
    _require(not span or inner <= span, f"box {list(box)} has rows of {inner} bytes, more than swizzle's {span}")
    _require(not span or inner == span, f"box {list(box)} with rows shorter than swizzle's {span} is not implemented")
    _require(all(1 <= step <= 8 for step in element_strides), f"element_strides {list(element_strides)} exceed 8")
    _require(set(element_strides) == {1}, f"element_strides {list(element_strides)} are not implemented")
    _require(interleave == 0, f"interleave {interleave} is not implemented")
    _require(0 <= l2_promotion <= 3, f"l2_promotion {l2_promotion} is unknown")
    _require(oob_fill == 0, f"oob_fill {oob_fill} is not implemented")
    padded = [0] * (5 - rank)
    packed = struct.pack(
        "<I4BQ4Q5I5H", _MAGIC, width, data_type == _FLOAT32, rank, (span >> 4) - 1 if span else 0, address,
        *strides, *padded[: 4 - (rank - 1)], *(size - 1 for size in dims), *padded, *box, *padded,
    )  # fmt: skip
    return packed.ljust(_BYTES, b"\0")
