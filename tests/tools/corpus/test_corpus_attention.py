"""Softmax and attention by Triton."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: `make test-corpus` installs it")

from tests.tools.corpus import kernels
from tests.tools.corpus.programs import Array, Pointer, Tiles, check, loaded, random_matrix, run, stored, unit_roundoff

HEADS, SCALE = 2, 0.125
_LOG2E = 1.4426950408889634
# Of exp2, of logarithms, of sums of a few hundred numbers, relative: a few of the last bits of float32.
_SMALL = 2.0**-18


def attend(q: Array, k: Array, v: Array, kind: str, causal: bool) -> tuple[Array, Array, Array, Array]:
    """Output and lse (base 2) of heads, and bounds of their errors."""
    scores = q @ k.transpose(0, 2, 1) * SCALE
    score_error = (q.shape[-1] + 2) * 2.0**-23 * (np.abs(q) @ np.abs(k).transpose(0, 2, 1)) * SCALE + 2.0**-22
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    maximum = scores.max(-1, keepdims=True)
    powers = np.exp(scores - maximum)
    total = powers.sum(-1, keepdims=True)
    out = powers / total @ v
    worst = score_error.max(-1, keepdims=True)
    # Scores as exponents, in the numerator and in the denominator; probabilities as operands; the output as stored.
    rounding = unit_roundoff(kind)
    bound = (2 * worst + rounding + _SMALL) * (powers / total @ np.abs(v)) + 1.01 * rounding * np.abs(out)
    lse = ((maximum + np.log(total)) * _LOG2E)[..., 0]
    return out, lse, bound, (worst[..., 0] * _LOG2E + _SMALL * (1 + np.abs(lse)))


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
    arguments = [*(Pointer(x, kind) for x in (q, k, v, out)), Pointer(lse, "fp32"), tokens, SCALE * _LOG2E]
    run(kernels.attention, [3, HEADS], arguments, constants, capability, stages=2)
    expected, expected_lse, bound, lse_bound = attend(*(loaded(x, kind) for x in (q, k, v)), kind, causal)
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
    run(kernels.attention_by_tma, [2, HEADS], [*tiles, tokens, SCALE * _LOG2E], constants, 90, stages=2)
    heads = (loaded(x, "bf16").reshape(HEADS, tokens, channels) for x in (q, k, v))
    expected, _, bound, _ = attend(*heads, "bf16", False)
    check(loaded(out, "bf16").reshape(expected.shape), expected, bound, "out")
