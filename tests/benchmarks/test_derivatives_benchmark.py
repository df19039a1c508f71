"""The benchmark of derivatives: that its contestants compute the same, and that its page is made of its raw file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import derivatives
from benchmarks.machine import RESULTS


def test_contestants_agree() -> None:
    calls = derivatives.contestants(24, 16, with_plain=True)
    for name in ("forward", "jvp, 1 tangent", "vmap of jvp, 3 tangents", "forward + backward", "double backward"):
        for found, wanted in zip(flat(calls[name]()), flat(calls[f"plain: {name}"]()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    _, slopes = calls["vmap of jvp, 3 tangents"]()
    for i in (1, 3):
        number = "1 tangent" if i == 1 else "3 tangents"
        found = calls[f"anchor_attention_jvp, {number}"]()[2]
        torch.testing.assert_close(found, slopes[:i], rtol=1e-4, atol=1e-5)
    _, moved = calls["value and central differences, 3 directions"]()
    for i in range(3):
        difference = (moved[2 * i] - moved[2 * i + 1]) / (2 * derivatives.STEP)
        # A rounding of float32, of the step's length.
        torch.testing.assert_close(difference, slopes[i], rtol=0, atol=2e-3)


def flat(results: object) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)  # type: ignore[call-overload]


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    derivatives.main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "derivatives.json").read_text())
    assert all(len(values) == 2 for case in results["cases"] for values in case["seconds"].values())
    assert (tmp_path / "derivatives.md").read_text() == derivatives.markdown(results)


def test_the_committed_pages_are_made_of_their_raw_files() -> None:
    committed = list(RESULTS.glob("*/*/derivatives.json"))
    assert committed
    for raw in committed:
        assert raw.with_suffix(".md").read_text() == derivatives.markdown(json.loads(raw.read_text()))
