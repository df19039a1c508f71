"""What a call costs where there is nothing to compute, beside torch's own attention in the same rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import host_overhead
from benchmarks.machine import RESULTS

from anchor_attention.benchmark import ratios

# About twice what a quiet machine shows. The lower quartile, so that neighbours on the machine can't fail it.
BOUNDS = {
    "operation forward": 3.0,
    "functional forward": 2.2,
    "functional forward, recorded": 2.7,
    "functional forward + backward": 2.5,
    "functional forward, rotated": 3.0,
    "module forward": 3.4,
    "module forward + backward": 3.7,
}


def test_calls_cost_little_beside_torch_own_attention() -> None:
    microseconds = host_overhead.measure(rounds=25, calls=60)
    quotients = {
        name: ratios(microseconds[name], microseconds[peer]).lower for name, peer in host_overhead.PEERS.items()
    }
    assert quotients.keys() == BOUNDS.keys()
    exceeded = {name: quotient for name, quotient in quotients.items() if quotient > BOUNDS[name]}
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
