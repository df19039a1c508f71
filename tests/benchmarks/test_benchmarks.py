"""What is timed is the same work: every peer computes what the modules and the operation compute."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import instruction_sets, machine, readme, report, run_cpu
from benchmarks.cases import MODULE, OPERATION, Case, make_contest, relative_errors, time_case
from benchmarks.inputs import make_module, make_module_inputs, real_tokens, scores_per_head
from benchmarks.memory import peak_above_inputs
from benchmarks.peers import MODULE_PEERS, module_contestant
from benchmarks.workloads import CPU, GPU, MODULES, Branch, Workload, by_name, shrink
from torch.nn.attention.flex_attention import flex_attention

import anchor_attention
from anchor_attention import KeyRangeTable
from anchor_attention.benchmark import (
    NotSupportedError,
    interleave,
    make_operation_inputs,
    peers,
    prepare_peer,
    ratios,
)
from anchor_attention.benchmark.__main__ import main as benchmark_main
from anchor_attention.benchmark.operation import FORWARD, FORWARD_BACKWARD, PASSES, operation_contestant
from anchor_attention.benchmark.peers import OURS, PEERS

SMALL = [shrink(workload, 48) for workload in CPU]
CELLS = [(workload, pattern) for workload in SMALL for pattern in workload.patterns]
IDS = [f"{workload.name}-{pattern}" for workload, pattern in CELLS]
# Results are sums of some thousand terms in float64, and gradients reach some hundred.
FLOAT64_TOLERANCE = 1e-11


def assert_equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert (f - e).abs().max() <= FLOAT64_TOLERANCE * max(1.0, e.abs().max().item())


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(("workload", "pattern"), CELLS, ids=IDS)
def test_module_peers_do_the_same_work(workload: Workload, pattern: str, passes: str) -> None:
    module = make_module(workload, pattern, torch.float32)
    inputs = make_module_inputs(workload, module, torch.float32).double()
    module.double()
    ours = module_contestant(OURS, module, workload, pattern, passes)(inputs)
    assert ours[0].std() > 0.1
    for peer in MODULE_PEERS:
        assert_equal(module_contestant(peer, module, workload, pattern, passes)(inputs), ours)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(("workload", "pattern"), CELLS, ids=IDS)
def test_operation_peers_do_the_same_work(workload: Workload, pattern: str, passes: str) -> None:
    contest = make_contest(
        Case(OPERATION, workload, pattern, "float32", passes), ("eager", "sdpa_per_pattern", "dense_mask")
    )
    inputs = contest.make_inputs().to(torch.float64)
    assert len(contest.contestants) == 4
    ours = contest.contestants[OURS](inputs)
    for contestant in contest.contestants.values():
        assert_equal(contestant(inputs), ours)


TABLES = {
    "gaps_around_the_groups": KeyRangeTable.from_ranges([(5, 20), (30, 60)], [(0, 7), (3, 40)]),
    "several_key_ranges": KeyRangeTable.from_ranges([(0, 32), (0, 32), (32, 64)], [(0, 8), (20, 40), (12, 13)]),
    "one_score": KeyRangeTable.from_ranges([(63, 64)], [(39, 40)]),
    "equal_shapes": KeyRangeTable.from_ranges([(0, 16), (16, 32), (40, 56)], [(0, 9), (20, 29), (31, 40)]),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("peer", ["eager", "sdpa_per_pattern"])
def test_peers_take_any_table(peer: str, table: KeyRangeTable) -> None:
    inputs = make_operation_inputs(2, 64, 40, 2, 16, dtype=torch.float64)
    ours, theirs = (
        operation_contestant(prepare_peer(name, table, 64, 40).attention, FORWARD_BACKWARD)(inputs)
        for name in (OURS, peer)
    )
    assert_equal(theirs, ours)


def test_flex_attention_does_the_same_work() -> None:
    """FlexAttention's CPU kernel has returned NaN, from memory that it had not written: then it is asked again.

    What is ours is compared with plain PyTorch, so that no fault of ours passes for one of the peer's. Axes are whole
    blocks: at 64 × 40, compiled for AVX2, it is off by 0.6 with a mask of PyTorch's own making, too.
    """
    table = KeyRangeTable.from_ranges([[0, 100], [0, 100], [100, 256]], [[0, 24], [40, 128], [30, 31]])
    inputs = make_operation_inputs(1, 256, 128, 2, 16)
    ours, plain, theirs = (
        operation_contestant(prepare_peer(name, table, 256, 128).attention, FORWARD)
        for name in (OURS, "eager", "flex_attention")
    )
    # Convex combinations of values of order one, with weights that depend on sums of 16 products.
    bound = 64 * torch.finfo(torch.float32).eps
    out = ours(inputs)[0]
    assert (out - plain(inputs)[0]).abs().max() <= bound
    for _ in range(5):
        peer = theirs(inputs)[0]
        if peer.isfinite().all():
            break
    else:
        pytest.skip("FlexAttention returns NaN in five runs of five")
    assert (peer - out).abs().max() <= bound


def test_a_peer_that_does_not_compile_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held to AVX2, PyTorch 2.13 writes C++ for FlexAttention on some shapes that names an undeclared variable."""

    def broken(graph: object, inputs: object) -> Callable[..., Any]:
        raise RuntimeError("C++ compile error\nmain.cpp:1086:45: error: 'size' was not declared\nmain.cpp:1087: note")

    monkeypatch.setattr(peers, "_compiled_flex_attention", lambda: torch.compile(flex_attention, backend=broken))
    shape = ["--ranges", "0-64:0-64", "--peer", "eager", "--peer", "flex_attention", "--rounds", "2"]
    benchmark_main(shape)
    printed = capsys.readouterr().out
    reason = "torch can't compile it here: 'size' was not declared"
    assert f"flex_attention       not measured: {reason}\n" in printed
    assert re.search(r"^eager +\d", printed, re.MULTILINE)
    case = Case(OPERATION, shrink(by_name(CPU, ["wells"])[0], 16), "self", "float32", FORWARD)
    record = time_case(case, rounds=1)
    assert record["not_supported"]["flex_attention"] == reason
    assert {OURS, "eager"} <= set(record["seconds"])
    errors = relative_errors(case)
    assert "flex_attention" not in errors
    assert {OURS, "eager"} <= set(errors)


def test_peers_that_cannot_take_part_say_why() -> None:
    table = TABLES["one_score"]
    with pytest.raises(NotSupportedError, match="a query without keys"):
        prepare_peer("dense_mask", table, 64, 40)
    with pytest.raises(NotSupportedError, match="1 × 65536 × 65536 is too large"):
        prepare_peer("dense_mask", table, 65536, 65536)
    with pytest.raises(NotSupportedError, match="no backward on the CPU"):
        prepare_peer("flex_attention", table, 64, 40, backward=True)
    with pytest.raises(ValueError, match=r"name must be one of .*got 'fastest'"):
        prepare_peer("fastest", table, 64, 40)
    with pytest.raises(ValueError, match=r"passes must be one of .*got 'backward'"):
        operation_contestant(PEERS[OURS](table, 64, 40, None, False, torch.device("cpu")), "backward")


@pytest.mark.parametrize("workloads", [CPU, GPU, SMALL], ids=["cpu", "gpu", "small"])
def test_workloads_name_the_patterns_of_the_modules(workloads: list[Workload]) -> None:
    for workload in workloads:
        for pattern in workload.patterns:
            module = make_module(replace(workload, dim=16, heads=2), pattern, torch.float32)
            read = [p for p in module._create_attention_patterns(workload.token_specs) if p.query_tokens]
            present = {spec.name for spec in workload.token_specs if spec.size is not None}
            theirs = {q: set(p.key_value_tokens) for p in read for q in p.query_tokens if q in present}
            ours = {q: set(p.key_value_tokens) for p in workload.attention_patterns(pattern) for q in p.query_tokens}
            assert ours == theirs
            assert set(ours) == present


def test_gpu_and_cpu_sizes_have_the_same_shape() -> None:
    assert [workload.name for workload in GPU[: len(CPU)]] == [workload.name for workload in CPU]
    # Behind them, the first again with heads of other sizes.
    for other in GPU[len(CPU) :]:
        head_dim = other.dim // other.heads
        assert other == replace(GPU[0], name=f"{GPU[0].name}_hd{head_dim}", dim=other.dim)
        assert head_dim not in {workload.dim // workload.heads for workload in GPU[: len(CPU)]}
    for small, large in zip(CPU, GPU[: len(CPU)], strict=True):
        # Packed samples are branches: there are more of them on a GPU, none larger.
        pairs = list(zip(small.branches, large.branches, strict=not small.packed))
        for branch, larger in pairs:
            assert branch.name == larger.name and bool(branch.queries) == bool(larger.queries)
            assert branch.anchors <= larger.anchors and branch.queries <= larger.queries
        # Latents are as many on either: there it is the tokens that they read which are fewer.
        assert len(large.branches) > len(pairs) or any(branch != larger for branch, larger in pairs)
        assert (small.dim, small.heads, small.passes, small.patterns) == (
            large.dim,
            large.heads,
            large.passes,
            large.patterns,
        )
    with pytest.raises(ValueError, match=r"workloads must be among .*got \['nothing'\]"):
        by_name(CPU, ["nothing"])
    with pytest.raises(ValueError, match=r"pattern must be one of .*got 'joint'"):
        by_name(CPU, ["wide_heads"])[0].attention_patterns("joint")


@pytest.mark.parametrize(("workload", "pattern"), CELLS, ids=IDS)
def test_scores_are_those_that_a_mask_would_keep(workload: Workload, pattern: str) -> None:
    names, table = workload.key_axis(pattern)
    n_keys = sum(spec.size or 0 for spec in workload.anchor_specs if spec.name in names)
    dense = table.to_dense(workload.n_tokens, n_keys).expand(workload.batch, -1, -1)
    mask = real_tokens(workload)
    if mask is not None:
        kept = [
            group
            for spec, group in zip(
                workload.token_specs, mask.split([spec.size or 0 for spec in workload.token_specs], 1), strict=True
            )
            if spec.name in names
        ]
        dense = dense & torch.cat(kept, 1)[:, None, :]
        assert 0 < scores_per_head(workload, pattern) < workload.batch * table.area()
    assert scores_per_head(workload, pattern) == int(dense.sum())


def test_rounds_are_interleaved_and_see_fresh_inputs() -> None:
    made: list[object] = []
    seen: list[tuple[str, int]] = []

    def make_inputs() -> int:
        made.append(object())
        return len(made) - 1

    def contestant(name: str) -> Any:
        return lambda inputs: seen.append((name, inputs))

    seconds = interleave({name: contestant(name) for name in "abc"}, make_inputs, rounds=5, warmup=2)
    assert {name: len(own) for name, own in seconds.items()} == {"a": 5, "b": 5, "c": 5}
    assert len(made) == 7
    for i in range(7):
        assert sorted(seen[3 * i : 3 * i + 3]) == [("a", i), ("b", i), ("c", i)]
    assert [seen[3 * i][0] for i in range(6)] == ["a", "b", "c", "a", "b", "c"]
    with pytest.raises(ValueError, match="at least one function"):
        interleave({}, make_inputs, rounds=1)
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({"a": contestant("a")}, make_inputs, rounds=0)


def test_ratios_are_taken_within_rounds() -> None:
    sagging = [1.0, 5.0, 0.2, 17.0]
    assert ratios([3 * t for t in sagging], sagging) == pytest.approx((3.0, 3.0, 3.0))
    lower, median, upper = ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (lower, median, upper) == (2.0, 3.0, 4.0)
    assert ratios([4.0], [2.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        ratios([1.0], [1.0, 2.0])


TINY = Workload("tiny", 64, 2, (Branch("surface", 96, 160), Branch("volume", 96, 160)))


@pytest.mark.parametrize("level", [MODULE, OPERATION])
def test_errors_are_of_the_order_of_the_rounding(level: str) -> None:
    for dtype, eps in (("float32", 2.0**-24), ("bfloat16", 2.0**-9)):
        errors = relative_errors(Case(level, TINY, "joint", dtype, FORWARD_BACKWARD))
        assert set(errors) >= {OURS, "eager", "sdpa_per_pattern"}
        for error in errors.values():
            assert set(error) == {"out", "worst_gradient"}
            # One rounding of the result is there at least in part; a wrong result has an error of order one.
            assert eps / 8 < error["out"] < 64 * eps
            assert eps / 8 < error["worst_gradient"] < 64 * eps


def test_a_timed_case_holds_what_the_report_needs() -> None:
    record = time_case(Case(OPERATION, TINY, "self", "float32", FORWARD), rounds=3)
    assert set(record["seconds"]) == {OURS, "eager", "sdpa_per_pattern", "dense_mask"}
    assert all(len(own) == 3 and min(own) > 0 for own in record["seconds"].values())
    assert record["time_relative_to_ours"][OURS] == (1.0, 1.0, 1.0)
    assert record["attention_flops"] == 4 * 64 * 2 * 256 * 96
    own = [record["attention_flops"] / t / 1e9 for t in record["seconds"][OURS]]
    assert "matmul" in record["ceilings"]
    for ceiling in record["ceilings"].values():
        assert ceiling["our_share"].lower * ceiling["gflops"].lower <= max(own)
        assert ceiling["our_share"].upper * ceiling["gflops"].upper >= min(own)


def test_peak_memory_sees_what_a_call_allocates() -> None:
    workload = Workload("tiny", 64, 2, (Branch("surface", 512, 3584), Branch("volume", 512, 3584)))
    case = Case(OPERATION, workload, "joint", "float32", FORWARD)
    output = 4 * workload.n_tokens * workload.dim
    mask = 4 * workload.n_tokens * 1024
    # Whole pages, and some tables that a library makes late.
    slack = 2**20
    assert output - slack <= peak_above_inputs(case, OURS, threads=1) <= 3 * output + slack
    assert peak_above_inputs(case, "dense_mask", threads=1) >= output + mask - slack
    assert peak_above_inputs(case, "eager", threads=1) >= 2 * output - slack
    with pytest.raises(NotSupportedError, match="is too large"):
        large = Workload("large", 2, 1, (Branch("surface", 8192, 57344), Branch("volume", 8192, 57344)))
        peak_above_inputs(Case(OPERATION, large, "joint", "float32", FORWARD), "dense_mask", threads=1)


def record(peer_seconds: float, workload: str = "drivaer_train", peer: str = "eager") -> dict[str, Any]:
    own, theirs = [1.0, 2.0, 4.0], [peer_seconds * t for t in (1.0, 2.0, 4.0)]
    return {
        "level": MODULE,
        "workload": workload,
        "pattern": "self",
        "dtype": "float32",
        "pass": FORWARD,
        "attention_flops": 1e9,
        "seconds": {OURS: own, peer: theirs},
        "time_relative_to_ours": {OURS: ratios(own, own), peer: ratios(theirs, own)},
        "ceilings": {},
        "commit": "unknown",
        "not_supported": {"dense_mask": "too large for it"},
        "ready_seconds": {OURS: 0.1, peer: 0.1},
    }


def test_the_report_names_losses_and_gaps() -> None:
    page = report.markdown(machine.environment(2) | {"planned_cases": 3}, [record(4.0), record(0.25, "wells")], None)
    summary = next(line for line in page.splitlines() if line.startswith("| module | float32 | forward | eager"))
    assert summary == "| module | float32 | forward | eager | 1.00 | **0.25** (wells self) | 2 | **1** |"
    assert "**0.25** (0.25 – 0.25)" in page
    assert "4.00 (4.00 – 4.00)" in page and "**4.00**" not in page
    lost = next(line for line in page.splitlines() if line.startswith("| wells"))
    # sdpa_per_pattern took no part, and neither errors nor memory were taken.
    assert lost.count(report.NOT_MEASURED) >= 6
    assert "dense_mask: too large for it" in page
    assert "2 of 3 planned cases" in page


def test_the_readme_shows_every_machine_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    records = [record(4.0), record(0.25, "wells")]
    for made in records:
        made["time_relative_to_ours"]["sdpa_per_pattern"] = ratios([3.0], [1.0])
    folder = tmp_path / "machine" / "set"
    folder.mkdir(parents=True)
    (folder / report.CASES).write_text(json.dumps(records))
    (folder / report.ENVIRONMENT).write_text(json.dumps(machine.environment(2)))
    page = f"before\n{readme.MARKERS[0]}\nold\n{readme.MARKERS[1]}\nafter\n"
    once = readme.with_tables(page)
    row = "| attention module, float32 | PyTorch, group by group | 1.00 × (least 0.25) | not measured |"
    assert row in once and "results/machine/set" in once and "3.00 × (least 3.00)" in once
    assert "old" not in once and once.startswith("before\n") and once.endswith("\nafter\n")
    assert readme.with_tables(once) == once
    with pytest.raises(ValueError, match=r"must hold .*gains: begin"):
        readme.with_tables("no markers")


def test_geometric_mean_of_reciprocals_is_the_reciprocal() -> None:
    values = [0.3, 2.0, 7.5]
    assert report.geometric_mean(values) * report.geometric_mean(1 / v for v in values) == pytest.approx(1.0)
    assert min(values) < report.geometric_mean(values) < sum(values) / 3


def test_a_quick_run_leaves_everything(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        run_cpu.main(
            ["--quick", "--threads", "1", "--workloads", "wide_heads", "--dtypes", "float32", "--out", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "cases.json",
        "ceilings.json",
        "environment.json",
        "table.md",
        "module_speedup.png",
        "op_speedup.png",
    }
    records = json.loads((tmp_path / "cases.json").read_text())
    assert {(r["level"], r["pass"]) for r in records} == {(MODULE, FORWARD), (OPERATION, FORWARD)}
    assert all(isinstance(peak, int) and peak > 0 for r in records for peak in r["peak_bytes"].values())
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    ceilings = json.loads((tmp_path / "ceilings.json").read_text())
    assert ceilings["matmul_float32"][1] > 0
    assert "fma_float32" in ceilings or ceilings["not_measured"]["fma_float32"]
    assert "wide_heads" in (tmp_path / "table.md").read_text()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are those of x86")
def test_a_ceiling_is_that_of_the_instruction_set_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = anchor_attention.cpu_instruction_sets()._replace(selected="baseline")
    monkeypatch.setattr(anchor_attention, "cpu_instruction_sets", lambda: sets)
    machine.register_library.cache_clear()
    try:
        _, operations = machine.register_ceiling("fma_float32", 1)
        # Twelve chains of four floats, multiplied and added, whatever vectors the processor has.
        assert operations == 2 * 12 * 4 * machine.REGISTER_ITERATIONS
        with pytest.raises(NotSupportedError, match="no such instruction"):
            machine.register_ceiling("dot_bfloat16", 1)
    finally:
        machine.register_library.cache_clear()


def test_the_default_suite_covers_levels_dtypes_passes_and_patterns() -> None:
    cases = run_cpu.suite(run_cpu.parser().parse_args([]))
    assert len(set(cases)) == len(cases)
    for workload in CPU:
        cells = {(c.level, c.dtype, c.passes) for c in cases if c.workload == workload}
        assert cells == {
            (level, dtype, p)
            for level in (MODULE, OPERATION)
            for dtype in ("float32", "bfloat16")
            for p in workload.passes
        }
    full = run_cpu.suite(run_cpu.parser().parse_args(["--full"]))
    assert {c.pattern for c in cases} == set(MODULES)
    assert set(cases) < set(full) and full[: len(cases)] == cases
    assert len(full) == sum(4 * len(w.patterns) * len(w.passes) for w in CPU)


def test_every_instruction_set_is_pinned_in_all_libraries() -> None:
    sets = anchor_attention.cpu_instruction_sets()
    assert set(sets.compiled) <= set(instruction_sets.PINS)
    assert set(sets.runnable) - set(instruction_sets.NOT_BY_DEFAULT) == set(instruction_sets.measured_sets())
    for name in sets.runnable:
        report = (
            "from benchmarks.instruction_sets import *; import json; print(json.dumps([is_pinned(%r), observed()]))"
        )
        ran = subprocess.run(
            [sys.executable, "-c", report % name],
            env=instruction_sets.pinned_environment(name),
            capture_output=True,
            text=True,
            check=True,
        )
        pinned, seen = json.loads(ran.stdout)
        assert pinned and seen["anchor_attention"] == name
        assert seen["torch"] == instruction_sets.CAPABILITIES[instruction_sets.PINS[name]["ATEN_CPU_CAPABILITY"]]
    with pytest.raises(ValueError, match="'sse'"):
        instruction_sets.pinned_environment("sse")
