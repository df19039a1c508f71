"""The fuzzer of arguments: what it finds is nothing, what it reaches is all, and a difference is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anchor_attention import argument_checks
from tests.fuzz import arguments


def test_calls_with_and_without_data_are_refused_in_the_same_words() -> None:
    report = arguments.fuzz(seed=0, calls=12_000)
    assert report.failures == []
    assert 0 < report.taken < report.calls == 12_000
    source = Path(argument_checks.__file__).read_text().splitlines()
    missed = [source[line - 1].strip() for line in sorted(arguments.lines_of_checks() - report.lines)]
    # What is left needs a second device, or sizes without a value.
    elsewhere = ("on the device of", "only on the CPU", "statically_known_true")
    assert [line for line in missed if "_fail(" in line and not any(part in line for part in elsewhere)] == []


def test_the_same_seed_makes_the_same_calls() -> None:
    first, again = (arguments.fuzz(seed=3, calls=300) for _ in range(2))
    assert (first.words, first.taken) == (again.words, again.taken)


@pytest.mark.parametrize("check", ["_check_last_axis", "_check_same_dtype", "_check_table"])
def test_a_check_that_one_side_forgot_is_found(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_checks, check, lambda *args: None)
    report = arguments.fuzz(seed=0, calls=3_000)
    assert report.failures


def test_what_refuses_in_words_of_others_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*args: object) -> None:
        raise RuntimeError("Expected size 3 but got size 4")

    monkeypatch.setitem(arguments.OPERATIONS, "attention", lambda rng: (torch.zeros(1),))
    monkeypatch.setattr(torch.ops, "anchor_attention", type("Namespace", (), {"attention": staticmethod(attention)}))
    monkeypatch.setattr(arguments, "OPERATIONS", {"attention": arguments.OPERATIONS["attention"]})
    assert arguments.fuzz(seed=0, calls=10).failures
