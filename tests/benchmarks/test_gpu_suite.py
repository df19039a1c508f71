"""The GPU suite without a GPU: stages that fail, hang or are missing cost their own result and no other."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import apart, package, report, small_shapes, table
from benchmarks.gpu.peers import LIBRARIES, library_contestant, per_group
from benchmarks.gpu.small_shape_sizes import HEAD_DIMS
from benchmarks.gpu.stages import FAILED, MISSING, PASSED, ROOT, STAGES, TIMED_OUT, Stage, run_stages, write_json
from benchmarks.gpu.summary import CASES, ENVIRONMENT, SUMMARY, write_summary
from benchmarks.gpu.timing import interleave_cold, wait_cycles
from torch.nn.functional import scaled_dot_product_attention

from anchor_attention import KeyRangeTable, anchor_attention
from anchor_attention.benchmark import NotSupportedError

SLEEP = "import time; time.sleep(60)"


def python(name: str, code: str, **fields: Any) -> Stage:
    return Stage(name, ("-c", code), **fields)


def dry_run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300)


def test_a_dry_run_leaves_everything(tmp_path: Path) -> None:
    stages = ("environment", "small_shapes_64", "memcheck", "benchmarks", "report")
    result = dry_run(tmp_path, "--stages", *stages)
    assert result.returncode == 0, result.stdout + result.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {ENVIRONMENT, CASES, STAGES, SUMMARY, "table.md", "op_speedup.png", "benchmarks.log"} <= names
    assert not any(name.endswith(".unfinished") for name in names)
    outcomes = {outcome["name"]: outcome["status"] for outcome in json.loads((tmp_path / STAGES).read_text())}
    assert outcomes == dict.fromkeys(stages, PASSED) | {"memcheck": MISSING}
    environment = json.loads((tmp_path / ENVIRONMENT).read_text())
    assert environment["torch"] == torch.__version__ and len(environment["library"]["sha256"]) == 64
    records = json.loads((tmp_path / CASES).read_text())
    assert {record["level"] for record in records} == {"op", "module"}
    for record in records:
        assert set(record["relative_error"]) == {"anchor_attention", "eager", "sdpa_per_pattern"}
        assert all(len(own) == table.QUICK_ROUNDS for own in record["seconds"].values())
    with tarfile.open(tmp_path.with_name(f"{tmp_path.name}.tar.gz")) as archive:
        assert {f"{tmp_path.name}/{name}" for name in names} <= set(archive.getnames())
    log = (tmp_path / "small_shapes_64.log").read_text().splitlines()
    assert [line.partition(":")[0] for line in log[:4]] == ["next", "right"] * 2
    page = (tmp_path / SUMMARY).read_text()
    assert page in result.stdout and page.startswith("# 1 of 2 checks ran, and passed")


def test_a_library_that_cannot_be_loaded_fails_the_suite_but_not_its_summary(tmp_path: Path) -> None:
    write_json(tmp_path / ENVIRONMENT, {"device": "the one before"})
    missing = str(tmp_path / "elsewhere.so")
    stages, place = ("environment", "small_shapes_64"), tmp_path / "to" / "travel"
    result = dry_run(tmp_path, "--archive", str(place), "--stages", *stages, ANCHOR_ATTENTION_LIBRARY=missing)
    assert result.returncode == 1
    assert "FAILED: small_shapes_64" in result.stdout and "Environment: not measured" in result.stdout
    assert "elsewhere.so is missing" in (tmp_path / "small_shapes_64.log").read_text()
    assert [path.name for path in place.iterdir()] == [f"{tmp_path.name}.tar.gz"]


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex", "--filter", ""])
def test_sanitizers_check_our_kernels_only(option: str, tmp_path: Path) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(f"#!/bin/sh\necho '  --tool arg  {option} arg'\n")
    sanitizer.chmod(0o755)
    expected = (option, "kns=anchor_attention") if option else ()
    assert command_line.sanitizer_filter(str(sanitizer)) == expected


def test_what_travels_to_a_gpu_is_compressed_and_must_be_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = b"upload.sm_80.cubin"
    mark = b"anchor-attention-gpu-code" + len(image).to_bytes(8, "little") + (4).to_bytes(8, "little") + image
    library = tmp_path / "library.so"
    library.write_bytes(bytes(64) + mark.ljust(128, b"\0") + b"code" + bytes(100_000))
    folder, variants = tmp_path / "folder", tmp_path / "variants"
    command = ["package", str(folder), "--library", str(library), "--variants", str(variants)]
    monkeypatch.setattr(sys, "argv", command)
    package.main()
    printed = capsys.readouterr().out
    assert "GPU code for sm_80" in printed and printed.count("python3 -m benchmarks.gpu --minutes") == 3
    assert printed.count(f"LIBRARY={folder}/{package.LIBRARY} ") == 3
    assert "sweep" not in printed
    variants.mkdir()
    (variants / "shipped.so").write_bytes(b"shipped")
    package.main()
    (measure,) = (line for line in capsys.readouterr().out.splitlines() if "benchmarks.gpu.sweep" in line)
    # What a command does before it starts to measure.
    unpack, _, rest = measure.partition(" && ")
    subprocess.run(unpack.replace("python3", sys.executable, 1), shell=True, check=True)
    assert f" {folder}/variants " in rest
    assert (folder / package.LIBRARY).read_bytes() == library.read_bytes()
    assert (folder / "variants" / "shipped.so").read_bytes() == b"shipped"
    assert (folder / package.ARCHIVE).stat().st_size < library.stat().st_size / 10
    in_checkout = package.commands(ROOT / "build" / "gpu-package")[0]
    assert f"-e $PWD/build/gpu-package/{package.ARCHIVE} $PWD/build/gpu-package && " in in_checkout
    assert f"LIBRARY=$PWD/build/gpu-package/{package.LIBRARY} " in in_checkout
    known = {stage.name for stage in command_line.suite("cuda", False, tmp_path)}
    assert {name for _, stages, _ in package.CALLS for name in stages.split()} <= known
    monkeypatch.setattr(sys, "argv", [*command, "--limit-mib", "1"])
    with pytest.raises(SystemExit, match="too large to travel"):
        package.main()
    library.write_bytes(b"no code")
    with pytest.raises(SystemExit, match="holds no GPU code"):
        package.main()


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    spawn = (
        "import pathlib, subprocess, sys, time\n"
        f"process = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\n"
        "print('working', flush=True)\n"
        "time.sleep(60)\n"
    )
    stages = [
        python("hangs", spawn, decides=True),
        python("works", "print('done')", weight=3),
        python("after", "raise SystemExit(0)", decides=True),
    ]
    begin = time.monotonic()
    outcomes = run_stages(stages, tmp_path, 10)
    assert time.monotonic() - begin < 10
    assert [outcome.status for outcome in outcomes] == [TIMED_OUT, PASSED, PASSED]
    assert outcomes[0].fails_suite and outcomes[0].last_lines == ["working"]
    state = Path("/proc") / child.read_text() / "stat"
    # Its parent is gone: where nobody collects it, what is left of it is a zombie.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_stage_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.stages.KILL_GRACE_SECONDS", 0.2)
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    begin = time.monotonic()
    (outcome,) = run_stages([python("stubborn", stubborn)], tmp_path, 2)
    assert outcome.status == TIMED_OUT and time.monotonic() - begin < 10
    assert not outcome.fails_suite


def test_a_failing_stage_costs_no_other_and_is_reported(tmp_path: Path) -> None:
    seen = []
    stages = [
        python("crashes", "import os; print('before'); os.abort()", decides=True),
        python("fails", "raise SystemExit(3)"),
        python("absent", SLEEP, decides=True, missing="there is no such tool"),
        python("works", "print('right')", decides=True),
    ]
    outcomes = run_stages(stages, tmp_path, 40, seen.append)
    assert seen == outcomes
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED, MISSING, PASSED]
    assert [outcome.fails_suite for outcome in outcomes] == [True, False, False, False]
    assert outcomes[1].exit_status == 3 and outcomes[2].seconds == 0
    page = write_summary(tmp_path, outcomes)
    assert page.startswith("# FAILED: crashes\n") and "there is no such tool" in page
    assert (tmp_path / "works.log").read_text() == "right\n"


def test_every_outcome_is_on_disk_before_the_next_stage(tmp_path: Path) -> None:
    counts = f"import json; print(len(json.load(open({str(tmp_path / STAGES)!r}))))"
    outcomes = run_stages([python(str(i), "pass" if i == 0 else counts) for i in range(3)], tmp_path, 30)
    assert [outcome.last_lines for outcome in outcomes] == [[], ["1"], ["2"]]


def test_time_that_is_left_goes_to_the_stages_behind(tmp_path: Path) -> None:
    stages = [python("short", "pass"), python("absent", "pass", weight=100, missing="absent"), python("last", "pass")]
    outcomes = run_stages(stages, tmp_path, 40)
    assert outcomes[0].limit_seconds == pytest.approx(20, abs=0.5)
    assert outcomes[2].limit_seconds == pytest.approx(40 - outcomes[0].seconds, abs=0.5)


def test_a_stage_that_keeps_time_is_told_how_much(tmp_path: Path) -> None:
    stage = python("told", "import sys; print(*sys.argv[1:])", keeps_time=True)
    (outcome,) = run_stages([stage], tmp_path, 10)
    option, seconds = outcome.last_lines[0].split()
    assert option == "--seconds" and 0 < float(seconds) < outcome.limit_seconds


def test_results_of_an_earlier_run_do_not_pass_for_new_ones(tmp_path: Path) -> None:
    write_json(tmp_path / CASES, [])
    run_stages([python("benchmarks", "raise SystemExit(1)", makes=(CASES,))], tmp_path, 20)
    assert not (tmp_path / CASES).exists()


# Eight cases: one is wrong, one hangs, one ends the process, one spoils the device for those behind it.
WORKER = """
import os, sys, time
first, lost = int(sys.argv[sys.argv.index("--first") + 1]), sys.argv[sys.argv.index("--lost") + 1]
print(f"from {first}: {lost}")
for i in range(first, 8):
    print(f"next: {i}", flush=True)
    if i == 2:
        time.sleep(60)
    if i == 4:
        os.abort()
    if i == 5:
        sys.exit(4)
sys.exit(3 if 1 >= first else 0)
"""


def test_a_case_that_hangs_or_crashes_is_lost_alone(capfd: pytest.CaptureFixture[str]) -> None:
    def command(first: int, lost: str) -> list[str]:
        return [sys.executable, "-u", "-c", WORKER, "--first", str(first), "--lost", lost]

    assert apart.run_apart(command, case_seconds=2.0, start_seconds=60.0) == 1
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("LOST")] == [
        "from 0: ", "next: 0", "next: 1", "next: 2",
        "from 3: did not end within 2 s", "next: 3", "next: 4",
        "from 5: the process ended with status -6", "next: 5",
        "from 6: ", "next: 6", "next: 7",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("LOST")] == [
        "LOST: did not end within 2 s", "LOST: the process ended with status -6",
    ]  # fmt: skip


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("sys.exit(3)", 1), ("1 / 0", 1), ("time.sleep(60)", 1)])
def test_a_process_that_begins_no_case(code: str, expected: int) -> None:
    def command(first: int, lost: str) -> list[str]:
        assert first == 0 and lost == ""
        return [sys.executable, "-c", f"import sys, time; {code}"]

    assert apart.run_apart(command, case_seconds=1.0, start_seconds=1.0 if "sleep" in code else 60.0) == expected


def test_the_cases_behind_a_lost_one_get_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(
        "import os, sys\nprint('next: case')\nprint(*sys.argv[1:])\nif '0' in sys.argv: os._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert apart.main(["--case-seconds", "60", "worker", "--device", "cpu", "--seconds", "50", "--out", "x"]) == 1
    first, second = (line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("--device"))
    assert first[:8] == ["--device", "cpu", "--out", "x", "--first", "0", "--lost", "--seconds"]
    assert second[4:6] == ["--first", "1"] and "ended with status 9" in " ".join(second)
    assert 0 < float(second[-1]) < float(first[-1]) <= 50


def test_the_table_goes_on_behind_a_lost_case(tmp_path: Path) -> None:
    command = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--seconds", "-1"]
    write_json(tmp_path / CASES, [{"level": "op"}])
    assert table.main([*command, "--first", "2", "--lost", "did not end within 40 s"]) == apart.WRONG
    first, lost = json.loads((tmp_path / CASES).read_text())
    assert first == {"level": "op"} and lost["level"] == "module" and lost["failed"] == "did not end within 40 s"


def test_the_gpu_waits_until_the_host_has_launched() -> None:
    assert [wait_cycles(seconds) for seconds in (0.0, 2e-3, 1.0)] == [2_200_000, 8_800_000, 44_000_000]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_suite_has_every_check_on_either_device(device: str, tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in command_line.suite(device, False, tmp_path)}
    checks = {name for name, stage in stages.items() if stage.decides}
    tests = {"correctness", "distributed", "primitives", "instructions"}
    sizes = {f"small_shapes_{size}" for size in HEAD_DIMS}
    assert checks == {*sizes, "small_shapes_sm80", *tests, "memcheck", "synccheck"} and "racecheck" in stages
    assert {32, 48, 64, 96, 128, 256} <= set(HEAD_DIMS)
    assert list(stages)[-2:] == ["benchmarks", "report"]
    for stage in stages.values():
        for argument in stage.command:
            assert not argument.startswith("tests/") or (ROOT / argument).is_file(), argument


def test_wrong_command_lines_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, text in ((["--stages", "speed"], "got ['speed']"), (["--minutes", "0"], "must be positive, got 0")):
        with pytest.raises(SystemExit) as error:
            command_line.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
        assert error.value.code == 2 and text in capsys.readouterr().err


def test_small_shapes_notice_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = small_shapes.TABLES["ragged"]
    call = small_shapes.make_call(torch.float32, 32, "cpu")
    bound = small_shapes.EPSILONS[torch.float32] * torch.finfo(torch.float32).eps
    assert small_shapes.worst_error(call, ragged)[0] <= bound

    def scaled(*arguments: Any, **options: Any) -> torch.Tensor:
        return anchor_attention(*arguments, **options) * (1 + 4 * bound)

    monkeypatch.setattr(small_shapes, "anchor_attention", scaled)
    assert bound < small_shapes.worst_error(call, ragged)[0] < 100 * bound
    monkeypatch.setattr(small_shapes, "anchor_attention", lambda *a, **o: anchor_attention(*a, **o) * torch.nan)
    monkeypatch.setattr(sys, "argv", ["small_shapes", "--device", "cpu", "--quick"])
    assert small_shapes.worst_error(call, ragged)[0] == torch.inf
    assert small_shapes.main() == apart.WRONG


def test_the_table_keeps_what_it_has_when_a_case_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = table.measure

    def breaks_on_modules(case: Any, *arguments: Any) -> dict[str, Any]:
        if case.level == "module":
            raise RuntimeError("no memory")
        return measure(case, *arguments)

    monkeypatch.setattr(table, "measure", breaks_on_modules)
    assert table.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == apart.WRONG
    records = json.loads((tmp_path / CASES).read_text())
    assert [record.get("failed") for record in records] == [None, "no memory"]
    environment = {"device": "x", "torch": "x", "torch_cuda": None, "commit": "x", "float32_matmul_precision": "x"}
    page = report.markdown(environment | {"library": {"sha256": "x"}}, records)
    assert "## Failed\n\n- module drivaer_train self bfloat16 forward: no memory" in page


def test_the_table_starts_no_case_when_its_time_is_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(quick=True, device="cpu", out=tmp_path, seconds=-1.0, first=0, lost="")
    assert table.run(arguments) == apart.RIGHT
    assert "2 of 2 cases are not measured" in capsys.readouterr().out
    assert not (tmp_path / CASES).exists()


def test_a_peer_that_cannot_is_recorded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(case: Any, contest: Any, contestants: dict[str, Any], reasons: dict[str, str], device: str) -> None:
        def refuse(_: Any) -> tuple[torch.Tensor, ...]:
            raise RuntimeError("No available kernel.\nAborting execution.")

        contestants["refuses"] = refuse

    monkeypatch.setattr(table, "_add_gpu_peers", add)
    case, peers = table.suite(quick=True)[0]
    record = table.measure(case, peers, 2, "cpu")
    assert record["not_supported"] == {"refuses": "No available kernel."}
    assert "refuses" not in record["seconds"] and len(record["seconds"]["anchor_attention"]) == 2


def test_the_suite_covers_every_workload_and_pattern() -> None:
    entries = table.suite(quick=False)
    assert len(entries) == len({*entries})
    cases = [case for case, _ in entries]
    for workload in table.GPU:
        bfloat16 = [case for case in cases if case.workload == workload and case.dtype == "bfloat16"]
        for passes in workload.passes:
            assert {c.pattern for c in bfloat16 if c.level == "op" and c.passes == passes} == set(workload.patterns)
            assert any(c.level == "module" and c.passes == passes for c in bfloat16)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(
    "key_ranges",
    [
        KeyRangeTable.from_ranges([[0, 40]], [[0, 30]]),
        KeyRangeTable.from_ranges([[3, 11], [3, 11], [20, 40]], [[0, 7], [9, 30], [2, 30]]),
    ],
)
def test_dense_peers_do_the_same_work_group_by_group(key_ranges: KeyRangeTable, pair: bool) -> None:
    def dense(*tensors: torch.Tensor) -> Any:
        out = scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)
        return (out, out.mean(-1)) if pair else out

    q, k, v = (torch.randn(2, n, 3, 16, dtype=torch.float64) for n in (40, 30, 30))
    found = per_group(dense, key_ranges)(q, k, v)
    torch.testing.assert_close(found, anchor_attention(q, k, v, key_ranges))


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_that_are_absent_or_unable_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key_ranges = KeyRangeTable.from_ranges([[0, 4]], [[0, 4]])
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(NotSupportedError, match="can't be imported"):
        library_contestant(name, key_ranges, "forward", masked=False)
    with pytest.raises(NotSupportedError, match="no mask"):
        library_contestant(name, key_ranges, "forward", masked=True)


def test_every_contestant_is_timed_once_a_round_and_leads_in_turn() -> None:
    calls: list[tuple[str, int]] = []
    contestants = {name: (lambda inputs, name=name: calls.append((name, inputs))) for name in "ab"}
    seconds = interleave_cold(contestants, [10, 20], 3, "cpu")
    assert calls == [("a", 10), ("b", 10), ("b", 20), ("a", 20), ("a", 10), ("b", 10)]
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3}
