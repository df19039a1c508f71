"""csrc/kernels/cpu/vector/simd.h, called directly: exp2 and the conversions of 16-bit types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import native


@pytest.fixture(scope="module", params=["portable", "this processor's"])
def module(request: pytest.FixtureRequest) -> object:
    return native.load(*([] if request.param == "portable" else ["-march=native"]))


def test_exp2_is_as_exact_as_it_says(module: object) -> None:
    x = np.linspace(-126, 127, 1 << 20, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(module.exp2(x) / exact - 1).max() <= 2e-7


def test_exp2_of_special_values(module: object) -> None:
    x = np.array([-np.inf, -1e30, -200, -126.5, 0, 1, np.nan, np.inf] * 2, dtype=np.float32)
    result = module.exp2(x)[:8]
    assert (result[:4] == 0).all() and (result[4:6] == [1, 2]).all()
    assert np.isnan(result[6]) and not np.isfinite(result[7])


def test_exp2_keeps_every_nan(module: object) -> None:
    """A payload in the low bits, as CUDA makes it, must not fall out of the arithmetic on bits."""
    payloads = np.concatenate([np.arange(1, 1 << 10), (1 << 22) + np.arange(1 << 10), [0x3FFFFF, 0x7FFFFF], [1] * 15])
    for sign in (0, 0x80000000):
        bits = (payloads | 0x7F800000 | sign).astype(np.uint32)
        bits = bits[: len(bits) // 16 * 16]
        assert np.isnan(module.exp2(bits.view(np.float32))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_do_not_depend_on_how_the_thread_treats_denormals(module: object, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    kept = module.round_trip_16(bits, dtype == torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    try:
        flushed = module.round_trip_16(bits, dtype == torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert (flushed == kept).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives(module: object, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    result = module.round_trip_16(bits, dtype == torch.bfloat16)
    nan = torch.from_numpy(bits.view(np.int16)).view(dtype).isnan().numpy()
    assert (result[~nan] == bits[~nan]).all()
    assert torch.from_numpy(result.view(np.int16)).view(dtype).isnan().numpy()[nan].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(module: object, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [
            rng.integers(0, 1 << 32, 1 << 19, dtype=np.uint32),
            # Ties between neighbours, at the end of the range and among denormals too.
            (np.arange(1 << 19, dtype=np.uint32) << 12) + np.uint32(0x8000),
            (np.arange(1 << 19, dtype=np.uint32) << 13) + np.uint32(0x1000),
        ]
    )
    x = bits.view(np.float32)
    expected = torch.from_numpy(x).to(dtype)
    actual = torch.from_numpy(module.narrow(x, dtype == torch.bfloat16).view(np.int16)).view(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~expected.isnan()], expected[~expected.isnan()])
