"""What a call costs where there is nothing to compute, beside torch's own attention in the same rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import host_overhead
from benchmarks.machine import RESULTS

from anchor_attention.benchmark import ratios

# How much dearer a call may be than on the committed machines. They were quiet, which a core beside one that runs tests
# is not, and processors differ in how much longer Python's part takes them than torch's.
MARGIN = 2.0


def bounds() -> dict[str, float]:
    """The largest committed quotient of each call, times the margin."""
    committed = [json.loads(path.read_text())["microseconds"] for path in RESULTS.glob("*/*/host_overhead.json")]
    return {
        name: MARGIN * max(ratios(microseconds[name], microseconds[peer]).median for microseconds in committed)
        for name, peer in host_overhead.PEERS.items()
    }


def test_calls_cost_little_beside_torch_own_attention() -> None:
    """By their lower quartiles, so that a neighbour on the machine now and then can't fail it."""
    microseconds = host_overhead.measure(rounds=25, calls=60)
    quotients = {
        name: ratios(microseconds[name], microseconds[peer]).lower for name, peer in host_overhead.PEERS.items()
    }
    allowed = bounds()
    exceeded = {name: (quotient, allowed[name]) for name, quotient in quotients.items() if quotient > allowed[name]}
    assert not exceeded


def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host_overhead.main(["--rounds", "2", "--calls", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "host_overhead.json").read_text())
    assert all(len(values) == 2 for values in results["microseconds"].values())
    assert (tmp_path / "host_overhead.md").read_text() == host_overhead.markdown(results)


def test_the_committed_results_keep_the_budget() -> None:
    committed = list(RESULTS.glob("*/*/host_overhead.json"))
    assert committed
    for raw in committed:
        page = raw.with_suffix(".md").read_text()
        assert page == host_overhead.markdown(json.loads(raw.read_text()))
        assert f"{host_overhead.BUDGET_MICROSECONDS:.0f} µs, kept" in page
