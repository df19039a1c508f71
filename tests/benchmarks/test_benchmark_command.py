"""The command that times a shape of the user's own: ``python -m anchor_attention.benchmark``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import anchor_attention
from anchor_attention import KeyRangeTable, TokenSpec
from anchor_attention.benchmark import timing
from anchor_attention.benchmark.__main__ import main as benchmark_main
from anchor_attention.benchmark.__main__ import parse_groups, parse_ranges, verdict
from anchor_attention.benchmark.operation import FORWARD_BACKWARD
from anchor_attention.benchmark.peers import OURS


def test_command_line_reads_groups() -> None:
    shape = parse_groups(["a=3", "b=4", "c=0"], ["a,b:b", "c:a"])
    assert (shape.n_queries, shape.n_keys) == (7, 7)
    expected = KeyRangeTable.from_ranges([(0, 7)], [(3, 7)])
    assert shape.table == expected
    specs = [TokenSpec("a", 3), TokenSpec("b", 4)]
    assert sum(spec.size or 0 for spec in specs) == shape.n_queries
    for groups, attends, message in (
        (["a:3"], [], "NAME=SIZE, got 'a:3'"),
        (["a=-3"], [], "NAME=SIZE, got 'a=-3'"),
        (["a=3"], ["a"], "QUERIES:KEYS with comma-separated names, got 'a'"),
        (["a=3"], ["a:b"], "'b' is not defined"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_groups(groups, attends)


def test_command_line_reads_ranges() -> None:
    shape = parse_ranges(["0-10:5-9", "10-12:0-3", "10-12:20-30"])
    assert (shape.n_queries, shape.n_keys) == (12, 30)
    assert shape.table == KeyRangeTable.from_ranges([(0, 10), (10, 12), (10, 12)], [(5, 9), (0, 3), (20, 30)])
    for text in ("0-10", "0-10:5", "a-b:c-d", "0-1:2-3-4"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            parse_ranges([text])


def test_command_line_times_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "times.json"
    shape = ["--group", "anchors=64", "--group", "queries=192", "--attend", "anchors,queries:anchors"]
    chosen = ["--peer", "eager", "--peer", "dense_mask", "--peer", "flex_attention"]
    benchmark_main([*shape, *chosen, "--pass", FORWARD_BACKWARD, "--rounds", "3", "--json", str(target)])
    printed = capsys.readouterr().out
    assert "flex_attention       not measured: no backward on the CPU" in printed
    assert f"kernels for {anchor_attention.cpu_instruction_sets().selected}" in printed
    assert re.search(r"(won: .* times as long|A draw between)", printed.splitlines()[-1])
    records = {r["name"]: r for r in json.loads(target.read_text())}
    assert list(records) == [OURS, "eager", "dense_mask", "flex_attention"]
    for name in (OURS, "eager", "dense_mask"):
        assert len(records[name]["seconds"]) == 3
        assert records[name]["relative_error"] < 1e-5
        rate = 3.5 * 4 * 3 * 64 * 256 * 64 / sorted(records[name]["seconds"])[1] / 1e9
        assert math.isclose(records[name]["gflops"], rate)
    with pytest.raises(SystemExit):
        benchmark_main([*shape, "--ranges", "0-1:0-1"])
    assert "either --group and --attend, or --ranges" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "--device 'gpu' can't be used: "),
        (["--device", "meta"], "--device 'meta' can't be used: it holds no data"),
        (["--device", "cuda:99"], "--device 'cuda:99' can't be used: "),
        (["--batch", "0"], "argument --batch: must be a positive whole number, got '0'"),
        (["--rounds", "1.5"], "argument --rounds: must be a positive whole number, got '1.5'"),
    ],
)
def test_the_command_refuses_what_it_can_not_time(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark_main(["--ranges", "0-10:0-10", *arguments])
    assert message in capsys.readouterr().err


def test_the_verdict_names_the_winner() -> None:
    def record(name: str, *ratios: float) -> dict[str, object]:
        return {"name": name, "time_relative_to_ours": timing.Quartiles(*ratios)}

    ours = record(OURS, 1.0, 1.0, 1.0)
    won = verdict([ours, record("eager", 2.0, 2.5, 3.0), record("dense_mask", 1.5, 1.75, 2.0)])
    assert won == f"{OURS} won: dense_mask, the fastest peer, takes 1.75 times as long."
    lost = verdict([ours, record("eager", 2.0, 2.5, 3.0), record("dense_mask", 0.4, 0.5, 0.6)])
    assert lost == f"dense_mask won: {OURS} takes 2.00 times as long."
    assert "A draw" in verdict([ours, record("eager", 0.9, 1.1, 1.2)])
    assert "no peer" in verdict([ours, {"name": "eager", "not_supported": "x"}])
