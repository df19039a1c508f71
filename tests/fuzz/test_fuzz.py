"""The fuzzer itself: some cases of each kind, counts that go on where they ended, and failures that are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import cases


def test_some_cases_of_every_instruction_set(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    for _ in range(2):
        assert fuzz.main(["--cases", "60", "--seconds", "60", "--out", str(out)]) == 0
    for counts in json.loads(out.read_text()).values():
        assert counts["failures"] == {}
        assert sum(counts["kinds"].values()) == counts["next"] > 0


def test_a_case_is_the_same_every_time() -> None:
    assert [cases.run_case(seed) for seed in range(5)] == [cases.run_case(seed) for seed in range(5)]


def test_failures_are_counted_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> str:
        assert seed % 2 == 0, "odd"
        return "even"

    monkeypatch.setattr(fuzz, "run_case", fail)
    first = fuzz.merged({}, fuzz.work(first=0, seconds=60, cases=3))
    both = fuzz.merged(first, fuzz.work(first=3, seconds=60, cases=1))
    assert both["next"] == 4 and both["kinds"] == {"even": 2}
    assert {seed: text.splitlines()[0] for seed, text in both["failures"].items()} == {
        "1": "AssertionError: odd",
        "3": "AssertionError: odd",
    }
