"""NVIDIA's own kernels for Hopper: products of matrices and attention, out of CUTLASS's collectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.tools.corpus.cutlass_programs import built
from tests.tools.corpus.programs import Array, check, loaded, random_matrix, stored, unit_roundoff
from tests.tools.corpus.references import LOG2E, attend, laid_out, operands

# A source takes nvcc minutes.
pytestmark = [pytest.mark.slow, pytest.mark.needs_nvcc, pytest.mark.emulator]

_ELEMENTS = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "fp32": "float"}
_WARP_SPECIALIZED = "KernelTmaWarpSpecialized"
BLOCKS = 2


@dataclass(frozen=True)
class Gemm:
    """A kernel: operands of `kind`, C and D of `out_kind`, tiles of (rows, columns, depth)."""

    kind: str
    out_kind: str
    transposed: tuple[bool, bool]
    tile: tuple[int, int, int]
    schedule: str
    scheduler: str = "void"

    def run(self, shape: tuple[int, int, int], workspace: Array) -> None:
        """Compares alpha · A · B + beta · C + bias."""
        kernels = built(
            "gemm", element=_ELEMENTS[self.kind], output=_ELEMENTS[self.out_kind],
            layout_a=_layout(self.transposed[0]), layout_b=_layout(self.transposed[1]), tile_rows=self.tile[0],
            tile_columns=self.tile[1], tile_depth=self.tile[2], schedule=_WARP_SPECIALIZED + self.schedule,
            scheduler=self.scheduler,
        )  # fmt: skip
        a, b, product, error = operands(self.kind, shape)
        rng = np.random.default_rng(self.tile[1])
        c = random_matrix(rng, shape[:2], self.out_kind)
        bias = rng.standard_normal(shape[0]).astype(np.float32)
        d = stored(np.full(shape[:2], np.nan), self.out_kind)
        left, right = (laid_out(x, transposed) for x, transposed in zip((a, b), self.transposed, strict=True))
        alpha, beta = 0.75, -0.5
        kernels.run("gemm", *shape, BLOCKS, alpha, beta, left, right, c, bias, d, workspace, workspace.nbytes)
        terms = alpha * product, beta * loaded(c, self.out_kind), bias[:, None].astype(np.float64)
        expected = sum(terms)
        # Two sums in float32, then one rounding.
        bound = alpha * error + 2.0**-22 * sum(np.abs(term) for term in terms)
        bound += 1.01 * unit_roundoff(self.out_kind) * (np.abs(expected) + bound)
        check(loaded(d, self.out_kind), expected, bound, "D")


def _layout(transposed: bool) -> str:
    return "ColumnMajor" if transposed else "RowMajor"


GEMMS = {
    "cooperative": Gemm("fp16", "fp32", (False, True), (128, 128, 64), "Cooperative"),
    "ping-pong": Gemm("bf16", "bf16", (True, False), (64, 48, 64), "Pingpong"),
    "one tile a block": Gemm("fp32", "fp32", (False, True), (64, 32, 32), ""),
}


@pytest.mark.parametrize("name", GEMMS)
def test_gemm(name: str) -> None:
    """Tiles that do not fill the matrix, and more of them along the depth than the pipeline has stages."""
    GEMMS[name].run((200, 144, 264), np.zeros(16, np.uint8))


def test_gemm_whose_blocks_share_tiles() -> None:
    """One tile for two blocks, by stream-K: each has ten of its twenty parts, and one adds what the other stored."""
    workspace = np.zeros(1 << 20, np.uint8)
    gemm = Gemm("bf16", "fp32", (False, False), (128, 96, 32), "Cooperative", "cutlass::gemm::StreamKScheduler")
    gemm.run((100, 96, 640), workspace)
    assert workspace.any()


BATCH, HEADS = 2, 2


def heads(array: Array, kind: str) -> Array:
    """Of all batches, one after the other."""
    return loaded(array, kind).reshape(-1, *array.shape[2:])


@pytest.mark.parametrize(
    ("kind", "channels", "keys_of_tile", "schedule", "causal"),
    [("fp16", 128, 64, "Cooperative", False), ("bf16", 96, 64, "Pingpong", True)],
)
def test_attention(kind: str, channels: int, keys_of_tile: int, schedule: str, causal: bool) -> None:
    kernels = built(
        "attention", element=_ELEMENTS[kind], queries=128, keys=keys_of_tile, channels=channels,
        fusion="CausalFusion" if causal else "ResidualFusion", schedule=_WARP_SPECIALIZED + schedule,
    )  # fmt: skip
    queries, keys = (200, 200) if causal else (152, 200)
    rng = np.random.default_rng(channels)
    q, k, v = (random_matrix(rng, (BATCH, HEADS, n, channels), kind) for n in (queries, keys, keys))
    out = stored(np.full(q.shape, np.nan), kind)
    lse = np.full(q.shape[:3], np.nan, np.float32)
    kernels.run("attention", BATCH, HEADS, queries, keys, channels, BLOCKS, q, k, v, out, lse)
    scale = channels**-0.5
    expected, expected_lse, bound, lse_bound = attend(*(heads(x, kind) for x in (q, k, v)), kind, scale, causal)
    check(heads(out, kind), expected, bound, "out")
    check(lse.reshape(-1, queries) * LOG2E, expected_lse, lse_bound, "lse")
