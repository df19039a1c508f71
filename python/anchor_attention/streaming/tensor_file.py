"""Reads and writes tensors in the safetensors format.

The format: a little-endian 64-bit length, a JSON header of that length with dtype, shape and byte range of each tensor,
and the bytes. Source: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes tensors, wherever they live; the file appears whole or not at all.

    Raises:
        ValueError: If a dtype can't be stored.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name!r} must be one of {sorted(DTYPES)}, got {tensor.dtype}")
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Wide elements first: then every tensor begins at a multiple of its element size, and can be read in place.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().reshape(-1)
            if data.numel():
                file.write(data.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Maps a file into memory.

    Returns:
        The tensors on the CPU, copied from the file only where they are touched, and the metadata.

    Raises:
        ValueError: If the file is not of this format.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path} is no safetensors file: its header would have {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is no JSON ({error})") from None
    begin = 8 + length
    # A private mapping: what is written into the tensors never reaches the file.
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[begin:]
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (first, last) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"tensor {name!r} of {path} has the dtype {entry['dtype']!r}, not one of {sorted(DTYPES)}")
        if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= size - begin:
            raise ValueError(f"tensor {name!r} of {path} can't have shape {shape} and the bytes [{first}, {last})")
        part = content[first:last]
        if (begin + first) % dtype.itemsize:
            part = part.clone()
        tensors[name] = part.view(dtype).view(shape)
    return tensors, metadata
