"""Matrix descriptors that our kernels give to the tensor cores, beside those that CuTe makes of the same tiles.

The kernels run on the emulator, which records every product; CuTe's headers come with PyPI's `nvidia-cutlass`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from tools.cuda_host import include_directory
from tools.cuda_plans import KernelRun, attention_backward, attention_forward
from tools.cuda_plans.build import cached_output
from tools.cuda_plans.run import to_storage
from tools.ptx_emulator import Product

from tests.tools.corpus.cutlass_programs import cutlass_sources

ROOT = Path(__file__).parents[3]
SOURCE = Path(__file__).with_name("cute_descriptors.cpp")
HEAD_DIMS = (32, 48, 64, 96, 128)
# Fields: a start address, in units of 16 bytes; what else there is must be equal bit by bit. The leading offset is not
# used where the contracted axis is contiguous and swizzled; there CuTe writes 1, which no offset of ours is, and we 0.
ADDRESS = 0x3FFF
LEADING, UNUSED = 0x3FFF << 16, 1 << 16
# Tiles begin at multiples of 1024 bytes, CuTe's at 1024.
PERIOD = 1024 // 16


pytestmark = [pytest.mark.needs_nvcc, pytest.mark.emulator]


@cache
def descriptors() -> dict[tuple[str, int], list[list[int]]]:
    """CuTe's, by operand and head size: one list for each warpgroup, or one for both."""
    headers, toolkit = cutlass_sources() / "include", include_directory()
    # The second is the toolkit's own copy of libcu++, where CUDA 13 has it.
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in (headers, toolkit / "cccl", toolkit))]
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-w", *includes, SOURCE]
    salt = version("nvidia-cutlass")
    program = cached_output("corpus", (SOURCE,), salt, "cute_descriptors", command)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[tuple[str, int], list[list[int]]] = {}
    for name, head_dim, *words in (line.split() for line in lines):
        found.setdefault((name, int(head_dim)), []).append([int(word, 16) for word in words])
    return found


@dataclass(frozen=True)
class Steps:
    """The products that a warp issues for one matrix product: shape, and the operands' descriptors step by step."""

    name: str
    shape: str
    a: Sequence[int] | None  # None: in registers
    b: Sequence[int]

    def begin(self, products: Sequence[Product]) -> bool:
        """Whether these products come next."""
        head = products[: len(self.b)]
        if len(head) < len(self.b) or any(product.shape != self.shape for product in head):
            return False
        registers = [0] * len(head)
        left, right = [product.a for product in head], [product.b for product in head]
        return (left == registers if self.a is None else _alike(left, self.a)) and _alike(right, self.b)


def _alike(ours: Sequence[int], cutes: Sequence[int]) -> bool:
    """Equal fields, the same way from step to step, and the same place within a period of the swizzle."""
    first = (ours[0] - cutes[0]) & ADDRESS
    moved = all((x & ADDRESS) == ((y + first) & ADDRESS) for x, y in zip(ours, cutes, strict=True))
    fields = all(x & ~ADDRESS == _used(y) & ~ADDRESS for x, y in zip(ours, cutes, strict=True))
    return fields and moved and first % PERIOD == 0


def _used(descriptor: int) -> int:
    return descriptor & ~LEADING if descriptor & LEADING == UNUSED else descriptor


def parsed(products: Sequence[Product], expected: Sequence[Steps]) -> list[str]:
    """Names of the matrix products that one warp's products make up. Longer ones are tried first."""
    found, place = [], 0
    while place < len(products):
        rest = products[place : place + 16]
        match = next((steps for steps in sorted(expected, key=lambda s: -len(s.b)) if steps.begin(rest)), None)
        assert match is not None, (
            f"product {place} has descriptors that CuTe does not make: "
            + ", ".join(f"{product.shape} {product.a:#x} {product.b:#x}" for product in rest)
            + "; CuTe's: "
            + "; ".join(f"{s.name} {s.shape} {[hex(x) for x in s.a or ()]} {[hex(x) for x in s.b]}" for s in expected)
        )
        found.append(match.name)
        place += len(match.b)
    return found


def by_warp(products: Sequence[Product]) -> dict[int, list[Product]]:
    warps: dict[int, list[Product]] = {}
    for product in products:
        warps.setdefault(product.warp, []).append(product)
    return warps


def random_tensors(head_dim: int, *tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(head_dim)
    return [to_storage(rng.standard_normal((1, n, 1, head_dim)), "bfloat16") for n in tokens]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward(head_dim: int) -> None:
    cute = {name: found[0] for (name, size), found in descriptors().items() if size == head_dim}
    expected = [
        Steps("scores", "m64n128k16", cute["q"], cute["k"]),
        Steps("output", f"m64n{head_dim}k16", None, cute["v"]),
    ]
    run = KernelRun(generation="sm90", products=[])
    q, k, v = random_tensors(head_dim, 200, 300, 300)
    attention_forward("bfloat16", q, k, v, [((0, 200), [(0, 300)])], run=run)
    assert run.products
    for own in by_warp(run.products).values():
        names = parsed(own, expected)
        # Three tiles of keys for every tile of queries.
        assert names.count("scores") == names.count("output") > 0 and len(names) % 6 == 0


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_backward(head_dim: int) -> None:
    q, k, v, grad_out = random_tensors(head_dim, 200, 200, 200, 200)
    table = [((0, 200), [(0, 200)])]
    out, lse = attention_forward("bfloat16", q, k, v, table, run=KernelRun(generation="sm90"))
    run = KernelRun(generation="sm90", products=[])
    attention_backward("bfloat16", q, k, v, table, out, lse, grad_out, run=run)
    assert run.products
    cute = {name: found for (name, size), found in descriptors().items() if size == head_dim}
    queries, columns = (128, head_dim) if head_dim <= 64 else (64, head_dim // 2)
    warps = by_warp(run.products)
    # One warpgroup of producers, two that multiply.
    assert sorted(warps) == list(range(4, 12))
    for warp, own in warps.items():
        keys, score_gradients, keys_by_key = (
            cute[name][warp // 4 - 1] for name in ("keys", "score_gradients", "keys_by_key")
        )
        expected = [
            Steps("scores", f"m64n{queries}k16", keys, cute["queries"][0]),
            Steps("key gradient", f"m64n{head_dim}k16", None, cute["queries_by_query"][0]),
            Steps("query gradient", f"m64n{columns}k16", score_gradients, keys_by_key),
        ]
        names = parsed(own, expected)
        # S and dP; dK and dV; dQ.
        assert names.count("scores") == names.count("key gradient") == 2 * names.count("query gradient") > 0
