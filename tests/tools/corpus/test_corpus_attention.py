"""Softmax and attention by Triton."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: `make test-corpus` installs it")

from tests.tools.corpus import kernels
from tests.tools.corpus.programs import Pointer, Tiles, check, loaded, random_matrix, run, stored
from tests.tools.corpus.references import LOG2E, attend

HEADS, SCALE = 2, 0.125


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("capability", [80, 90])
def test_softmax(capability: int, warps: int) -> None:
    x = 4 * np.random.default_rng(warps).standard_normal((5, 1000)).astype(np.float32)
    y = np.full_like(x, np.nan)
    run(kernels.softmax, [5], [Pointer(x, "fp32"), Pointer(y, "fp32"), 1000], {"BLOCK": 1024}, capability, warps)
    powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    expected = powers / powers.sum(1, keepdims=True)
    check(y, expected, 2.0**-19 * expected * (1 + np.abs(x)), "softmax")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kind", "channels", "keys", "causal"),
    [("bf16", 64, 32, False), ("fp16", 64, 32, True), ("bf16", 128, 64, False), ("fp16", 32, 32, False)],
)
def test_attention(capability: int, kind: str, channels: int, keys: int, causal: bool) -> None:
    tokens = 150
    rng = np.random.default_rng(channels)
    q, k, v = (random_matrix(rng, (HEADS, tokens, channels), kind) for _ in range(3))
    out, lse = stored(np.full(q.shape, np.nan), kind), np.full((HEADS, tokens), np.nan, np.float32)
    constants = {"QUERIES": 64, "KEYS": keys, "CHANNELS": channels, "CAUSAL": causal}
    arguments = [*(Pointer(x, kind) for x in (q, k, v, out)), Pointer(lse, "fp32"), tokens, SCALE * LOG2E]
    run(kernels.attention, [3, HEADS], arguments, constants, capability, stages=2)
    expected, expected_lse, bound, lse_bound = attend(*(loaded(x, kind) for x in (q, k, v)), kind, SCALE, causal)
    check(loaded(out, kind), expected, bound, "out")
    check(lse, expected_lse, lse_bound, "lse")


@pytest.mark.parametrize(("channels", "keys"), [(32, 32), (64, 64), (128, 64), (64, 128)])
def test_attention_by_tma(channels: int, keys: int) -> None:
    tokens = 128
    rng = np.random.default_rng(channels + keys)
    q, k, v = (random_matrix(rng, (HEADS * tokens, channels), "bf16") for _ in range(3))
    out = stored(np.full(q.shape, np.nan), "bf16")
    blocks = [(64, channels), (keys, channels), (keys, channels), (64, channels)]
    tiles = [Tiles(x, "bf16", block) for x, block in zip((q, k, v, out), blocks, strict=True)]
    constants = {"QUERIES": 64, "KEYS": keys, "CHANNELS": channels}
    run(kernels.attention_by_tma, [2, HEADS], [*tiles, tokens, SCALE * LOG2E], constants, 90, stages=2)
    heads = (loaded(x, "bf16").reshape(HEADS, tokens, channels) for x in (q, k, v))
    expected, _, bound, _ = attend(*heads, "bf16", SCALE, causal=False)
    check(loaded(out, "bf16").reshape(expected.shape), expected, bound, "out")
